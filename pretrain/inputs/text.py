"""Captions -> tensors for contrastive training, masked words and replaced words.

Every draw comes from (seed, epoch, sample id, purpose): a sample looks the same in whatever batch it stands.
Letters: b batch, S the model's context, M masked positions, the most that a full context gets.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from data_pipeline.errors import BadSample, ConfigError
from data_pipeline.schema import Sample
from data_pipeline.stream.order import sample_generator
from pretrain.inputs.pixels import crop_generator, pixels

if TYPE_CHECKING:
    from data_pipeline.stream.mixture import Source
    from data_pipeline.vocabulary import Vocabulary
    from pretrain.config import RunConfig

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of RGB in [0, 1], as in the authors' preprocessing
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
SPECIALS = 5  # [PAD] [UNK] [CLS] [SEP] [MASK] are the first ids
SHORT_PAIRS = 0.1  # share of sentence pairs that are cut to a random length below the context (BERT)

# ---------------------------------------------------------------------------------------------- contrastive


class ContrastiveInputs:
    """Samples -> {"pixels": float32 [b, 3, H, W], "tokens": int64 [b, S], "eot": int64 [b], place of [SEP]}."""

    def __init__(self, config: RunConfig, stream: Source, vocabulary: Vocabulary | None) -> None:
        assert config.model.kind == "clip" and vocabulary is not None
        check_vocabulary(vocabulary, config.model.text.vocab_size)
        self.image_size = config.model.vision.image_size
        self.context = config.model.text.context
        self.data = config.data
        self.seed = config.seed
        self.vocabulary = vocabulary

    def __call__(self, samples: list[Sample]) -> dict[str, Tensor]:
        """The batch of these samples, in their order."""
        size, data = self.image_size, self.data
        images = [pixels(s, size, data.crop_scale, data.flip, crop_generator(self.seed, s)) for s in samples]
        texts = [self.text(caption_of(sample, self.seed)) for sample in samples]
        return {
            "pixels": normalise(np.stack(images)),
            "tokens": torch.from_numpy(np.stack([tokens for tokens, _ in texts])),
            "eot": torch.tensor([eot for _, eot in texts]),
        }

    def text(self, caption: str) -> tuple[np.ndarray, int]:
        """-> tokens int64 [S]: [CLS] pieces [SEP] [PAD]..., truncated to the context; and the place of [SEP]."""
        pieces = self.vocabulary.encode(caption)[: self.context - 2]
        return pad([self.vocabulary.cls, *pieces, self.vocabulary.sep], self.context), len(pieces) + 1


def normalise(images: np.ndarray) -> Tensor:
    """uint8 [b, H, W, 3] -> float32 [b, 3, H, W], (x / 255 - mean) / deviation per channel."""
    scaled = torch.from_numpy(images).permute(0, 3, 1, 2).float().div_(255)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return scaled.sub_(mean).div_(std).contiguous()


# --------------------------------------------------------------------------------------------- masked words


class MlmInputs:
    """Samples -> tokens, types int64 [b, S]; attention bool [b, S]; positions, labels int64 [b, M];
    label_weights float32 [b, M], 0 where a slot is empty; is_random int64 [b], 0 where the second segment follows.
    """

    def __init__(self, config: RunConfig, stream: Source, vocabulary: Vocabulary | None) -> None:
        assert config.model.kind == "bert" and config.objective.kind == "mlm" and vocabulary is not None
        check_vocabulary(vocabulary, config.model.vocab_size)
        self.context = config.model.context
        self.rate = config.objective.mask_rate
        self.pairs = config.objective.nsp
        self.seed = config.seed
        self.stream = stream
        self.vocabulary = vocabulary

    def __call__(self, samples: list[Sample]) -> dict[str, Tensor]:
        """The batch of these samples, in their order."""
        return stack([self.one(sample) for sample in samples])

    def one(self, sample: Sample) -> dict[str, Any]:
        """The row of one sample."""
        first, second, is_random = self.segments(sample)
        tokens, types = join(first, second, self.vocabulary)
        generator = sample_generator(self.seed, sample.epoch, sample.id, "mask")
        positions = masked_positions(tokens, self.rate, self.context, generator)
        masked = replace_bert(tokens, positions, self.vocabulary, generator)
        return {**row(tokens, masked, types, positions, self.context, self.rate), "is_random": np.int64(is_random)}

    def segments(self, sample: Sample) -> tuple[list[int], list[int], bool]:
        """-> pieces of the first and second segment, and whether the second is another sample's."""
        if not self.pairs:
            return self.vocabulary.encode(caption_of(sample, self.seed))[: self.context - 2], [], False
        generator = sample_generator(self.seed, sample.epoch, sample.id, "segments")
        first, second = self.neighbours(sample, generator)
        is_random = bool(generator.random() < 0.5) and self.stream.samples > 1
        if is_random:
            step = 1 + int(generator.integers(self.stream.samples - 1))  # never 0: any sample but this one
            other = self.stream.fetch((sample.id + step) % self.stream.samples)
            second = self.vocabulary.encode(choose(other, generator))
        room = self.context - 3
        if generator.random() < SHORT_PAIRS:
            room = int(generator.integers(2, room + 1))
        return *trim(first, second, room, generator), is_random

    def neighbours(self, sample: Sample, generator: np.random.Generator) -> tuple[list[int], list[int]]:
        """Two captions of the sample in drawn order, or its only caption cut in two at a drawn place."""
        if len(sample.captions) > 1:
            one, two = generator.permutation(len(sample.captions))[:2]
            return self.vocabulary.encode(sample.captions[one]), self.vocabulary.encode(sample.captions[two])
        pieces = self.vocabulary.encode(choose(sample, generator))
        cut = int(generator.integers(1, len(pieces))) if len(pieces) > 1 else len(pieces)
        return pieces[:cut], pieces[cut:]


