"""Cross-entropy of the image codes, given the text and the codes before (EasyNLP's text2image_generation)."""

from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.config import AutoregressiveConfig
from pretrain.models.gpt import Gpt
from pretrain.objectives.collectives import Collectives


class Autoregressive(nn.Module):
    """Mean over all image codes; text is read but not predicted."""

    keys: ClassVar[tuple[str, ...]] = ("text", "codes")

    def __init__(self, model: Gpt, config: AutoregressiveConfig, collectives: Collectives) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """text int64 [B, T], codes int64 [B, I] -> loss (nats per code) and code_accuracy."""
        logits = self.model(batch["text"], batch["codes"])
        accuracy = (logits.detach().argmax(-1) == batch["codes"]).float().mean()
        return {"loss": code_loss(logits, batch["codes"]), "code_accuracy": accuracy}


def code_loss(logits: Tensor, codes: Tensor) -> Tensor:
    """logits float32 [B, I, V], codes int64 [B, I] -> mean cross-entropy []."""
    return F.cross_entropy(logits.flatten(0, 1), codes.flatten())
