"""Replaced-token detection (ELECTRA, arXiv:2003.10555, section 2): MLM of the generator + weight * RTD."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from data_pipeline.schema import Sample
from data_pipeline.stream.order import sample_generator
from pretrain.inputs.masking import draw_positions, mask_slots, replace_electra
from pretrain.inputs.packing import Example, rows_of
from pretrain.inputs.text import caption_of, join, noise_key
from pretrain.schema.tasks import RtdConfig
from pretrain.tasks.mlm import word_loss
from pretrain.tasks.task import Batch, Task

if TYPE_CHECKING:
    from data_pipeline.stream.mixture import Source
    from data_pipeline.text.tokenizer import TextTokenizer
    from pretrain.config import RunConfig


class RtdInputs:
    """As MlmInputs without `is_random`, plus uniforms float32 [b, M] in [0, 1) for sampling the generator's words."""

    def __init__(self, config: RunConfig, stream: Source, tokenizer: TextTokenizer | None) -> None:
        assert isinstance(config.task, RtdConfig) and config.model.reads.text and tokenizer
        self.context = config.model.reads.text.context
        self.task = config.task
        self.seed = config.seed
        self.tokenizer = tokenizer

    def __call__(self, samples: list[Sample]) -> Batch:
        """Return the batch: one row per sample in their order, or packed."""
        return rows_of([self.one(sample) for sample in samples], self.context, self.task, self.tokenizer.pad)

    def one(self, sample: Sample) -> Example:
        """Tokenize and mask one sample."""
        pieces = self.tokenizer.encode(caption_of(sample, self.seed))[: self.context - 2]
        tokens, types = join(pieces, [], self.tokenizer)
        generator = sample_generator(self.seed, sample.epoch, sample.id, "mask")
        rule = (self.task.masking, self.task.mask_rate, self.context, self.tokenizer)
        positions = draw_positions(tokens, *rule, generator)
        masked = replace_electra(tokens, positions, self.tokenizer, generator)
        uniforms = sample_generator(self.seed, sample.epoch, sample.id, "replace").random(
            mask_slots(self.task.mask_rate, self.context), dtype=np.float32
        )
        return Example(tokens, masked, types, positions, noise_key(sample, self.seed), uniforms=uniforms)


class Rtd(Task):
    """Mean loss of the generator over masked words and of the discriminator over non-padding words, over all ranks.

    Each sum is divided by its own count, as in `mlm.Mlm`: the mean over ranks of "loss" is exact.
    """

    inputs = RtdInputs
    keys: ClassVar[tuple[str, ...]] = (
        "tokens", "types", "attention", "positions", "labels", "label_weights", "uniforms",
    )  # fmt: skip

    config: RtdConfig

    def counts(self, batch: Batch) -> Batch:
        """Return the divisors of this micro-batch's sums; `forward` gets their mean over micro-batches and ranks."""
        return {"masked_words": batch["label_weights"].sum(), "real_words": batch["attention"].sum()}

    def forward(self, batch: Batch) -> Batch:
        """The tensors of RtdInputs -> loss and, over all ranks, the losses and accuracies of both towers."""
        nll, rtd, sums = self._sums(batch)
        sums = self.collectives.sum(sums)
        masked, words = sums[0].clamp(min=1), sums[1].clamp(min=1)
        world = self.collectives.world
        usual_masked = batch.get("masked_words", masked / world)
        usual_words = batch.get("real_words", words / world)
        return {"loss": nll / usual_masked + self.config.rtd_weight * rtd / usual_words, **_metrics(sums)}

    def _sums(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return the sums of the losses of both towers [], and all sums in the order of SUMS, float32 [9]."""
        several = {key: batch[key] for key in ("segments", "places") if key in batch}  # only when packed
        out = self.model(**{key: batch[key] for key in self.keys}, **several)
        labels, weights, real = batch["labels"], batch["label_weights"], batch["attention"]
        nll = word_loss(out.word_logits, labels, weights)
        rtd = replaced_loss(out.replaced_logits, out.replaced, real)
        right = ((out.word_logits.detach().argmax(-1) == labels) * weights).sum()
        guessed = out.replaced_logits.detach() > 0
        counts = [weights.sum(), real.sum(), nll.detach(), rtd.detach(), right]
        counts += [((guessed == out.replaced) & real).sum(), (guessed & out.replaced & real).sum()]
        counts += [(guessed & real).sum(), (out.replaced & real).sum()]
        return nll, rtd, torch.stack([count.float() for count in counts])

    def totals(self, batch: Batch) -> Batch:
        """Return the sums over the words of a batch."""
        return dict(zip(SUMS, self._sums(batch)[2].double().unbind(), strict=True))

    def means(self, totals: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the means over all masked words, of the discriminator over all words but padding."""
        found = _metrics(torch.stack([totals[name] for name in SUMS]))
        loss = found["mlm_loss"] + self.config.rtd_weight * found["rtd_loss"]
        return {name: float(value) for name, value in ({"loss": loss} | found).items()}


SUMS = ("masked", "words", "nll", "rtd", "filled", "judged", "caught", "accused", "guilty")
"""Counts of masked words and of words; sums of both losses; words filled in and judged rightly; replaced words that
were found, words called replaced, and words replaced."""


def _metrics(sums: Tensor) -> Batch:
    """float [9] in the order of SUMS -> losses and accuracies of both towers."""
    masked, words, nll, rtd, filled, judged, caught, accused, guilty = sums.unbind()
    masked, words, accused, guilty = (count.clamp(min=1) for count in (masked, words, accused, guilty))
    return {
        "mlm_loss": nll / masked,
        "mlm_accuracy": filled / masked,
        "rtd_loss": rtd / words,
        "rtd_accuracy": judged / words,
        "rtd_precision": caught / accused,
        "rtd_recall": caught / guilty,
    }


def replaced_loss(logits: Tensor, replaced: Tensor, real: Tensor) -> Tensor:
    """logits float32 [B, S], replaced, real: bool [B, S] -> sum of binary cross-entropies over the real words []."""
    losses = F.binary_cross_entropy_with_logits(logits, replaced.float(), reduction="none")
    return (losses * real).sum()
