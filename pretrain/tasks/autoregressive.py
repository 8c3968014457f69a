"""Cross-entropy of the image codes, given the text and the preceding codes (EasyNLP's text2image_generation)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from data_pipeline.schema import Sample
from data_pipeline.stream.order import sample_generator
from pretrain.inputs.codes import codes_of
from pretrain.inputs.text import caption_of, noise_key, text_ids
from pretrain.schema.tasks import AutoregressiveConfig
from pretrain.tasks.task import Batch, Task

if TYPE_CHECKING:
    from data_pipeline.stream.mixture import Source
    from data_pipeline.text.tokenizer import TextTokenizer
    from pretrain.config import RunConfig


class AutoregressiveInputs:
    """Samples -> {"text": int64 [b, T], "codes": int64 [b, I], "noise": int64 [b, 1]}.

    The caption and the dropout key are drawn from the sample's own random numbers.
    """

    def __init__(self, config: RunConfig, stream: Source, tokenizer: TextTokenizer | None) -> None:
        reads = config.model.reads
        assert isinstance(config.task, AutoregressiveConfig) and reads.text and reads.codes and tokenizer
        self.text_tokens, self.reads = reads.text.context, reads.codes
        self.caption_drop = config.task.caption_drop
        self.tokenizer = tokenizer
        self.seed = config.seed

    def __call__(self, samples: list[Sample]) -> Batch:
        """Return the batch, in the samples' order. Raises DataError with the key of a sample that does not fit."""
        text = np.stack([self._text(sample) for sample in samples])
        codes = np.stack([codes_of(sample, self.reads, self.seed) for sample in samples])
        noise = torch.tensor([[noise_key(sample, self.seed)] for sample in samples])
        return {"text": torch.from_numpy(text), "codes": torch.from_numpy(codes), "noise": noise}

    def _text(self, sample: Sample) -> np.ndarray:
        """Return the caption's ids, int64 [T]; all padding with probability `caption_drop`."""
        caption = caption_of(sample, self.seed)
        dropped = sample_generator(self.seed, sample.epoch, sample.id, "caption_drop").random() < self.caption_drop
        return text_ids("" if dropped else caption, self.tokenizer, self.text_tokens)


class Autoregressive(Task):
    """Mean cross-entropy over all image codes; text is read but not predicted."""

    inputs = AutoregressiveInputs
    keys: ClassVar[tuple[str, ...]] = ("text", "codes")

    def forward(self, batch: Batch) -> Batch:
        """text int64 [B, T], codes int64 [B, I] -> loss (nats per code) and code_accuracy."""
        logits = self.model(batch["text"], batch["codes"])
        accuracy = (logits.detach().argmax(-1) == batch["codes"]).float().mean()
        return {"loss": code_loss(logits, batch["codes"]), "code_accuracy": accuracy}


def code_loss(logits: Tensor, codes: Tensor) -> Tensor:
    """logits float32 [B, I, V], codes int64 [B, I] -> mean cross-entropy []."""
    return F.cross_entropy(logits.flatten(0, 1), codes.flatten())
