"""The figures of a trained model, on `data.evaluation` (or its training data where none is named)."""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from data_pipeline.build.scenes import check_scene
from data_pipeline.errors import ConfigError, storage_errors
from data_pipeline.images import resize
from data_pipeline.outputs import write_whole
from data_pipeline.schema import Sample
from data_pipeline.stream.mixture import Mixture, Source
from data_pipeline.stream.reader import Stream
from data_pipeline.vocabulary import Vocabulary
from pretrain.checkpoint.fingerprints import check_datasets, check_files
from pretrain.checkpoint.trained import NOT_SAID, load_trained
from pretrain.config import RunConfig
from pretrain.inputs import INPUTS
from pretrain.inputs.bad import FOLDER as BAD_SAMPLES
from pretrain.inputs.bad import Ledger, Usable
from pretrain.inputs.lethal import looking_decoder, remembered, screened
from pretrain.inputs.text import ContrastiveInputs, captions_of, normalise
from pretrain.metrics import grid, png, retrieval_recall_at_1
from pretrain.mlflow_feed import send, shown, why_not
from pretrain.objectives import OBJECTIVES
from pretrain.objectives.collectives import ONE_DEVICE
from pretrain.train import open_data

SAMPLES = 512
BATCH = 64
CANDIDATES = 64
PROMPTS = 200
TEMPERATURE = 0.5
CANDIDATES_PER_PROMPT = 8

DECODE_S = 60.0
"""Processor time that an image may take."""

Figures = dict[str, float]
Pictures = dict[str, Image.Image]
"""By the name of their file."""


def main(
    run: str | Path,
    rerank: str | Path | None = None,
    candidates: int = CANDIDATES_PER_PROMPT,
    step: int | None = None,
    label: str | None = None,
    overrides: Sequence[str] = (),
    say: Callable[[dict[str, Any]], None] = lambda told: None,
) -> dict[str, Any]:
    """Evaluate a run's newest checkpoint (of a step; named `label`) or an exported model -> step, data and figures.

    These are handed to `say` before anything is written: RUN/evaluation.json, pictures in RUN/samples, MLflow.
    rerank: for a gpt, the run or export of a CLIP that picks the best of `candidates` images per prompt, as in DALL-E
    (Ramesh et al. 2021, arXiv:2102.12092).
    """
    folder = Path(run)
    model, config, at = load_trained(folder, step, label, overrides)
    if rerank and config.model.kind != "gpt":
        raise ConfigError(
            f"--rerank {rerank}: a {config.model.kind} draws no images; name the run of a gpt to evaluate"
        )
    check_files(folder, config)
    stream, vocabulary = _open_data(config, folder)
    readable = config.model_copy(update={"data": config.data.without_augmentation()})
    pictures: Pictures = {}
    if config.model.kind == "gpt":
        ranker = Ranker(rerank, stream) if rerank else None
        figures = _gpt(model, readable, stream, vocabulary, folder, pictures, ranker, candidates)
    else:
        figures = EVALUATIONS[config.model.kind](model, readable, stream, vocabulary, folder, pictures)
    about = {"step": at, **_data_of(config, stream)} | ({"reranked_by": str(rerank)} if rerank else {})
    told = {key: value for key, value in about.items() if value is not None} | figures
    say(told)
    _write(folder, told, pictures)
    if config.tracking.uri:
        try:
            send(folder, config, figures)
        except Exception as error:  # tracking must not cost the figures
            why = f"did not take the figures ({why_not(error)}); they are in {folder}"
            print(f"MLflow at {shown(config.tracking.uri)} {why}", file=sys.stderr)
    return told


def _open_data(config: RunConfig, folder: Path) -> tuple[Source, Vocabulary | None]:
    """The data to evaluate on, and the vocabulary. A gpt needs no image codes there: it draws from the captions."""
    if not config.data.evaluation and config.data.dataset == NOT_SAID:
        raise ConfigError(f"{folder} does not say what to evaluate it on; give data.evaluation=DATASET")
    if config.model.kind == "gpt" and config.data.evaluation:
        return Stream(config.data.evaluation, config.seed), Vocabulary(str(config.data.vocabulary))
    stream, vocabulary = open_data(config, config.data.evaluation)
    if not config.data.evaluation:
        check_datasets(folder, config, stream)
    return stream, vocabulary


def _data_of(config: RunConfig, stream: Source) -> dict[str, Any]:
    """Which data the figures are of. held_out: is it other data than what was trained on?"""
    streams = stream.streams if isinstance(stream, Mixture) else [stream]
    return {
        "data": stream.dataset,
        "data_fingerprint": " + ".join(one.fingerprint[:12] for one in streams),
        "held_out": bool(config.data.evaluation),
    }


