"""Symmetric cross-entropy between the images and the texts of the global batch (CLIP, arXiv:2103.00020, fig. 3).

The loss compares every pair of the batch, so a sum over micro-batches is another loss. Gradient caching (GradCache, Gao
et al. 2021, arXiv:2101.06983) makes it independent of the split: all micro-batches are embedded without gradient, the
loss of the whole batch is differentiated with respect to the embeddings, and each micro-batch is embedded once more to
carry its part of that gradient into the weights. It costs one more forward and bounds memory by the micro-batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from data_pipeline.schema import Sample
from pretrain.inputs.packing import pad
from pretrain.inputs.pixels import drawn_pixels, normalise
from pretrain.inputs.text import caption_of
from pretrain.tasks.task import Batch, Task

if TYPE_CHECKING:
    from data_pipeline.stream.mixture import Source
    from data_pipeline.vocabulary import Vocabulary
    from pretrain.config import RunConfig


class ContrastiveInputs:
    """Samples -> {"pixels": float32 [b, 3, H, W], "tokens": int64 [b, S], "eot": int64 [b], place of [SEP]}."""

    def __init__(self, config: RunConfig, stream: Source, tokenizer: Vocabulary | None) -> None:
        reads = config.model.reads
        assert reads.text and reads.pixels and tokenizer
        self.image_size = reads.pixels.side
        self.context = reads.text.context
        self.data = config.data
        self.seed = config.seed
        self.tokenizer = tokenizer

    def __call__(self, samples: list[Sample]) -> Batch:
        """The batch of these samples, in their order."""
        images = drawn_pixels(samples, self.image_size, self.data, self.seed)
        texts = [self.text(caption_of(sample, self.seed)) for sample in samples]
        return {
            "pixels": normalise(images),
            "tokens": torch.from_numpy(np.stack([tokens for tokens, _ in texts])),
            "eot": torch.tensor([eot for _, eot in texts]),
        }

    def text(self, caption: str) -> tuple[np.ndarray, int]:
        """-> tokens int64 [S]: [CLS] pieces [SEP] [PAD]..., truncated to the context; and the place of [SEP]."""
        pieces = self.tokenizer.encode(caption)[: self.context - 2]
        return pad([self.tokenizer.cls, *pieces, self.tokenizer.sep], self.context), len(pieces) + 1


class Contrastive(Task):
    """Every rank gathers all embeddings and takes the loss of the whole global batch, so all ranks return the same."""

    inputs = ContrastiveInputs
    keys: ClassVar[tuple[str, ...]] = ("pixels", "tokens", "eot")

    compares_batch = True

    def forward(self, batch: Batch) -> Batch:
        """pixels float [b, 3, H, W], tokens int64 [b, S], eot int64 [b] -> loss and in-batch accuracies.

        With "embed" in the batch: the embeddings instead. With `slopes` in it: the loss and metrics that they carry,
        the loss with the gradient of this micro-batch's part.
        """
        image, text, scale = self.model(batch["pixels"], batch["tokens"], batch["eot"])
        if "embed" in batch:
            return {"image": image, "text": text, "scale": scale}
        if "image_slope" in batch:
            carried = (image * batch["image_slope"]).sum() + (text * batch["text_slope"]).sum()
            carried = carried + (scale * batch["scale_slope"]).sum()
            whole = {name.removeprefix("whole/"): value for name, value in batch.items() if name.startswith("whole/")}
            return whole | {"loss": whole["loss"] + carried - carried.detach()}
        return self._of_global_batch(image, text, scale)

    def slopes(self, rows: list[Batch]) -> list[Batch]:
        """The embeddings of this rank's micro-batches, in order -> what each one's second `forward` needs to know.

        The engine takes the mean of gradients over n micro-batches and over ranks; `gather` sums over ranks. So parts
        of the sum over samples are scaled by n, and the scale's gradient, the same everywhere, is not.
        """
        image, text = (torch.cat([row[name] for row in rows]).detach().requires_grad_() for name in ("image", "text"))
        scale = rows[0]["scale"].detach().requires_grad_()
        whole = self._of_global_batch(image, text, scale)
        of_image, of_text, of_scale = torch.autograd.grad(whole["loss"], (image, text, scale))
        sizes = [len(row["image"]) for row in rows]
        shared = {f"whole/{name}": value.detach() for name, value in whole.items()} | {"scale_slope": of_scale}
        parts = zip((of_image * len(rows)).split(sizes), (of_text * len(rows)).split(sizes), strict=True)
        return [shared | {"image_slope": a, "text_slope": b} for a, b in parts]

    def _of_global_batch(self, image: Tensor, text: Tensor, scale: Tensor) -> Batch:
        """image, text float32 [b, E] of this rank, scale [1] -> loss and metrics of all ranks' rows.

        The product is float32 whatever the autocast: in bf16 logits near 100 would be half a unit off, and only where
        the batch is not accumulated, as `slopes` runs outside of the autocast.
        """
        with torch.autocast(image.device.type, enabled=False):
            images, texts = (self.collectives.gather(rows.float()) for rows in (image, text))
            logits = scale.float() * images @ texts.T
        pairs = torch.arange(len(logits), device=logits.device)
        found = logits.detach()
        return {
            "loss": contrastive_loss(logits),
            "image_to_text_accuracy": (found.argmax(1) == pairs).float().mean(),
            "text_to_image_accuracy": (found.argmax(0) == pairs).float().mean(),
            "logit_scale": scale.detach().mean(),
        }


def contrastive_loss(logits: Tensor) -> Tensor:
    """logits float32 [B, B], image i against text j, pairs on the diagonal -> mean of both cross-entropies []."""
    pairs = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)) / 2
