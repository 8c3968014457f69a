"""Classification of images: cross-entropy of the sample's label, optionally smoothed (Szegedy et al. 2015)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch.nn import functional as F

from data_pipeline.errors import BadSample
from data_pipeline.schema import Sample
from pretrain.inputs.pixels import drawn_pixels, to_tensor
from pretrain.inputs.shapes import a_number
from pretrain.inputs.text import noise_key
from pretrain.schema.tasks import ClassifyConfig
from pretrain.tasks.task import Batch, Task

if TYPE_CHECKING:
    from data_pipeline.stream.mixture import Source
    from data_pipeline.text.tokenizer import TextTokenizer
    from pretrain.config import RunConfig


class ClassifyInputs:
    """Samples -> {"pixels": float32 [b, 3, S, S] in [-1, 1], "label": int64 [b]} and, if the model draws it,
    "noise": int64 [b, 1].
    """

    def __init__(self, config: RunConfig, stream: Source, tokenizer: TextTokenizer | None) -> None:
        reads = config.model.reads
        assert reads.pixels and reads.classes
        self.image_size, self.classes = reads.pixels.side, reads.classes
        self.draws_noise = config.model.draws_noise
        self.data = config.data
        self.seed = config.seed

    def __call__(self, samples: list[Sample]) -> Batch:
        """Return the batch, in the samples' order."""
        labels = [label_of(sample, self.classes) for sample in samples]
        batch = {
            "pixels": to_tensor(drawn_pixels(samples, self.image_size, self.data, self.seed)),
            "label": torch.tensor(labels),
        }
        if self.draws_noise:
            batch["noise"] = torch.tensor([[noise_key(sample, self.seed)] for sample in samples])
        return batch


def label_of(sample: Sample, classes: int) -> int:
    """Return the sample's label. Raises BadSample when there is none, or it is not below `classes`."""
    if sample.label is None:
        raise BadSample(
            f"sample {sample.key!r} has no label; classification needs one, use tars with .cls members and index them "
            "with `tessera data index`"
        )
    if not 0 <= sample.label < classes:
        raise BadSample(
            f"sample {sample.key!r} has label {sample.label}, model.classes={classes} allows 0 to {classes - 1}; set "
            "it to the number of classes of the dataset"
        )
    return sample.label


class Classify(Task):
    """Mean cross-entropy over the samples; every sample of the global batch has the same weight."""

    inputs = ClassifyInputs
    keys: ClassVar[tuple[str, ...]] = ("pixels", "label")
    shapes = {"label": a_number}
    config: ClassifyConfig

    def forward(self, batch: Batch) -> Batch:
        """pixels float [b, 3, S, S], label int64 [b] -> loss (nats per image) and accuracy."""
        logits, label = self.model(batch["pixels"]), batch["label"]
        accuracy = (logits.detach().argmax(-1) == label).float().mean()
        loss = F.cross_entropy(logits, label, label_smoothing=self.config.label_smoothing)
        return {"loss": loss, "accuracy": accuracy}
