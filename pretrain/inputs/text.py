"""Captions -> tensors for contrastive training, masked words and replaced words.

Every draw comes from (seed, epoch, sample id, purpose): a sample looks the same in whatever batch it stands.
Letters: b batch, S the model's context, M masked positions, the most that a full context gets.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from data_pipeline.errors import BadSample, ConfigError
from data_pipeline.schema import Sample
from data_pipeline.stream.order import sample_generator
from pretrain.inputs.masking import draw_positions, mask_slots, replace_bert, replace_electra
from pretrain.inputs.packing import Example, packed, pad, padded
from pretrain.inputs.pixels import crop_generator, pixels

if TYPE_CHECKING:
    from data_pipeline.stream.mixture import Source
    from data_pipeline.vocabulary import Vocabulary
    from pretrain.config import MlmNspConfig, RtdConfig, RunConfig

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of RGB in [0, 1], as in the authors' preprocessing
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
SENTENCE_END = re.compile(r"(?<=[.!?\u3002\uff01\uff1f])\s*(?=\S)")
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
        images = [
            pixels(s, size, data.crop_scale, data.flip, crop_generator(self.seed, s), data.crop_ratio) for s in samples
        ]
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
    """Samples -> the tensors of `packing.padded` with is_random, 0 where the second segment follows; or, where the
    objective packs, those of `packing.packed`.
    """

    def __init__(self, config: RunConfig, stream: Source, vocabulary: Vocabulary | None) -> None:
        assert config.model.kind == "bert" and config.objective.kind == "mlm" and vocabulary is not None
        check_vocabulary(vocabulary, config.model.vocab_size)
        self.context = config.model.context
        self.objective = config.objective
        self.pairs = config.objective.nsp
        self.seed = config.seed
        self.stream = stream
        self.vocabulary = vocabulary

    def __call__(self, samples: list[Sample]) -> dict[str, Tensor]:
        """The batch of these samples: a row each in their order, or packed."""
        return rows_of([self.one(sample) for sample in samples], self.context, self.objective)

    def one(self, sample: Sample) -> Example:
        """One masked sample."""
        first, second, is_random = self.segments(sample)
        tokens, types = join(first, second, self.vocabulary)
        generator = sample_generator(self.seed, sample.epoch, sample.id, "mask")
        rule = (self.objective.masking, self.objective.mask_rate, self.context, self.vocabulary)
        positions = draw_positions(tokens, *rule, generator)
        masked = replace_bert(tokens, positions, self.vocabulary, generator)
        return Example(tokens, masked, types, positions, noise_key(sample, self.seed), is_random=is_random)

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
        """Two captions of the sample in drawn order, or its only one cut in two at a drawn end of a sentence; where it
        has but one sentence, at a drawn piece.
        """
        captions = captions_of(sample)
        if len(captions) > 1:
            one, two = generator.permutation(len(captions))[:2]
            return self.vocabulary.encode(captions[one]), self.vocabulary.encode(captions[two])
        caption = choose(sample, generator)
        sentences = SENTENCE_END.split(caption)
        if len(sentences) > 1:
            end = int(generator.integers(1, len(sentences)))
            first, second = " ".join(sentences[:end]), " ".join(sentences[end:])
            return self.vocabulary.encode(first), self.vocabulary.encode(second)
        pieces = self.vocabulary.encode(caption)
        cut = int(generator.integers(1, len(pieces))) if len(pieces) > 1 else len(pieces)
        return pieces[:cut], pieces[cut:]


class RtdInputs:
    """As MlmInputs without `is_random`, and uniforms float32 [b, M] in [0, 1) to draw the generator's words with."""

    def __init__(self, config: RunConfig, stream: Source, vocabulary: Vocabulary | None) -> None:
        assert config.model.kind == "electra" and config.objective.kind == "rtd" and vocabulary is not None
        check_vocabulary(vocabulary, config.model.vocab_size)
        self.context = config.model.context
        self.objective = config.objective
        self.seed = config.seed
        self.vocabulary = vocabulary

    def __call__(self, samples: list[Sample]) -> dict[str, Tensor]:
        """The batch of these samples: a row each in their order, or packed."""
        return rows_of([self.one(sample) for sample in samples], self.context, self.objective)

    def one(self, sample: Sample) -> Example:
        """One masked sample."""
        pieces = self.vocabulary.encode(caption_of(sample, self.seed))[: self.context - 2]
        tokens, types = join(pieces, [], self.vocabulary)
        generator = sample_generator(self.seed, sample.epoch, sample.id, "mask")
        rule = (self.objective.masking, self.objective.mask_rate, self.context, self.vocabulary)
        positions = draw_positions(tokens, *rule, generator)
        masked = replace_electra(tokens, positions, self.vocabulary, generator)
        uniforms = sample_generator(self.seed, sample.epoch, sample.id, "replace").random(
            mask_slots(self.objective.mask_rate, self.context), dtype=np.float32
        )
        return Example(tokens, masked, types, positions, noise_key(sample, self.seed), uniforms=uniforms)


def rows_of(examples: list[Example], context: int, objective: MlmNspConfig | RtdConfig) -> dict[str, Tensor]:
    """A sample a row, or as few rows as they fit in."""
    return packed(examples, context) if objective.packing else padded(examples, context, objective.mask_rate)


# ------------------------------------------------------------------------------------------------- captions


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
