"""What flows: sources yield Pairs, Links or Drops, stages turn them into Pairs or Drops, a stream yields Samples."""

import dataclasses
from typing import Any

import numpy as np

SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
"""The first ids of every vocabulary."""


@dataclasses.dataclass(frozen=True, slots=True)
class Pair:
    """One row of a source: an encoded image and its captions, in the order in which they were given."""

    key: str
    image: bytes
    captions: tuple[str, ...]
    meta: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True)
class Link:
    """One row whose image has to be fetched first. sha256, md5: what its bytes must have, in hex; empty: anything."""

    key: str
    url: str
    captions: tuple[str, ...]
    meta: dict[str, Any] = dataclasses.field(default_factory=dict)
    sha256: str = ""
    md5: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Drop:
    """A row that does not become a sample. `reason` is counted (one word with underscores), `detail` is for people."""

    key: str
    reason: str
    detail: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """One sample of a dataset, read for one position.

    id: 0 <= id < samples of the dataset, in the order of its shards.
    epoch, position: where in the stream it was asked for; 0 and -1 when it was fetched by its id.
    image: the encoded file as it stands in the shard.
    codes: uint16 [codes per image], [crops, codes per image] where images were encoded in several crops, or None
    where the stream was opened without codes.
    """

    id: int
    epoch: int
    position: int
    key: str
    image: bytes
    captions: tuple[str, ...]
    meta: dict[str, Any]
    codes: np.ndarray | None = None
