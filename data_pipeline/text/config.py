"""Configuration of a text tokenizer that is trained here. Imports neither torch nor SentencePiece."""

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

from data_pipeline.settings import Location, Settings

SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
"""Special pieces of the SentencePiece vocabularies trained here; their ids are 0 to 4 in this order."""


class VocabConfig(Settings):
    """Captions of a dataset -> SentencePiece vocabulary, written to `output`/vocab.model."""

    dataset: Location
    output: Location
    size: int = Field(8192, gt=len(SPECIALS))
    kind: Literal["unigram", "bpe"] = "unigram"
    character_coverage: PositiveFloat = Field(0.9995, le=1.0)
    max_captions: PositiveInt = 1_000_000
