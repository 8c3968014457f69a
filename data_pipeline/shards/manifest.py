"""Dataset metadata: an index beside each tar, and one manifest whose sha256 is the dataset's fingerprint.

`NAME.tar.idx`, little endian: magic "TESSIDX\\0", version u32, reserved u32, tar bytes u64, xxh3-64 of the tar u64,
samples u64, then offsets u32 [samples + 1] in blocks of 512 bytes: sample i is blocks [offset i, offset i + 1).
Version 2 appends sums u32 [samples]: the lower half of the xxh3-64 of each sample's blocks. Where another program uses
that name (Energon writes its own NAME.tar.idx), ours is NAME.tar.tessera.idx.

A dataset that grew keeps its older manifests as manifest-FINGERPRINT.json (the first 12 hex digits). Each lists the
first shards of the next one, so DATASET@FINGERPRINT always names the same samples.
"""

import hashlib
import io
import json
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired

import numpy as np
import xxhash
from pydantic import with_config
from typing_extensions import TypedDict

from data_pipeline import gate
from data_pipeline.errors import Conflict, DataError
from data_pipeline.foreign import foreign_model
from data_pipeline.shards.tar import BLOCK, NEWEST, checksum, samples_of
from data_pipeline.storage import Storage, open_storage

if TYPE_CHECKING:
    import pyarrow as pa

MANIFEST = "manifest.json"
STATS = "stats.json"
VERSION = 1
"""Manifest version of a build: the lowest rules of `group_samples` and `read_sample` that its samples need.

A dataset keeps the version that it was built or indexed with. Tars made elsewhere get the lowest version that reads
them as the newest one does: 2 for links, litter and dots in names, 3 for samples without an image.
"""

_DAMAGED = "damaged; download or build the dataset again"
_AT_VERSION = re.compile(r"(.+)@([0-9a-f]{12,64})")
_KEPT = re.compile(r"manifest-([0-9a-f]{12})\.json")
_MAGIC = b"TESSIDX\0"
_NAMES = ("{}.idx", "{}.tessera.idx")
_SHARD = '\n  {\n   "bytes": %d,\n   "digest": %s,\n   "n": %d,\n   "name": %s\n  }'
_HEX = {"sha256": "^([0-9a-f]{64})?$", "phash": "^[0-9a-f]{16}$", "colours": "^[0-9a-f]{256}$"}
"""Patterns of table columns. An empty sha256 means that the image was never fetched."""
_HEADER = struct.Struct("<8sIIQQQ")


@dataclass(frozen=True)
class Index:
    """Sample locations in one tar. offsets: uint32 [n + 1], in blocks; sums: uint32 [n], None before version 2."""

    tar_bytes: int
    xxh3: int
    offsets: np.ndarray
    sums: np.ndarray | None = None

    @property
    def samples(self) -> int:
        """Number of samples."""
        return len(self.offsets) - 1


@dataclass(frozen=True)
class Shard:
    """One shard in the manifest. digest: sha256 of the tar."""

    name: gate.TarName
    n: gate.Count
    bytes: gate.Count
    digest: gate.Sha256
    __pydantic_config__ = gate.CLOSED


@with_config(gate.OPEN)
class _ManifestFile(TypedDict):
    """Contents of manifest.json."""

    version: int
    samples: gate.Count
    shards: list[Shard]


