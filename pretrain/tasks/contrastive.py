"""Symmetric cross-entropy between the images and the texts of the global batch (CLIP, arXiv:2103.00020, fig. 3).

The loss compares all pairs of the batch, so a sum over micro-batches is another loss. Gradient caching (GradCache, Gao
et al. 2021, arXiv:2101.06983) makes it independent of the split: all micro-batches are embedded without gradient, the
loss of the whole batch is differentiated with respect to the embeddings, and each micro-batch is embedded once more to
propagate its part of that gradient to the weights. It costs one more forward and bounds memory by the micro-batch.
"""

from __future__ import annotations

import functools
import operator
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from data_pipeline.schema import Sample
from pretrain.inputs.packing import pad
from pretrain.inputs.pixels import drawn_pixels, normalise
from pretrain.inputs.text import caption_of, noise_key
from pretrain.tasks.task import Batch, Task

if TYPE_CHECKING:
    from data_pipeline.stream.mixture import Source
    from data_pipeline.text.tokenizer import TextTokenizer
    from pretrain.config import RunConfig


class ContrastiveInputs:
    """Samples -> {"pixels": float32 [b, 3, H, W], "tokens": int64 [b, S], "eot": int64 [b], index of [SEP]}.

    If the model drops paths, also "noise" int64 [b, 1], each sample's key.
    """

    def __init__(self, config: RunConfig, stream: Source, tokenizer: TextTokenizer | None) -> None:
        reads = config.model.reads
        assert reads.text and reads.pixels and tokenizer
        self.image_size = reads.pixels.side
        self.context = reads.text.context
        self.data = config.data
        self.seed = config.seed
        self.tokenizer = tokenizer
        self.noise = config.model.drop_paths

    def __call__(self, samples: list[Sample]) -> Batch:
        """Return the batch, in the samples' order."""
        images = drawn_pixels(samples, self.image_size, self.data, self.seed)
        texts = [self.text(caption_of(sample, self.seed)) for sample in samples]
        noise = {"noise": torch.tensor([[noise_key(sample, self.seed)] for sample in samples])} if self.noise else {}
        return noise | {
            "pixels": normalise(images),
            "tokens": torch.from_numpy(np.stack([tokens for tokens, _ in texts])),
            "eot": torch.tensor([eot for _, eot in texts]),
        }

    def text(self, caption: str) -> tuple[np.ndarray, int]:
        """Return tokens int64 [S], [CLS] pieces [SEP] [PAD]..., truncated to the context; and the index of [SEP]."""
        pieces = self.tokenizer.encode(caption)[: self.context - 2]
        row = [self.tokenizer.cls, *pieces, self.tokenizer.sep]
        return pad(row, self.context, self.tokenizer.pad), len(pieces) + 1


class Contrastive(Task):
    """Every rank gathers all embeddings and computes the loss of the global batch: all ranks return the same."""

    inputs = ContrastiveInputs
    keys: ClassVar[tuple[str, ...]] = ("pixels", "tokens", "eot")
    outputs: ClassVar[tuple[str, ...]] = ("image", "text", "scale")
    """Names of the model's outputs: embeddings of this rank's images and texts, then numbers [1]."""

    compares_batch = True

    def forward(self, batch: Batch) -> Batch:
        """pixels float [b, 3, H, W], tokens int64 [b, S], eot int64 [b] -> loss and in-batch accuracies.

        With "embed" in the batch, returns the model's outputs instead. With the result of `slopes` in the batch,
        returns its loss and metrics; the loss then has the gradient of this micro-batch's part.
        """
        made = dict(zip(self.outputs, self.model(batch["pixels"], batch["tokens"], batch["eot"]), strict=True))
        if "embed" in batch:
            return made
        if "image_slope" in batch:
            parts = ((value * batch[f"{name}_slope"]).sum() for name, value in made.items())
            carried = functools.reduce(operator.add, parts)
            whole = {name.removeprefix("whole/"): value for name, value in batch.items() if name.startswith("whole/")}
            return whole | {"loss": whole["loss"] + carried - carried.detach()}
        return self._of_global_batch(*made.values())

    def slopes(self, rows: list[Batch]) -> list[Batch]:
        """Embeddings of this rank's micro-batches, in order -> the extra inputs of each one's second `forward`.

        The engine averages gradients over n micro-batches and over ranks; the backward of `gather` sums over ranks.
        The embeddings' gradients are therefore scaled by n; the numbers' gradients, equal everywhere, are not.
        """
        image, text = (torch.cat([row[name] for row in rows]).detach().requires_grad_() for name in ("image", "text"))
        numbers = [rows[0][name].detach().requires_grad_() for name in self.outputs[2:]]
        whole = self._of_global_batch(image, text, *numbers)
        of_image, of_text, *of_numbers = torch.autograd.grad(whole["loss"], (image, text, *numbers))
        sizes = [len(row["image"]) for row in rows]
        shared = {f"whole/{name}": value.detach() for name, value in whole.items()}
        shared |= {f"{name}_slope": slope for name, slope in zip(self.outputs[2:], of_numbers, strict=True)}
        parts = zip((of_image * len(rows)).split(sizes), (of_text * len(rows)).split(sizes), strict=True)
        return [shared | {"image_slope": a, "text_slope": b} for a, b in parts]

    def _of_global_batch(self, image: Tensor, text: Tensor, *numbers: Tensor) -> Batch:
        """image, text float32 [b, E] of this rank, numbers [1] -> loss and metrics over all ranks' rows.

        The product is computed in float32 even under autocast: in bf16, logits near 100 would be off by half a unit,
        and only without accumulation, because `slopes` runs outside the autocast.
        """
        with torch.autocast(image.device.type, enabled=False):
            images, texts = (self.collectives.gather(rows.float()) for rows in (image, text))
            logits = self.logits(images, texts, *numbers)
        pairs = torch.arange(len(logits), device=logits.device)
        found = logits.detach()
        return {
            "loss": self.loss(logits),
            "image_to_text_accuracy": (found.argmax(1) == pairs).float().mean(),
            "text_to_image_accuracy": (found.argmax(0) == pairs).float().mean(),
            **{f"logit_{name}": value.detach().mean() for name, value in zip(self.outputs[2:], numbers, strict=True)},
        }

    def logits(self, images: Tensor, texts: Tensor, *numbers: Tensor) -> Tensor:
        """images, texts float32 [B, E], scale [1] -> float32 [B, B], image i by text j."""
        (scale,) = numbers
        return scale.float() * images @ texts.T

    def loss(self, logits: Tensor) -> Tensor:
        """logits float32 [B, B] -> []."""
        return contrastive_loss(logits)


def contrastive_loss(logits: Tensor) -> Tensor:
    """logits float32 [B, B], image i by text j, pairs on the diagonal -> mean of both cross-entropies []."""
    pairs = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)) / 2
