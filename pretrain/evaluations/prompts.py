"""Evaluation of images generated for the captions of the evaluation data."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_pipeline.errors import ConfigError
from data_pipeline.images import resize
from data_pipeline.scenes import check_scene
from data_pipeline.schema import Sample
from data_pipeline.stream.mixture import Source
from data_pipeline.text.kinds import open_tokenizer
from pretrain.checkpoint.fingerprints import check_files
from pretrain.checkpoint.trained import load_trained
from pretrain.evaluations.evaluated import Batch, Evaluated, Figures, balanced, reading, summed
from pretrain.generate import generate_images, labelled_grid
from pretrain.inputs.bad import Usable
from pretrain.inputs.image_tokenizer import load_tokenizer
from pretrain.inputs.pixels import normalise
from pretrain.inputs.text import captions_of
from pretrain.schema.tasks import PairsConfig, figure_name, parsed
from pretrain.tasks.contrastive import ContrastiveInputs

PROMPTS = 200
DRAWN_AT_ONCE = 32
SHOWN = 24
TEMPERATURE = 0.5


def figures(given: Evaluated, means: Figures) -> Figures:
    """Return figures of images drawn for the first captions.

    One image is drawn per caption, or the best of several; for scenes, the requested shape and colour are scored.
    """
    drawer = Drawer(given)
    with reading(given, "captions", lambda some: [captions_of(sample) for sample in some]) as usable:

        def compute(positions: Batch) -> Batch:
            return drawer.totals(usable.checked(usable.take(positions["positions"].cpu().numpy())))

        groups = balanced(min(given.count, PROMPTS), DRAWN_AT_ONCE)
        totals = summed(given.ranks, groups, lambda some: {"positions": torch.from_numpy(some)}, compute)
    found = {"prompts": float(totals.pop("prompts"))}
    scenes = totals.pop("scenes") == found["prompts"]
    found |= {"candidates": float(given.candidates)} if given.rerank else {}
    return found | {name: float(total) / found["prompts"] for name, total in totals.items() if scenes}


def check(given: Evaluated, name: str) -> None:
    """Raise ConfigError if a figure that only scenes have decides which checkpoint is the best, and these are none."""
    config = given.config
    best = parsed(config.train.keep_best)[0]
    [sample] = Usable(given.stream, lambda some: None).take(np.arange(1))
    scored = [figure_name(name, figure) for figure in config.task.evaluated if figure != "prompts"]
    if best in scored and not _is_scene(sample):
        raise ConfigError(
            f"train.keep_best={config.train.keep_best!r}: only images of scenes are scored, and these data are others; "
            f"use for example {figure_name(name, 'loss')}"
        )


def _is_scene(sample: Sample) -> bool:
    return {"shape", "colour"} <= sample.meta.keys()


class Drawer:
    """Draws images for captions, and keeps a picture of the first ones."""

    def __init__(self, given: Evaluated) -> None:
        assert given.config.data.image_tokenizer is not None
        kept = given.kept
        self.given = given
        self.images_from = kept.get("tokenizer") or load_tokenizer(given.config.data.image_tokenizer)
        kept["tokenizer"] = self.images_from
        self.ranker = Ranker(given.rerank, given.stream) if given.rerank else None

    def totals(self, samples: list[Sample]) -> Batch:
        """Draw images of the samples' captions -> how many there are, and how many of them show what was asked for."""
        captions = [captions_of(sample) for sample in samples]
        asked = [some[sample.position % len(some)] for sample, some in zip(samples, captions, strict=True)]
        first = samples[0].position
        single = images = self._drawn(asked, first)
        if self.ranker:
            count = self.given.candidates
            many = self._drawn([prompt for prompt in asked for _ in range(count)], first * count)
            many = many.reshape(len(asked), count, *single.shape[1:])
            images = np.stack([self.ranker.best(some, prompt) for some, prompt in zip(many, asked, strict=True)])
        if first == 0:
            labels = [_label(prompt, sample) for prompt, sample in zip(asked[:SHOWN], samples, strict=False)]
            self.given.pictures["prompts"] = labelled_grid(images[:SHOWN], labels, columns=6)
        scenes = [sample for sample in samples if _is_scene(sample)]
        found = {"prompts": len(samples), "scenes": len(scenes)}
        found |= _found(single, samples, "single_") | _found(images, samples, "")
        return {name: torch.tensor(float(count)) for name, count in found.items()}

    def _drawn(self, prompts: list[str], first: int) -> np.ndarray:
        """Draw one image per prompt, uint8 [n, S, S, 3]; image i uses the random numbers of `first` + i."""
        given = self.given
        assert given.tokenizer is not None
        drawing: dict[str, Any] = {"temperature": TEMPERATURE, "seed": given.config.seed, "first": first}
        return generate_images(given.model, self.images_from, given.tokenizer, prompts, **drawing)


class Ranker:
    """A trained CLIP that chooses the image that fits a caption best."""

    def __init__(self, run: str | Path, stream: Source) -> None:
        self.model: Any
        self.model, config, _ = load_trained(run)
        if not isinstance(config.task, PairsConfig):
            raise ConfigError(
                f"{run} trained a {config.model.kind}, which does not score images against text; use the run of a clip"
            )
        check_files(run, config)
        self.inputs = ContrastiveInputs(config, stream, open_tokenizer(str(config.data.text_tokenizer)))

    def best(self, images: np.ndarray, caption: str) -> np.ndarray:
        """images uint8 [k, S, S, 3] -> the image most similar to the caption."""
        side = self.inputs.image_size
        shown = normalise(np.stack([resize(image, "center_crop", side) for image in images]))
        tokens, eot = self.inputs.text(caption)
        with torch.no_grad():
            seen = self.model.vision(shown)
            said = self.model.text(torch.from_numpy(tokens)[None], torch.tensor([eot]))
        best: np.ndarray = images[int((seen @ said[0]).argmax())]
        return best


def _label(prompt: str, sample: Sample) -> str:
    """Return the prompt or, if it is not ASCII (all the font has), an ASCII caption of the sample in brackets."""
    if prompt.isascii():
        return prompt
    return next((f"({caption})" for caption in sample.texts if caption.isascii()), prompt)


def _found(images: np.ndarray, samples: list[Sample], prefix: str) -> dict[str, int]:
    """uint8 [n, S, S, 3] -> how many show the requested shape, colour and both; samples that are no scenes count 0."""
    checks = [
        check_scene(image, sample.meta["shape"], sample.meta["colour"])
        for image, sample in zip(images, samples, strict=True)
        if _is_scene(sample)
    ]
    return {
        f"{prefix}prompt_accuracy": sum(bool(check.found) for check in checks),
        f"{prefix}shape_accuracy": sum(bool(check.shape_found) for check in checks),
        f"{prefix}colour_accuracy": sum(bool(check.colour_found) for check in checks),
    }
