"""Masked words and, where asked for, next sentence (BERT, arXiv:1810.04805, section 3.1)."""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.config import MlmNspConfig
from pretrain.models.bert import Bert
from pretrain.objectives.collectives import Collectives


class Mlm(nn.Module):
    """Mean over the masked words of all ranks, plus mean over their samples of the next-sentence loss.

    Word counts differ between ranks: a rank returns its sum over the mean count per rank, so that the mean over ranks
    is the global mean, however samples are spread. Accumulated micro-batches are averaged as equals.
    """

    keys: ClassVar[tuple[str, ...]] = (
        "tokens",
        "types",
        "attention",
        "positions",
        "labels",
        "label_weights",
        "is_random",
    )

    def __init__(self, model: Bert, config: MlmNspConfig, collectives: Collectives) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.collectives = collectives

    def counts(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """What this micro-batch's sums are divided by; `forward` takes their mean over micro-batches and ranks."""
        return {"masked_words": batch["label_weights"].sum()}

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of MlmInputs -> loss and, over all ranks, mlm_loss, mlm_accuracy (nsp_loss, nsp_accuracy)."""
        several = {key: batch[key] for key in ("segments", "places") if key in batch}  # samples in a row
        words, pairs = self.model(batch["tokens"], batch["types"], batch["attention"], batch["positions"], **several)
        labels, weights = batch["labels"], batch["label_weights"]
        nll = word_loss(words, labels, weights)
        right = ((words.detach().argmax(-1) == labels) * weights).sum()
        nsp = F.cross_entropy(pairs, batch["is_random"])
        nsp_right = (pairs.detach().argmax(-1) == batch["is_random"]).float().mean()
        sums = torch.stack([weights.sum(), nll.detach(), right, nsp.detach(), nsp_right])
        count, total_nll, total_right, total_nsp, total_nsp_right = self.collectives.sum(sums).unbind()
        count, world = count.clamp(min=1), self.collectives.world
        usual = batch.get("masked_words", count / world)
        metrics = {"mlm_loss": total_nll / count, "mlm_accuracy": total_right / count}
        if not self.config.nsp:
            # the head still takes part: sharded training needs a gradient, here 0, for every parameter in every step
            return {"loss": nll / usual + 0 * nsp, **metrics}
        metrics |= {"nsp_loss": total_nsp / world, "nsp_accuracy": total_nsp_right / world}
        return {"loss": nll / usual + nsp, **metrics}


def word_loss(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """logits float32 [B, M, V], labels int64 [B, M], weights float [B, M] -> sum of weight * cross-entropy []."""
    nll = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return (nll * weights.flatten()).sum()