class RtdInputs:
    """As MlmInputs without `is_random`, and uniforms float32 [b, M] in [0, 1) to draw the generator's words with."""

    def __init__(self, config: RunConfig, stream: Source, vocabulary: Vocabulary | None) -> None:
        assert config.model.kind == "electra" and config.objective.kind == "rtd" and vocabulary is not None
        check_vocabulary(vocabulary, config.model.vocab_size)
        self.context = config.model.context
        self.rate = config.objective.mask_rate
        self.seed = config.seed
        self.vocabulary = vocabulary

    def __call__(self, samples: list[Sample]) -> dict[str, Tensor]:
        """The batch of these samples, in their order."""
        return stack([self.one(sample) for sample in samples])

    def one(self, sample: Sample) -> dict[str, Any]:
        """The row of one sample."""
        pieces = self.vocabulary.encode(caption_of(sample, self.seed))[: self.context - 2]
        tokens, types = join(pieces, [], self.vocabulary)
        generator = sample_generator(self.seed, sample.epoch, sample.id, "mask")
        positions = masked_positions(tokens, self.rate, self.context, generator)
        masked = replace_electra(tokens, positions, self.vocabulary, generator)
        uniforms = sample_generator(self.seed, sample.epoch, sample.id, "replace").random(
            mask_slots(self.rate, self.context), dtype=np.float32
        )
        return {**row(tokens, masked, types, positions, self.context, self.rate), "uniforms": uniforms}


# ------------------------------------------------------------------------------------------------- captions


def caption_of(sample: Sample, seed: int) -> str:
    """The caption that this sample shows in this epoch."""
    return choose(sample, sample_generator(seed, sample.epoch, sample.id, "caption"))


def choose(sample: Sample, generator: np.random.Generator) -> str:
    """One of the sample's captions; raises BadSample naming the key when there is none."""
    captions = [caption for caption in sample.captions if caption.strip()]
    if not captions:
        raise BadSample(f"sample {sample.key!r} has no caption; text models need one, rebuild with a caption per image")
    return captions[int(generator.integers(len(captions)))]


def check_vocabulary(vocabulary: Vocabulary, vocab_size: int) -> None:
    """Raise ConfigError when the vocabulary has ids that the model has no embedding for."""
    if vocabulary.size > vocab_size:
        raise ConfigError(
            f"the vocabulary has {vocabulary.size} pieces, more than the model's vocab_size={vocab_size}; "
            f"set it to {vocabulary.size}"
        )


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


# -------------------------------------------------------------------------------------------------- masking


def mask_slots(rate: float, context: int) -> int:
    """M: how many words a full context masks."""
    return max(1, round(rate * context))


def masked_positions(tokens: np.ndarray, rate: float, context: int, generator: np.random.Generator) -> np.ndarray:
    """Draw max(1, round(rate * length)) positions, never of [CLS], [SEP] or [PAD] -> int64 [n], ascending.

    tokens: int64 [length] without padding; the length counts [CLS] and [SEP]. Without a word there is no position.
    """
    candidates = np.flatnonzero((tokens >= SPECIALS) | (tokens == 1))  # [UNK] stands for a word
    wanted = min(mask_slots(rate, context), max(1, round(rate * len(tokens))))
    return np.sort(generator.permutation(candidates)[:wanted])


def replace_bert(
    tokens: np.ndarray, positions: np.ndarray, vocabulary: Vocabulary, generator: np.random.Generator
) -> np.ndarray:
    """80 % [MASK], 10 % unchanged, 10 % a random piece (no special one), each piece by itself -> int64 [length]."""
    chance = generator.random(len(positions))
    pieces = generator.integers(SPECIALS, vocabulary.size, len(positions))
    masked = tokens.copy()
    masked[positions] = np.where(chance < 0.8, vocabulary.mask, np.where(chance < 0.9, tokens[positions], pieces))
    return masked


def replace_electra(
    tokens: np.ndarray, positions: np.ndarray, vocabulary: Vocabulary, generator: np.random.Generator
) -> np.ndarray:
    """85 % [MASK], 15 % unchanged -> int64 [length]."""
    masked = tokens.copy()
    masked[positions] = np.where(generator.random(len(positions)) < 0.85, vocabulary.mask, tokens[positions])
    return masked


# ----------------------------------------------------------------------------------------------------- rows


def row(
    tokens: np.ndarray, masked: np.ndarray, types: np.ndarray, positions: np.ndarray, context: int, rate: float
) -> dict[str, np.ndarray]:
    """tokens, masked, types: int64 [length], positions: int64 [n] -> one padded row of the batch."""
    slots = mask_slots(rate, context)
    return {
        "tokens": pad(masked, context),
        "types": pad(types, context),
        "attention": np.arange(context) < len(tokens),
        "positions": pad(positions, slots),
        "labels": pad(tokens[positions], slots),
        "label_weights": (np.arange(slots) < len(positions)).astype(np.float32),
    }


def pad(values: list[int] | np.ndarray, length: int) -> np.ndarray:
    """int64 [n] -> int64 [length], zeros ([PAD]) behind."""
    padded = np.zeros(length, np.int64)
    padded[: len(values)] = values
    return padded


def stack(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Rows -> the batch: a new first dimension for every key."""
    return {key: torch.from_numpy(np.stack([one[key] for one in rows])) for key in rows[0]}
