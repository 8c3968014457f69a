"""Captions of samples -> token ids: what the tasks that read text share.

Every draw comes from (seed, epoch, sample id, purpose): a sample looks the same in whatever batch it stands.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from data_pipeline.errors import BadSample
from data_pipeline.schema import Sample
from data_pipeline.stream.order import sample_generator

if TYPE_CHECKING:
    from data_pipeline.vocabulary import Vocabulary


def caption_of(sample: Sample, seed: int) -> str:
    """The caption that this sample shows in this epoch."""
    return choose(sample, sample_generator(seed, sample.epoch, sample.id, "caption"))


def noise_key(sample: Sample, seed: int) -> int:
    """What a model's dropout knows of this sample in this epoch, 63 bits (see `models.noise`)."""
    return int(sample_generator(seed, sample.epoch, sample.id, "dropout").integers(1 << 63))


def choose(sample: Sample, generator: np.random.Generator) -> str:
    """One of the sample's captions; raises BadSample naming the key when there is none."""
    captions = captions_of(sample)
    return captions[int(generator.integers(len(captions)))]


def captions_of(sample: Sample) -> list[str]:
    """The sample's captions, blank ones left out; raises BadSample naming the key when none is left."""
    captions = [caption for caption in sample.captions if caption.strip()]
    if not captions:
        raise BadSample(f"sample {sample.key!r} has no caption; text models need one, rebuild with a caption per image")
    return captions


def join(first: list[int], second: list[int], vocabulary: Vocabulary) -> tuple[np.ndarray, np.ndarray]:
    """[CLS] first [SEP], and second [SEP] where there is one -> tokens, types: int64 [length]."""
    head = [vocabulary.cls, *first, vocabulary.sep]
    tail = [*second, vocabulary.sep] if second else []
    return np.array(head + tail, np.int64), np.array([0] * len(head) + [1] * len(tail), np.int64)


def trim(first: list[int], second: list[int], room: int, generator: np.random.Generator) -> tuple[list[int], list[int]]:
    """Take pieces off the longer segment, front or back by chance, until both together have `room`."""
    first, second = list(first), list(second)
    while len(first) + len(second) > room:
        longer = first if len(first) > len(second) else second
        del longer[0 if generator.random() < 0.5 else -1]
    return first, second


def text_ids(caption: str, vocabulary: Vocabulary, text_tokens: int) -> np.ndarray:
    """Caption -> int64 [T]: truncated to T tokens, padded to T on the right, no special tokens."""
    ids = vocabulary.encode(caption)[:text_tokens]
    return np.array(ids + [vocabulary.pad] * (text_tokens - len(ids)), np.int64)
