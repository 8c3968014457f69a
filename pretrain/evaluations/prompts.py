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
from pretrain.evaluations.evaluated import Evaluated, Figures, reading
from pretrain.generate import generate_images, labelled_grid
from pretrain.inputs.image_tokenizer import load_tokenizer
from pretrain.inputs.pixels import normalise
from pretrain.inputs.text import captions_of
from pretrain.schema.tasks import PairsConfig
from pretrain.tasks.contrastive import ContrastiveInputs

PROMPTS = 200
TEMPERATURE = 0.5


def figures(given: Evaluated) -> Figures:
    """Generate one image per caption, or the best of several; for scenes, score the requested shape and colour."""
    config, stream, tokenizer = given.config, given.stream, given.tokenizer
    assert tokenizer is not None and config.data.image_tokenizer is not None
    ranker = Ranker(given.rerank, stream) if given.rerank else None
    images_from = load_tokenizer(config.data.image_tokenizer)
    with reading(stream, lambda some: [captions_of(sample) for sample in some], given.folder) as usable:
        samples = usable.checked(usable.take(np.arange(min(PROMPTS, stream.samples))))
    captions = [captions_of(sample) for sample in samples]
    asked = [some[index % len(some)] for index, some in enumerate(captions)]
    drawing: dict[str, Any] = {"temperature": TEMPERATURE, "seed": config.seed}
    single = generate_images(given.model, images_from, tokenizer, asked, **drawing)
    images, found = single, {"prompts": float(len(asked))} | _scene_figures(single, samples, "single_")
    if ranker:
        repeated = [prompt for prompt in asked for _ in range(given.candidates)]
        many = generate_images(given.model, images_from, tokenizer, repeated, **drawing)
        many = many.reshape(len(asked), given.candidates, *single.shape[1:])
        images = np.stack([some[ranker.best(some, prompt)] for some, prompt in zip(many, asked, strict=True)])
        found["candidates"] = float(given.candidates)
    labels = [_label(prompt, sample) for prompt, sample in zip(asked[:24], samples, strict=False)]
    given.pictures["evaluation-prompts.png"] = labelled_grid(images[:24], labels, columns=6)
    return found | _scene_figures(images, samples, "")


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

    def best(self, images: np.ndarray, caption: str) -> int:
        """images uint8 [k, S, S, 3] -> index of the image most similar to the caption."""
        side = self.inputs.image_size
        shown = normalise(np.stack([resize(image, "center_crop", side) for image in images]))
        tokens, eot = self.inputs.text(caption)
        with torch.no_grad():
            seen = self.model.vision(shown)
            said = self.model.text(torch.from_numpy(tokens)[None], torch.tensor([eot]))
        return int((seen @ said[0]).argmax())


def _label(prompt: str, sample: Sample) -> str:
    """Return the prompt or, if it is not ASCII (all the font has), an ASCII caption of the sample in brackets."""
    if prompt.isascii():
        return prompt
    return next((f"({caption})" for caption in sample.texts if caption.isascii()), prompt)


def _scene_figures(images: np.ndarray, samples: list[Sample], prefix: str) -> Figures:
    """uint8 [n, S, S, 3] -> shares with the requested shape, colour and both; empty if the data are not scenes."""
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
