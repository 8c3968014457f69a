"""Replaced-token detection (ELECTRA, arXiv:2003.10555, section 2): MLM of the generator + weight * RTD."""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.config import RtdConfig
from pretrain.models.electra import Electra
from pretrain.objectives.collectives import Collectives
from pretrain.objectives.mlm import word_loss


class Rtd(nn.Module):
    """The generator's mean over masked words and the discriminator's over all words but padding, both over all ranks.

    Each sum is divided by its own count, as in `mlm.Mlm`: the mean over ranks of "loss" is exact.
    """

    keys: ClassVar[tuple[str, ...]] = (
        "tokens", "types", "attention", "positions", "labels", "label_weights", "uniforms",
    )  # fmt: skip

    def __init__(self, model: Electra, config: RtdConfig, collectives: Collectives) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.collectives = collectives

    def counts(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """What this micro-batch's sums are divided by; `forward` takes their mean over micro-batches and ranks."""
        return {"masked_words": batch["label_weights"].sum(), "real_words": batch["attention"].sum()}

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of RtdInputs -> loss and, over all ranks, the losses and accuracies of both towers."""
        several = {key: batch[key] for key in ("segments", "places") if key in batch}  # samples in a row
        out = self.model(**{key: batch[key] for key in self.keys}, **several)
        labels, weights, real = batch["labels"], batch["label_weights"], batch["attention"]
        nll = word_loss(out.word_logits, labels, weights)
        rtd = replaced_loss(out.replaced_logits, out.replaced, real)
        right = ((out.word_logits.detach().argmax(-1) == labels) * weights).sum()
        guessed = out.replaced_logits.detach() > 0
        counts = [weights.sum(), real.sum(), nll.detach(), rtd.detach(), right]
        counts += [((guessed == out.replaced) & real).sum(), (guessed & out.replaced & real).sum()]
        counts += [(guessed & real).sum(), (out.replaced & real).sum()]
        sums = self.collectives.sum(torch.stack([count.float() for count in counts]))
        masked, words, total_nll, total_rtd, filled, judged, caught, accused, guilty = sums.unbind()
        masked, words, accused, guilty = (count.clamp(min=1) for count in (masked, words, accused, guilty))
        world = self.collectives.world
        usual_masked = batch.get("masked_words", masked / world)
        usual_words = batch.get("real_words", words / world)
        return {
            "loss": nll / usual_masked + self.config.rtd_weight * rtd / usual_words,
            "mlm_loss": total_nll / masked,
            "mlm_accuracy": filled / masked,
            "rtd_loss": total_rtd / words,
            "rtd_accuracy": judged / words,
            "rtd_precision": caught / accused,
            "rtd_recall": caught / guilty,
        }


def replaced_loss(logits: Tensor, replaced: Tensor, real: Tensor) -> Tensor:
    """logits float32 [B, S], replaced, real: bool [B, S] -> sum of binary cross-entropies over the real words []."""
    losses = F.binary_cross_entropy_with_logits(logits, replaced.float(), reduction="none")
    return (losses * real).sum()
