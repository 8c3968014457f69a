"""Record types: sources yield Pairs, Links or Drops, stages turn them into Pairs or Drops, a stream yields Samples."""

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True, slots=True)
class Pair:
    """One row of a source: an encoded image and its captions, in the given order."""

    key: str
    image: bytes
    captions: tuple[str, ...]
    meta: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True)
class Link:
    """One row whose image must be fetched first. sha256, md5: expected digests of its bytes, in hex; empty for any."""

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
    epoch, position: where in the stream it was read; 0 and -1 when it was fetched by its id.
    The rest is what the sample holds; a task raises BadSample when it needs a part that is missing.
    image: the encoded file as stored in the shard, or None. texts: its captions or passages. label: its class, or None.
    codes: uint16 [codes per image], [crops, codes per image] if images were encoded in several crops, or None if the
    stream was opened without codes. meta: its other attributes.
    """

    id: int
    epoch: int
    position: int
    key: str
    _: dataclasses.KW_ONLY
    image: bytes | None = None
    texts: tuple[str, ...] = ()
    label: int | None = None
    codes: np.ndarray | None = None
    meta: dict[str, Any] = dataclasses.field(default_factory=dict)
