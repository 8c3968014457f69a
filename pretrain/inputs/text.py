"""Captions of samples -> token ids, shared by the tasks that read text.

All random numbers come from (seed, epoch, sample id, purpose), so a sample is the same in any batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from data_pipeline.errors import BadSample
from data_pipeline.schema import Sample
from data_pipeline.stream.order import sample_generator

if TYPE_CHECKING:
    from data_pipeline.text.tokenizer import TextTokenizer


def caption_of(sample: Sample, seed: int) -> str:
    """Return the caption drawn for this sample in this epoch."""
    return choose(sample, sample_generator(seed, sample.epoch, sample.id, "caption"))


def noise_key(sample: Sample, seed: int) -> int:
    """Return the key of this sample's dropout noise in this epoch, 63 bits (see `models.noise`)."""
    return int(sample_generator(seed, sample.epoch, sample.id, "dropout").integers(1 << 63))


def choose(sample: Sample, generator: np.random.Generator) -> str:
    """Draw one of the sample's captions. Raises BadSample naming the key when there is none."""
    captions = captions_of(sample)
    return captions[int(generator.integers(len(captions)))]


def captions_of(sample: Sample) -> list[str]:
    """Return the sample's non-blank captions. Raises BadSample naming the key when there is none."""
    captions = [caption for caption in sample.texts if caption.strip()]
    if not captions:
        raise BadSample(f"sample {sample.key!r} has no caption; text models need one, rebuild with a caption per image")
    return captions


def join(first: list[int], second: list[int], tokenizer: TextTokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Join as [CLS] first [SEP], then second [SEP] if there is one -> tokens, types: int64 [length]."""
    head = [tokenizer.cls, *first, tokenizer.sep]
    tail = [*second, tokenizer.sep] if second else []
    return np.array(head + tail, np.int64), np.array([0] * len(head) + [1] * len(tail), np.int64)


def trim(first: list[int], second: list[int], room: int, generator: np.random.Generator) -> tuple[list[int], list[int]]:
    """Remove pieces from the longer segment, at a random end, until both together have at most `room`."""
    first, second = list(first), list(second)
    while len(first) + len(second) > room:
        longer = first if len(first) > len(second) else second
        del longer[0 if generator.random() < 0.5 else -1]
    return first, second


def text_ids(caption: str, tokenizer: TextTokenizer, text_tokens: int) -> np.ndarray:
    """Caption -> int64 [T]: truncated to T tokens, padded to T on the right, without [CLS] and [SEP]."""
    ids = tokenizer.encode(caption)[:text_tokens]
    return np.array(ids + [tokenizer.pad] * (text_tokens - len(ids)), np.int64)