@dataclass(frozen=True)
class Manifest:
    """All shards in order. Image codes are not part of it: their files are named by tokenizer."""

    shards: tuple[Shard, ...]
    version: int = VERSION

    @cached_property
    def samples(self) -> int:
        """Number of samples in all shards."""
        return sum(shard.n for shard in self.shards)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the canonical JSON."""
        return hashlib.sha256(self.to_json()).hexdigest()

    def to_json(self) -> bytes:
        """Return the same bytes as `canonical_json`, five times as fast: a manifest may have 100,000 shards."""
        quote = json.JSONEncoder(ensure_ascii=False).encode
        shards = ",".join(_SHARD % (s.bytes, quote(s.digest), s.n, quote(s.name)) for s in self.shards)
        listed = f"[{shards}\n ]" if shards else "[]"
        return f'{{\n "samples": {self.samples},\n "shards": {listed},\n "version": {self.version}\n}}\n'.encode()


Rejected = dict[str, gate.Count]
"""Reason -> number of rows."""

ShardStats = TypedDict(
    "ShardStats",
    {
        "name": gate.TarName,
        "in": gate.Count,
        "out": gate.Count,
        "rejected": Rejected,
        "bytes": gate.Count,
        "digest": gate.Sha256,
        "retried": NotRequired[Rejected],
    },
)
"""Contents of NNNNN_stats.json: the row counts of one shard."""
Totals = TypedDict("Totals", {"in": gate.Count, "out": gate.Count, "rejected": Rejected})
"""Contents of stats.json: the row counts of a dataset."""


def canonical_json(tree: Any) -> bytes:
    """Serialize so that equal contents give equal bytes: sorted keys, UTF-8, a trailing newline."""
    return (json.dumps(tree, sort_keys=True, ensure_ascii=False, indent=1) + "\n").encode()


def open_dataset(address: str | Path) -> tuple[Storage, Manifest]:
    """Open DATASET, or DATASET@FINGERPRINT for an older version of one that grew -> its storage and manifest.

    Raises DataError for a missing, foreign or damaged manifest, and for an unknown version.
    """
    match = _AT_VERSION.fullmatch(str(address))
    if match is None or Path(address).is_dir():
        storage = open_storage(address)
        return storage, read_manifest(storage)
    storage = open_storage(match[1])
    return storage, read_version(storage, match[2])


def read_version(storage: Storage, fingerprint: str) -> Manifest:
    """Read the manifest whose fingerprint begins with `fingerprint` (12 digits or more), the newest or an older one.

    Raises DataError when there is no such version.
    """
    newest = read_manifest(storage)
    if newest.fingerprint.startswith(fingerprint):
        return newest
    name = older_manifest(fingerprint)
    found = read_manifest(storage, name) if storage.exists(name) else None
    if found is None or not found.fingerprint.startswith(fingerprint):
        listed = ", ".join([newest.fingerprint[:12], *older_versions(storage)])
        raise DataError(f"{storage.root}: no version {fingerprint}; available are {listed}")
    return found


def older_manifest(fingerprint: str) -> str:
    """Return the file name of an older version's manifest: manifest-FINGERPRINT.json."""
    return f"manifest-{fingerprint[:12]}.json"


def older_versions(storage: Storage) -> list[str]:
    """Return the first 12 digits of each fingerprint that a dataset had before it grew."""
    return [match[1] for name in storage.list() if (match := _KEPT.fullmatch(name))]


def read_manifest(storage: Storage, name: str = MANIFEST) -> Manifest:
    """Read the newest manifest, or the one called `name`. Raises DataError when it is missing, foreign or damaged."""
    if not storage.exists(name):
        raise DataError(
            f"{storage.root}: no {name}: not a finished dataset; run `tessera data build` to the end, "
            f"or `tessera data index` for tars made elsewhere{foreign_model(storage.root)}"
        )
    return parse_manifest(storage.get(name), f"{storage.root}/{name}")


def parse_manifest(data: bytes, where: str) -> Manifest:
    """Parse the bytes of a manifest. Raises DataError when they are not a manifest or inconsistent."""
    tree: _ManifestFile = gate.parse(_ManifestFile, data, where, "not a manifest; build the dataset again")
    manifest = Manifest(tuple(tree["shards"]), tree["version"])
    if not VERSION <= manifest.version <= NEWEST:
        raise DataError(
            f"{where}: version {manifest.version}, supported are {VERSION} to {NEWEST}; use the tessera that built it"
        )
    if tree["samples"] != manifest.samples:
        raise DataError(f"{where}: samples={tree['samples']}, but its shards have {manifest.samples}; {_DAMAGED}")
    for shard in manifest.shards:
        if shard.n * BLOCK > shard.bytes:
            raise DataError(f"{where}: {shard.name} has n={shard.n} samples in bytes={shard.bytes}; {_DAMAGED}")
    if len({shard.name for shard in manifest.shards}) != len(manifest.shards):
        raise DataError(f"{where}: two shards have one name; build it again")
    return manifest


def side_name(shard_name: str, suffix: str) -> str:
    """00000.tar, _stats.json -> 00000_stats.json"""
    return shard_name.removesuffix(".tar") + suffix


def read_shard_stats(storage: Storage, shard_name: str) -> ShardStats:
    """Read the row counts of a shard. Raises DataError when they are missing, malformed, or another shard's."""
    name = side_name(shard_name, "_stats.json")
    where = f"{storage.root}/{name}"
    stats: ShardStats = gate.parse(ShardStats, storage.get(name), where, "build the dataset again")
    if stats["name"] != shard_name:
        raise DataError(f"{where}: name={stats['name']!r} is another shard; build the dataset again")
    return stats


def read_totals(storage: Storage) -> Totals:
    """Read the row counts of a dataset. Raises DataError when they are missing or malformed."""
    totals: Totals = gate.parse(Totals, storage.get(STATS), f"{storage.root}/{STATS}", "build the dataset again")
    return totals


