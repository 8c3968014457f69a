"""Trains a SentencePiece vocabulary on the captions of a dataset.

Training reads the captions in order of sample id, on one thread, so the same dataset gives the same bytes.
"""

import io
import itertools
from collections import Counter as Tally
from collections.abc import Iterator
from pathlib import Path

import sentencepiece

from data_pipeline.errors import ConfigError, DataError
from data_pipeline.storage import open_storage
from data_pipeline.stream.reader import Stream
from data_pipeline.text.config import SPECIALS, VocabConfig
from data_pipeline.text.sentencepiece import MODEL


def train_vocabulary(config: VocabConfig, rejected: Tally[str] | None = None) -> Path:
    """Train on the captions of a dataset and create `output`/vocab.model -> its path.

    rejected: counts samples without a readable caption, by reason.
    Raises ConfigError when `size` does not suit the captions, DataError when another vocabulary exists already.
    """
    rejected = Tally() if rejected is None else rejected
    captions = list(captions_of(config.dataset, config.max_captions, rejected))
    if not captions:
        raise DataError(f"{config.dataset}: no captions to train on, {dict(rejected)}; use a dataset with captions")
    written = io.BytesIO()
    pad, unk, cls, sep, mask = SPECIALS
    try:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=iter(captions),
            model_writer=written,
            vocab_size=config.size,
            model_type=config.kind,
            character_coverage=config.character_coverage,
            num_threads=1,
            hard_vocab_limit=config.kind == "bpe",
            normalization_rule_name="nmt_nfkc",
            max_sentence_length=65536,
            input_sentence_size=0,
            shuffle_input_sentence=False,
            pad_id=0, unk_id=1, bos_id=2, eos_id=3,
            pad_piece=pad, unk_piece=unk, bos_piece=cls, eos_piece=sep, control_symbols=[mask],
            minloglevel=2,
        )  # fmt: skip
    except RuntimeError as error:
        raise ConfigError(
            f"size={config.size}, kind={config.kind!r} on {len(captions)} captions: {_reason(error)}; use another size"
        ) from None
    storage = open_storage(config.output)
    if not storage.put_if_absent(MODEL, written.getvalue()) and storage.get(MODEL) != written.getvalue():
        raise DataError(f"{config.output}/{MODEL}: another vocabulary exists, nothing was changed; use a new output")
    return Path(config.output) / MODEL


def captions_of(dataset: str | Path, at_most: int, rejected: Tally[str] | None = None) -> Iterator[str]:
    """Yield the captions of a dataset in order of sample id, up to `at_most`; `rejected`: see `Stream.readable`."""
    rejected = Tally() if rejected is None else rejected
    captions = (caption for sample in Stream(dataset, seed=0).readable(rejected) for caption in sample.texts)
    yield from itertools.islice(captions, at_most)


def _reason(error: RuntimeError) -> str:
    """Return the sentence in SentencePiece's message, without its source line."""
    return str(error).strip().splitlines()[-1].split("] ")[-1].rstrip(". ")
