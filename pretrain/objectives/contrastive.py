"""Symmetric cross-entropy between the images and the texts of the global batch (CLIP, arXiv:2103.00020, fig. 3)."""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.config import ContrastiveConfig
from pretrain.models.clip import Clip
from pretrain.objectives.collectives import Collectives


class Contrastive(nn.Module):
    """Every rank gathers all embeddings and takes the loss of the whole micro-batch, so all ranks return the same."""

    keys: ClassVar[tuple[str, ...]] = ("pixels", "tokens", "eot")

    def __init__(self, model: Clip, config: ContrastiveConfig, collectives: Collectives) -> None:
        super().__init__()
        self.model = model
        self.collectives = collectives

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """pixels float [b, 3, H, W], tokens int64 [b, S], eot int64 [b] -> loss and in-batch accuracies."""
        image, text, scale = self.model(batch["pixels"], batch["tokens"], batch["eot"])
        logits = scale * self.collectives.gather(image) @ self.collectives.gather(text).T
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
