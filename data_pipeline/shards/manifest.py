"""What a dataset says about itself: an index beside each tar, and one manifest whose hash is the dataset's name.

`NAME.tar.idx`, little endian: magic "TESSIDX\\0", version u32, reserved u32, tar bytes u64, xxh3-64 of the tar u64,
samples u64, then samples + 1 offsets u32 in blocks of 512 bytes: sample i is blocks [offset i, offset i + 1).
"""

import hashlib
import json
import struct
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.storage import Storage

MANIFEST = "manifest.json"
STATS = "stats.json"
VERSION = 1

_MAGIC = b"TESSIDX\0"
_HEADER = struct.Struct("<8sIIQQQ")


@dataclass(frozen=True)
class Index:
    """Where the samples of one tar lie. offsets: uint32 [n + 1], in blocks."""

    tar_bytes: int
    xxh3: int
    offsets: np.ndarray

    @property
    def samples(self) -> int:
        """Number of samples."""
        return len(self.offsets) - 1


@dataclass(frozen=True)
class Shard:
    """One line of the manifest; digest: sha256 of the tar."""

    name: str
    n: int
    bytes: int
    digest: str


@dataclass(frozen=True)
class Manifest:
    """All shards in order. Codes are not part of it: they are named by their tokenizer."""

    shards: tuple[Shard, ...]
    version: int = VERSION

    @property
    def samples(self) -> int:
        """Number of samples of all shards."""
        return sum(shard.n for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        """sha256 of the canonical JSON."""
        return hashlib.sha256(self.to_json()).hexdigest()

    def to_json(self) -> bytes:
        """Canonical bytes."""
        tree = {"version": self.version, "samples": self.samples, "shards": [asdict(shard) for shard in self.shards]}
        return canonical_json(tree)


def canonical_json(tree: Any) -> bytes:
    """The same bytes for the same contents: sorted keys, UTF-8, a newline at the end."""
    return (json.dumps(tree, sort_keys=True, ensure_ascii=False, indent=1) + "\n").encode()


def read_manifest(storage: Storage) -> Manifest:
    """Raises DataError for a missing, foreign or damaged manifest."""
    if not storage.exists(MANIFEST):
        raise DataError(
            f"{storage.root}: no {MANIFEST}, so no finished dataset; run `tessera data build` to the end, "
            "or `tessera data index` for tars made elsewhere"
        )
    where = f"{storage.root}/{MANIFEST}"
    try:
        tree = json.loads(storage.get(MANIFEST))
        manifest = Manifest(tuple(Shard(**shard) for shard in tree["shards"]), tree["version"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{where}: not a manifest ({error}); build the dataset again") from None
    if manifest.version != VERSION:
        raise DataError(f"{where}: version {manifest.version}, this program reads {VERSION}; use the one that built it")
    if tree.get("samples") != manifest.samples:
        raise DataError(f"{where}: says samples={tree.get('samples')}, its shards have {manifest.samples}; damaged")
    return manifest


def pack_index(index: Index) -> bytes:
    """Index -> the bytes of a .idx file."""
    offsets = np.ascontiguousarray(index.offsets, "<u4")
    return _HEADER.pack(_MAGIC, VERSION, 0, index.tar_bytes, index.xxh3, index.samples) + offsets.tobytes()


def unpack_index(data: bytes, where: str) -> Index:
    """The bytes of a .idx file -> Index. Raises DataError when they are something else."""
    if len(data) < _HEADER.size or not data.startswith(_MAGIC):
        raise DataError(f"{where}: not an index of shards; run `tessera data index` on its tar")
    _, version, _, tar_bytes, digest, samples = _HEADER.unpack_from(data)
    if version != VERSION or len(data) != _HEADER.size + 4 * (samples + 1):
        raise DataError(f"{where}: version {version}, {samples} samples, {len(data)} bytes; damaged, index it again")
    return Index(tar_bytes, digest, np.frombuffer(data, "<u4", offset=_HEADER.size))


def read_index(storage: Storage, shard: Shard) -> Index:
    """The index of a shard, checked against the manifest. Raises DataError on a difference."""
    name = f"{shard.name}.idx"
    index = unpack_index(storage.get(name), f"{storage.root}/{name}")
    if (index.tar_bytes, index.samples) != (shard.bytes, shard.n):
        raise DataError(
            f"{storage.root}/{name}: {index.samples} samples in {index.tar_bytes} bytes, the manifest says {shard.n} "
            f"in {shard.bytes}; the index belongs to another tar, fetch both again"
        )
    return index


def publish(storage: Storage, name: str, data: bytes) -> None:
    """Create `name`; where it exists already it must hold the same bytes, else DataError."""
    if not storage.put_if_absent(name, data) and storage.get(name) != data:
        raise DataError(
            f"{storage.root}/{name}: exists with other contents than this run makes; nothing was overwritten, "
            "use a new output folder"
        )