def _write(folder: Path, told: dict[str, Any], pictures: Pictures) -> None:
    """Raises DataError where the folder does not take it."""
    samples = folder / "samples"
    if pictures:
        with storage_errors(samples):
            samples.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "evaluation.json", (json.dumps(told, indent=1, sort_keys=True) + "\n").encode())
    for name, picture in pictures.items():
        write_whole(samples / name, png(picture))


def _objective_means(
    model: nn.Module, config: RunConfig, stream: Source, vocabulary: Vocabulary | None, folder: Path
) -> Figures:
    """The objective's own losses and metrics, averaged over up to SAMPLES samples."""
    objective = OBJECTIVES[config.objective.kind](model, config.objective, ONE_DEVICE).eval()
    inputs = INPUTS[config.objective.kind](config, stream, vocabulary)
    torch.manual_seed(config.seed)
    rows = []
    with torch.no_grad(), _reading(stream, inputs, folder) as usable:
        for batch in _batches(usable):
            rows.append(objective(batch | {"step": torch.tensor(0)}))
    return {name: float(torch.stack([row[name].double().reshape(()) for row in rows]).mean()) for name in rows[0]}


@contextlib.contextmanager
def _reading(stream: Source, inputs: Callable[[list[Sample]], Any], folder: Path) -> Iterator[Usable]:
    """Read samples as training does: unusable ones are replaced, and listed in FOLDER/bad_samples/evaluation.jsonl.

    Images are decoded in the sandbox first: one that kills its decoder is such a sample too.
    """
    with contextlib.closing(looking_decoder(DECODE_S)) as decoder:
        usable = Usable(stream, screened(inputs, remembered(folder), decoder))
        yield usable
    if usable.replaced:
        path = folder / BAD_SAMPLES / "evaluation.jsonl"
        told = f"{len(usable.replaced)} samples of {stream.dataset} cannot be used, others stood in for them"
        try:
            Ledger(path).note(usable.replaced, 0)
            print(f"{told}: {path}", file=sys.stderr)
        except OSError as error:  # the figures do not depend on the list
            print(f"{told}, which could not be listed ({error})", file=sys.stderr)


def _batches(usable: Usable) -> Iterator[dict[str, Tensor]]:
    """Full batches of the first epoch; one short batch where the dataset is smaller."""
    count = min(usable.stream.samples, SAMPLES)
    size = min(BATCH, count)
    for start in range(0, count - size + 1, size):
        yield usable.batch(usable.take(np.arange(start, start + size)))


def _clip(
    model: Any, config: RunConfig, stream: Source, vocabulary: Vocabulary | None, folder: Path, pictures: Pictures
) -> Figures:
    """Retrieval both ways among CANDIDATES pairs of distinct captions, over several groups of them."""
    inputs = INPUTS["contrastive"](config, stream, vocabulary)
    scores = []
    with _reading(stream, inputs, folder) as usable:
        groups = _distinct_groups(usable)
    for samples in groups:
        batch = inputs(samples)
        with torch.no_grad():
            images, texts, _ = model(batch["pixels"], batch["tokens"], batch["eot"])
        scores.append(retrieval_recall_at_1(images.float(), texts.float()))
    return {"retrieval_r1": float(np.mean(scores)), "candidates": CANDIDATES, "groups": len(scores)}


def _distinct_groups(usable: Usable, groups: int = 4) -> list[list[Sample]]:
    """Groups of CANDIDATES samples no two of which share a caption."""
    found: list[list[Sample]] = [[]]
    seen: set[str] = set()
    for position in range(min(usable.stream.samples, 20 * groups * CANDIDATES)):
        (sample,) = usable.checked(usable.take(np.array([position])))
        if seen.isdisjoint(sample.captions):
            seen.update(sample.captions)
            found[-1].append(sample)
        if len(found[-1]) == CANDIDATES:
            if len(found) == groups:
                return found
            found.append([])
            seen = set()
    whole = [group for group in found if len(group) == CANDIDATES]
    if not whole:
        raise ConfigError(
            f"{usable.stream.dataset} has no {CANDIDATES} samples with distinct captions; name a larger data.evaluation"
        )
    return whole


def _vqgan(
    model: Any, config: RunConfig, stream: Source, vocabulary: Vocabulary | None, folder: Path, pictures: Pictures
) -> Figures:
    """PSNR in dB over all samples' pixels, and how many codes are in use."""
    inputs = INPUTS["reconstruction"](config, stream, None)
    errors: list[Tensor] = []
    used: set[int] = set()
    shown: list[Tensor] = []
    with torch.no_grad(), _reading(stream, inputs, folder) as usable:
        for pixels in (batch["pixels"] for batch in _batches(usable)):
            codes = model.encode(pixels)
            drawn = model.decode(codes).float().clamp(-1, 1)
            errors.append((pixels - drawn).square().mean((1, 2, 3)) / 4)
            used.update(codes.flatten().tolist())
            shown = shown or [pixels[:16], drawn[:16]]
    pictures["evaluation-reconstructions.png"] = grid(torch.cat(shown))
    per_image = -10 * torch.log10(torch.cat(errors).clamp(min=1e-10))
    return {"reconstruction_psnr": float(per_image.mean()), "codes_used": len(used)}


