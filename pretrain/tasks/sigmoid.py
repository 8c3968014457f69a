"""Sigmoid loss over all image-text pairs of the global batch, Zhai et al. 2023, arXiv:2303.15343, eq. 1 (SigLIP).

Every pair is a binary decision: an image matches its own text and none of the others. Gradient caching (see
`contrastive`) makes the loss independent of accumulation; it depends on the global batch through the pairs.
"""

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from pretrain.tasks.contrastive import Contrastive


class Sigmoid(Contrastive):
    """As `Contrastive`, with a bias added to the logits and the sigmoid loss."""

    outputs: ClassVar[tuple[str, ...]] = ("image", "text", "scale", "bias")

    def logits(self, images: Tensor, texts: Tensor, *numbers: Tensor) -> Tensor:
        """images, texts float32 [B, E], scale [1], bias [1] -> float32 [B, B], image i by text j."""
        scale, bias = numbers
        return super().logits(images, texts, scale) + bias.float()

    def loss(self, logits: Tensor) -> Tensor:
        """logits float32 [B, B] -> []."""
        return sigmoid_loss(logits)


def sigmoid_loss(logits: Tensor) -> Tensor:
    """logits float [B, B], image i by text j, pairs on the diagonal -> loss summed over texts, mean over images [].

    A pair costs -log sigmoid(z * logit), where z is 1 on the diagonal and -1 elsewhere.
    """
    signs = 2 * torch.eye(len(logits), dtype=logits.dtype, device=logits.device) - 1
    return -F.logsigmoid(signs * logits).sum(1).mean()
