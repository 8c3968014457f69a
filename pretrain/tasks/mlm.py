"""Masked language modelling, optionally with next-sentence prediction (BERT, arXiv:1810.04805, section 3.1)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from data_pipeline.schema import Sample
from data_pipeline.stream.order import sample_generator
from pretrain.inputs.masking import draw_positions, replace_bert
from pretrain.inputs.packing import Example, rows_of
from pretrain.inputs.text import caption_of, captions_of, choose, join, noise_key, trim
from pretrain.schema.tasks import MlmNspConfig
from pretrain.tasks.task import Batch, Task

if TYPE_CHECKING:
    from data_pipeline.stream.mixture import Source
    from data_pipeline.text.tokenizer import TextTokenizer
    from pretrain.config import RunConfig

SENTENCE_END = re.compile(r"(?<=[.!?\u3002\uff01\uff1f])\s*(?=\S)")
SHORT_PAIRS = 0.1  # share of sentence pairs that are cut to a random length below the context (BERT)


class MlmInputs:
    """Samples -> the tensors of `packing.padded`, with is_random 0 where the second segment follows the first; or,
    with `task.packing`, those of `packing.packed`.
    """

    def __init__(self, config: RunConfig, stream: Source, tokenizer: TextTokenizer | None) -> None:
        assert isinstance(config.task, MlmNspConfig) and config.model.reads.text and tokenizer
        self.context = config.model.reads.text.context
        self.task = config.task
        self.pairs = config.task.nsp
        self.seed = config.seed
        self.stream = stream
        self.tokenizer = tokenizer

    def __call__(self, samples: list[Sample]) -> Batch:
        """Return the batch: one row per sample in their order, or packed."""
        return rows_of([self.one(sample) for sample in samples], self.context, self.task, self.tokenizer.pad)

    def one(self, sample: Sample) -> Example:
        """Tokenize and mask one sample."""
        first, second, is_random = self.segments(sample)
        tokens, types = join(first, second, self.tokenizer)
        generator = sample_generator(self.seed, sample.epoch, sample.id, "mask")
        rule = (self.task.masking, self.task.mask_rate, self.context, self.tokenizer)
        positions = draw_positions(tokens, *rule, generator)
        masked = replace_bert(tokens, positions, self.tokenizer, generator)
        return Example(tokens, masked, types, positions, noise_key(sample, self.seed), is_random=is_random)

    def segments(self, sample: Sample) -> tuple[list[int], list[int], bool]:
        """Return the pieces of the first and second segment, and whether the second comes from another sample."""
        if not self.pairs:
            return self.tokenizer.encode(caption_of(sample, self.seed))[: self.context - 2], [], False
        generator = sample_generator(self.seed, sample.epoch, sample.id, "segments")
        first, second = self.neighbours(sample, generator)
        is_random = bool(generator.random() < 0.5) and self.stream.samples > 1
        if is_random:
            step = 1 + int(generator.integers(self.stream.samples - 1))  # never 0: any sample but this one
            other = self.stream.fetch((sample.id + step) % self.stream.samples)
            second = self.tokenizer.encode(choose(other, generator))
        room = self.context - 3
        if generator.random() < SHORT_PAIRS:
            room = int(generator.integers(2, room + 1))
        return *trim(first, second, room, generator), is_random

    def neighbours(self, sample: Sample, generator: np.random.Generator) -> tuple[list[int], list[int]]:
        """Return the pieces of two captions of the sample, in random order.

        A single caption is split at a random end of a sentence or, if it has only one sentence, at a random piece.
        """
        captions = captions_of(sample)
        if len(captions) > 1:
            one, two = generator.permutation(len(captions))[:2]
            return self.tokenizer.encode(captions[one]), self.tokenizer.encode(captions[two])
        caption = choose(sample, generator)
        sentences = SENTENCE_END.split(caption)
        if len(sentences) > 1:
            end = int(generator.integers(1, len(sentences)))
            first, second = " ".join(sentences[:end]), " ".join(sentences[end:])
            return self.tokenizer.encode(first), self.tokenizer.encode(second)
        pieces = self.tokenizer.encode(caption)
        cut = int(generator.integers(1, len(pieces))) if len(pieces) > 1 else len(pieces)
        return pieces[:cut], pieces[cut:]


class Mlm(Task):
    """Mean loss over the masked words of all ranks, plus the mean next-sentence loss over their samples.

    Word counts differ between ranks. Each rank divides its sum by the mean count per rank, so that the mean over ranks
    is the global mean, however samples are distributed. Accumulated micro-batches have equal weight.
    """

    inputs = MlmInputs
    keys: ClassVar[tuple[str, ...]] = (
        "tokens",
        "types",
        "attention",
        "positions",
        "labels",
        "label_weights",
        "is_random",
    )

    config: MlmNspConfig

    def counts(self, batch: Batch) -> Batch:
        """Return the divisors of this micro-batch's sums; `forward` gets their mean over micro-batches and ranks."""
        return {"masked_words": batch["label_weights"].sum()}

    def forward(self, batch: Batch) -> Batch:
        """The tensors of MlmInputs -> loss and, over all ranks, mlm_loss, mlm_accuracy (nsp_loss, nsp_accuracy)."""
        nll, nsp, sums = self._sums(batch)
        count, total_nll, total_right, total_nsp, total_nsp_right = self.collectives.sum(sums).unbind()
        count, world = count.clamp(min=1), self.collectives.world
        usual = batch.get("masked_words", count / world)
        metrics = {"mlm_loss": total_nll / count, "mlm_accuracy": total_right / count}
        if not self.config.nsp:
            # the head still takes part: sharded training needs a gradient, here 0, for every parameter in every step
            return {"loss": nll / usual + 0 * nsp, **metrics}
        metrics |= {"nsp_loss": total_nsp / world, "nsp_accuracy": total_nsp_right / world}
        return {"loss": nll / usual + nsp, **metrics}

    def _sums(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return the sum of the words' losses [], the mean next-sentence loss [], and all that is summed, float32 [5].

        The latter are the count, loss and hits of the masked words, and the means of next-sentence loss and accuracy.
        """
        several = {key: batch[key] for key in ("segments", "places") if key in batch}  # only when packed
        words, pairs = self.model(batch["tokens"], batch["types"], batch["attention"], batch["positions"], **several)
        labels, weights = batch["labels"], batch["label_weights"]
        nll = word_loss(words, labels, weights)
        right = ((words.detach().argmax(-1) == labels) * weights).sum()
        nsp = F.cross_entropy(pairs, batch["is_random"])
        nsp_right = (pairs.detach().argmax(-1) == batch["is_random"]).float().mean()
        return nll, nsp, torch.stack([weights.sum(), nll.detach(), right, nsp.detach(), nsp_right])

    def totals(self, batch: Batch) -> Batch:
        """Return the sums over the words of a batch, and over its samples with next-sentence prediction."""
        masked, nll, right, nsp, nsp_right = self._sums(batch)[2].double().unbind()
        samples = torch.tensor(len(batch["tokens"]), dtype=torch.float64, device=nll.device)
        words = {"masked_words": masked, "nll": nll, "right": right}
        return words | {"samples": samples, "nsp": nsp * samples, "nsp_right": nsp_right * samples}

    def means(self, totals: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the means over all masked words; of the next-sentence prediction over all samples."""
        count, samples = totals["masked_words"].clamp(min=1), totals["samples"]
        found = {"mlm_loss": totals["nll"] / count, "mlm_accuracy": totals["right"] / count}
        loss = found["mlm_loss"]
        if self.config.nsp:
            found |= {"nsp_loss": totals["nsp"] / samples, "nsp_accuracy": totals["nsp_right"] / samples}
            loss = loss + found["nsp_loss"]
        return {name: float(value) for name, value in ({"loss": loss} | found).items()}


def word_loss(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """logits float32 [B, M, V], labels int64 [B, M], weights float [B, M] -> sum of weight * cross-entropy []."""
    nll = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return (nll * weights.flatten()).sum()