def read_rows(
    storage: Storage, name: str, columns: list[str] | None = None, where_there: Sequence[str] = ()
) -> "pa.Table":
    """Read columns (default: all) of NNNNN.parquet or another of our tables. Raises DataError for any other file.

    where_there: optional columns, read where the table has them.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    where = f"{storage.root}/{name}"
    try:
        file = pq.ParquetFile(io.BytesIO(storage.get(name)))
        further = [column for column in where_there if column in file.schema_arrow.names]
        table = file.read(columns and [*columns, *further])
        for column, pattern in _HEX.items():
            if (
                column in table.column_names
                and pc.any(pc.invert(pc.match_substring_regex(table[column], pattern))).as_py()
            ):
                raise DataError(f"{where}: column {column} has invalid digests; build the dataset again")
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{where}: not a valid table ({error!s:.200}); build the dataset again") from None
    if missing := set(columns or ()) - set(table.column_names):
        raise DataError(f"{where}: has no column {', '.join(sorted(missing))}; build the dataset again")
    return table


def index_tar(
    pieces: Iterable[bytes],
    where: str,
    size: int | None = None,
    version: int = VERSION,
    look: Callable[[bytes], None] | None = None,
) -> tuple[Index, str]:
    """Index a tar that arrives in pieces -> (its index, its sha256). Raises DataError when it is cut off or damaged.

    size: of the tar, if known; a member that claims more is refused at once. version: of the manifest that the index
    belongs to. look: called with the bytes of each sample.
    """
    xxh3, sha256, total = xxhash.xxh3_64(), hashlib.sha256(), 0

    def hashed() -> Iterator[bytes]:
        nonlocal total
        for piece in pieces:
            xxh3.update(piece)
            sha256.update(piece)
            total += len(piece)
            yield piece

    offsets, sums, end = list[int](), list[int](), 0
    source = hashed()
    for start, sample in samples_of(source, where, version, size):
        if look is not None:
            look(sample)
        offsets.append(start // BLOCK)
        sums.append(checksum(sample))
        end = start + len(sample)
    for _ in source:  # the digests include what follows the closing blocks
        pass
    offsets.append(end // BLOCK)
    return Index(total, xxh3.intdigest(), np.array(offsets, np.uint32), np.array(sums, np.uint32)), sha256.hexdigest()


def pack_index(index: Index) -> bytes:
    """Serialize an index as the bytes of a .idx file."""
    sums = b"" if index.sums is None else index.sums.astype("<u4").tobytes()
    head = _HEADER.pack(_MAGIC, 2 if sums else 1, 0, index.tar_bytes, index.xxh3, index.samples)
    return head + index.offsets.astype("<u4").tobytes() + sums


def unpack_index(data: bytes, where: str) -> Index:
    """Parse the bytes of a .idx file. Raises DataError when they are not an index."""
    if len(data) < _HEADER.size or not data.startswith(_MAGIC):
        raise DataError(f"{where}: not an index of shards; run `tessera data index` on its tar")
    _, version, _, tar_bytes, digest, samples = _HEADER.unpack_from(data)
    words = {1: samples + 1, 2: 2 * samples + 1}.get(version, -1)
    if len(data) != _HEADER.size + 4 * words:
        raise DataError(f"{where}: version {version}, {samples} samples, {len(data)} bytes; damaged, index it again")
    values = np.frombuffer(data, "<u4", offset=_HEADER.size)
    offsets = values[: samples + 1]
    if not (offsets[1:] > offsets[:-1]).all() or int(offsets[-1]) * BLOCK > tar_bytes:
        raise DataError(f"{where}: its samples are not in order within {tar_bytes} bytes; damaged, index it again")
    return Index(tar_bytes, digest, offsets, values[samples + 1 :] if version > 1 else None)


def read_index(storage: Storage, shard: Shard) -> Index:
    """Read the index of a shard and check it against the manifest. Raises DataError on a mismatch."""
    ours, other = (pattern.format(shard.name) for pattern in _NAMES)
    data = storage.get(ours)
    if not data.startswith(_MAGIC) and storage.exists(other):
        ours, data = other, storage.get(other)
    index = unpack_index(data, f"{storage.root}/{ours}")
    if (index.tar_bytes, index.samples) != (shard.bytes, shard.n):
        raise DataError(
            f"{storage.root}/{ours}: {index.samples} samples in {index.tar_bytes} bytes, the manifest has {shard.n} "
            f"in {shard.bytes}; the index belongs to another tar, download both again"
        )
    return index


def publish_index(storage: Storage, shard_name: str, index: Index) -> None:
    """Write the index of a shard beside it, under a name that is free or ours. Raises Conflict when ours differs."""
    ours, other = (pattern.format(shard_name) for pattern in _NAMES)
    data = pack_index(index)
    if not storage.put_if_absent(ours, data):
        publish(storage, ours if storage.get(ours).startswith(_MAGIC) else other, data)


def publish(storage: Storage, name: str, data: bytes) -> None:
    """Create `name`. Raises Conflict when it exists with other contents."""
    if not storage.put_if_absent(name, data) and storage.get(name) != data:
        raise Conflict(
            f"{storage.root}/{name}: exists with other contents; nothing was overwritten, use a new output folder"
        )
