"""Captions and image codes -> tensors, for the text-to-image GPT. Letters: b batch, T text tokens, I image tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from data_pipeline.errors import DataError
from data_pipeline.schema import Sample
from data_pipeline.stream.order import sample_generator
from pretrain.inputs.text import caption_of, noise_key

if TYPE_CHECKING:
    from data_pipeline.stream.mixture import Source
    from data_pipeline.vocabulary import Vocabulary
    from pretrain.config import RunConfig


class AutoregressiveInputs:
    """Samples -> {"text": int64 [b, T], "codes": int64 [b, I], "noise": int64 [b, 1]}; one caption each, drawn by the
    sample, as the key of its dropout is.
    """

    def __init__(self, config: RunConfig, stream: Source, vocabulary: Vocabulary | None) -> None:
        assert config.model.kind == "gpt" and config.objective.kind == "autoregressive" and vocabulary is not None
        self.model = config.model
        self.caption_drop = config.objective.caption_drop
        self.vocabulary = vocabulary
        self.seed = config.seed

    def __call__(self, samples: list[Sample]) -> dict[str, Tensor]:
        """The batch of these samples, in their order; raises DataError naming the key of one that does not fit."""
        text = np.stack([self._text(sample) for sample in samples])
        codes = np.stack([self._codes(sample) for sample in samples])
        noise = torch.tensor([[noise_key(sample, self.seed)] for sample in samples])
        return {"text": torch.from_numpy(text), "codes": torch.from_numpy(codes), "noise": noise}

    def _text(self, sample: Sample) -> np.ndarray:
        """-> int64 [T]; all padding with probability `caption_drop`."""
        caption = caption_of(sample, self.seed)
        dropped = sample_generator(self.seed, sample.epoch, sample.id, "caption_drop").random() < self.caption_drop
        return text_ids("" if dropped else caption, self.vocabulary, self.model.text_tokens)

    def _codes(self, sample: Sample) -> np.ndarray:
        """-> int64 [I]; of several crops the one that the sample draws."""
        if sample.codes is None:
            raise DataError(f"sample {sample.key!r} has no image codes; run `tessera data encode` on the dataset")
        codes = np.asarray(sample.codes).astype(np.int64)
        if codes.ndim == 2:
            codes = codes[sample_generator(self.seed, sample.epoch, sample.id, "crop").integers(len(codes))]
        if len(codes) != self.model.image_tokens:
            raise DataError(
                f"sample {sample.key!r} has {len(codes)} codes, model.image_tokens={self.model.image_tokens}; "
                f"set it to {len(codes)} or encode with another tokenizer"
            )
        if codes.max() >= self.model.image_vocab:
            raise DataError(
                f"sample {sample.key!r} has code {codes.max()}, beyond model.image_vocab={self.model.image_vocab}; "
                "set it to the codebook size of the tokenizer"
            )
        return codes


def text_ids(caption: str, vocabulary: Vocabulary, text_tokens: int) -> np.ndarray:
    """Caption -> int64 [T]: truncated to T tokens, padded to T on the right, no special tokens."""
    ids = vocabulary.encode(caption)[:text_tokens]
    return np.array(ids + [vocabulary.pad] * (text_tokens - len(ids)), np.int64)