class Ranker:
    """A trained CLIP that says which of several images shows a caption best."""

    def __init__(self, run: str | Path, stream: Source) -> None:
        self.model: Any
        self.model, config, _ = load_trained(run)
        if config.model.kind != "clip":
            raise ConfigError(
                f"{run} trained a {config.model.kind}, which compares no images with text; name a clip's run"
            )
        check_files(run, config)
        self.inputs = ContrastiveInputs(config, stream, Vocabulary(str(config.data.vocabulary)))

    def best(self, images: np.ndarray, caption: str) -> int:
        """uint8 [k, S, S, 3] -> index of the image closest to the caption."""
        side = self.inputs.image_size
        shown = normalise(np.stack([resize(image, "center_crop", side) for image in images]))
        tokens, eot = self.inputs.text(caption)
        with torch.no_grad():
            seen = self.model.vision(shown)
            said = self.model.text(torch.from_numpy(tokens)[None], torch.tensor([eot]))
        return int((seen @ said[0]).argmax())


def _gpt(
    model: Any,
    config: RunConfig,
    stream: Source,
    vocabulary: Vocabulary | None,
    folder: Path,
    pictures: Pictures,
    ranker: Ranker | None,
    candidates: int,
) -> Figures:
    """Images for captions of the evaluation data; for scenes, the share that shows the asked shape and colour."""
    from pretrain.generate import generate_images, labelled_grid
    from pretrain.interchange.tokenizer import load_tokenizer

    assert vocabulary is not None and config.data.tokenizer is not None
    tokenizer = load_tokenizer(config.data.tokenizer)
    with _reading(stream, lambda some: [captions_of(sample) for sample in some], folder) as usable:
        samples = usable.checked(usable.take(np.arange(min(PROMPTS, stream.samples))))
    captions = [captions_of(sample) for sample in samples]
    prompts = [some[index % len(some)] for index, some in enumerate(captions)]
    single = generate_images(model, tokenizer, vocabulary, prompts, temperature=TEMPERATURE, seed=config.seed)
    images, figures = single, {"prompts": float(len(prompts))} | _scene_figures(single, samples, "single_")
    if ranker:
        repeated = [prompt for prompt in prompts for _ in range(candidates)]
        many = generate_images(model, tokenizer, vocabulary, repeated, temperature=TEMPERATURE, seed=config.seed)
        many = many.reshape(len(prompts), candidates, *single.shape[1:])
        images = np.stack([some[ranker.best(some, prompt)] for some, prompt in zip(many, prompts, strict=True)])
        figures["candidates"] = float(candidates)
    labels = [_label(prompt, sample) for prompt, sample in zip(prompts[:24], samples, strict=False)]
    pictures["evaluation-prompts.png"] = labelled_grid(images[:24], labels, columns=6)
    return figures | _scene_figures(images, samples, "")


def _label(prompt: str, sample: Sample) -> str:
    """The prompt; where the picture's font cannot write it, a caption of the same sample that it can, in brackets."""
    if prompt.isascii():
        return prompt
    return next((f"({caption})" for caption in sample.captions if caption.isascii()), prompt)


def _scene_figures(images: np.ndarray, samples: list[Sample], prefix: str) -> Figures:
    """uint8 [n, S, S, 3] -> shares with the asked shape, colour and both; nothing for data that are no scenes."""
    if not all({"shape", "colour"} <= sample.meta.keys() for sample in samples):
        return {}
    checks = [
        check_scene(image, sample.meta["shape"], sample.meta["colour"])
        for image, sample in zip(images, samples, strict=True)
    ]
    return {
        f"{prefix}prompt_accuracy": float(np.mean([check.found for check in checks])),
        f"{prefix}shape_accuracy": float(np.mean([check.shape_found for check in checks])),
        f"{prefix}colour_accuracy": float(np.mean([check.colour_found for check in checks])),
    }


def _text(
    model: Any, config: RunConfig, stream: Source, vocabulary: Vocabulary | None, folder: Path, pictures: Pictures
) -> Figures:
    return _objective_means(model, config, stream, vocabulary, folder)


EVALUATIONS: dict[str, Callable[[Any, RunConfig, Source, Vocabulary | None, Path, Pictures], Figures]] = {
    "clip": _clip,
    "bert": _text,
    "electra": _text,
    "vqgan": _vqgan,
}
