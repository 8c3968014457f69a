"""The build: plan -> one task a shard -> commit -> account. A pure function of source and configuration.

1. Plan: the rows are counted, rows whose key came before are noted, and `build.json` is created, which pins what the
   shards are made from; another configuration in the same output is refused.
2. Shard k is made from rows [k * shard_size, (k + 1) * shard_size) alone, in a file aside, read back, and published
   by creating names, `NNNNN_stats.json` last: where that file stands, the shard is done.
3. When all are done: rejects.parquet, stats.json, and manifest.json last. Running again does what is missing.
"""

import hashlib
import io
import json
from collections import Counter as Tally
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import PIL
import pyarrow as pa
import pyarrow.parquet as pq
import simplejpeg
import xxhash

from data_pipeline.build.captions import clean_captions
from data_pipeline.build.images import Reject, prepare
from data_pipeline.build.sources import Row, open_source
from data_pipeline.config import BuildConfig
from data_pipeline.errors import ConfigError, DataError
from data_pipeline.schema import Drop, Pair
from data_pipeline.shards.manifest import (
    MANIFEST,
    STATS,
    Index,
    Manifest,
    Shard,
    canonical_json,
    pack_index,
    publish,
    read_manifest,
)
from data_pipeline.shards.tar import TarWriter, scan_samples
from data_pipeline.storage import Storage, open_storage
from data_pipeline.workers import Counter, ray_session, run_tasks

BUILD = "build.json"
REJECTS = "rejects.parquet"
RESERVED = ("captions", "key")

_SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("key", pa.string()),
        ("status", pa.string()),
        ("detail", pa.string()),
        ("captions", pa.list_(pa.string())),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("bytes", pa.int64()),
    ]
)
_REJECTS_SCHEMA = pa.schema(
    [("row", pa.int64()), ("key", pa.string()), ("reason", pa.string()), ("detail", pa.string())]
)


@dataclass(frozen=True)
class Plan:
    """What every task needs; duplicates: int64, sorted, the rows whose key an earlier row has."""

    config: BuildConfig
    rows: int
    duplicates: np.ndarray

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.rows // self.config.shard_size)

    def bounds(self, shard: int) -> tuple[int, int]:
        """Rows [start, stop) of a shard."""
        start = shard * self.config.shard_size
        return start, min(start + self.config.shard_size, self.rows)


def build(config: BuildConfig, progress: bool = True) -> dict[str, Any]:
    """Build, or finish building, the dataset -> its stats.json with `dataset`, `shards` and `fingerprint`.

    Raises ConfigError for a column that is not there or an output that another configuration began, DataError for a
    missing or empty source or storage that refuses.
    """
    storage = open_storage(config.output)
    plan = make_plan(config)
    _pin(storage, plan)
    if not storage.exists(MANIFEST):
        _build_shards(storage, plan, progress)
        _commit(storage, plan)
        storage.clean()
    stats = json.loads(storage.get(STATS))
    manifest = read_manifest(storage)
    return {"dataset": config.output, **stats, "shards": len(manifest.shards), "fingerprint": manifest.fingerprint}


def retry(config: BuildConfig, progress: bool = True) -> dict[str, Any]:
    """Not there yet: raises ConfigError that says what to do instead."""
    raise ConfigError(
        f"retry of {config.output}: not available yet; rejects.parquet lists the failed rows, "
        "mend them and build into a new output"
    )


# ------------------------------------------------------------------------------------------------- plan


def make_plan(config: BuildConfig) -> Plan:
    """Count the rows and find the duplicate keys; the source is opened again by every task."""
    source = open_source(config.source)
    rows = source.count()
    keys = source.keys()
    return Plan(config, rows, np.array([] if keys is None else list(_repeated(keys)), np.int64))


def _repeated(keys: Iterable[str]) -> Iterator[int]:
    """Numbers of the rows whose key an earlier row has; keys are compared by their 128-bit hash (xxh3)."""
    seen: set[bytes] = set()
    for number, key in enumerate(keys):
        digest = xxhash.xxh3_128_digest(key.encode("utf-8", "surrogatepass"))
        if digest in seen:
            yield number
        seen.add(digest)


def _pin(storage: Storage, plan: Plan) -> None:
    """Create build.json, or raise ConfigError where one with other contents stands."""
    config = plan.config
    tree = {
        "version": 1,
        "source": config.source.model_dump(mode="json"),
        "images": config.images.model_dump(mode="json"),
        "captions": config.captions.model_dump(mode="json"),
        "shard_size": config.shard_size,
        "rows": plan.rows,
        "duplicates": hashlib.sha256(plan.duplicates.astype("<i8").tobytes()).hexdigest(),
        "encoders": {"opencv": cv2.__version__, "pillow": PIL.__version__, "simplejpeg": simplejpeg.__version__},
    }
    data = canonical_json(tree)
    if storage.put_if_absent(BUILD, data):
        return
    there = json.loads(storage.get(BUILD))
    names = [name for name in tree if there.get(name) != tree[name]]
    if names:
        raise ConfigError(
            f"{storage.root}: begun by another build, nothing was changed; use a new output, or its configuration\n  "
            + "\n  ".join(f"{name}: {there.get(name)!r} there, {tree[name]!r} now" for name in names)
        )


# ----------------------------------------------------------------------------------------------- shards


def shard_name(shard: int) -> str:
    """00000.tar, 00001.tar, ..."""
    return f"{shard:05d}.tar"


def _stats_name(shard: int) -> str:
    return f"{shard:05d}_stats.json"


def _build_shards(storage: Storage, plan: Plan, progress: bool) -> None:
    there = set(storage.list())
    missing = [shard for shard in range(plan.shards) if _stats_name(shard) not in there]
    rejected: Tally[str] = Tally()
    with Counter("build", plan.rows, progress) as counter:
        for shard in set(range(plan.shards)) - set(missing):
            start, stop = plan.bounds(shard)
            counter.add(stop - start)
        if not missing:
            return
        with ray_session(plan.config.workers, plan.config.ray_address):
            for _, stats in run_tasks(_submitter(plan), missing, plan.config.workers):
                rejected.update(stats["rejected"])
                counter.add(stats["in"], rejected)


def _submitter(plan: Plan) -> Any:
    import ray

    plan_reference = ray.put(plan)
    task = ray.remote(build_shard).options(num_cpus=1, max_retries=3)
    return lambda shard: task.remote(plan_reference, shard)


def build_shard(plan: Plan, shard: int) -> dict[str, Any]:
    """Make and publish one shard -> its stats: `in`, `out`, `rejected`, `name`, `bytes`, `digest`."""
    cv2.setNumThreads(1)
    start, stop = plan.bounds(shard)
    storage = open_storage(plan.config.output)
    duplicates = set(plan.duplicates[slice(*np.searchsorted(plan.duplicates, [start, stop]))].tolist())
    records: list[dict[str, Any]] = []
    with storage.scratch() as folder:
        path = folder / shard_name(shard)
        with path.open("wb") as file:
            writer = TarWriter(file)
            for number, row in enumerate(open_source(plan.config.source).rows(start, stop), start):
                known = Drop(row.key, "duplicate_key", "an earlier row has this key") if number in duplicates else row
                records.append(_store(writer, number, known, plan.config))
            writer.close()
        index = Index(writer.bytes, writer.xxh3, np.array(writer.offsets, np.uint32))
        _read_back(path, index)
        return _publish_shard(storage, shard, path, index, records, stop - start)


def _store(writer: TarWriter, number: int, row: Row, config: BuildConfig) -> dict[str, Any]:
    """Write one row as a sample, or note why not -> its line of the shard's parquet."""
    outcome = transform(row, config)
    if isinstance(outcome, Drop):
        return {"row": number, "key": outcome.key, "status": outcome.reason, "detail": outcome.detail}
    pair, extension, width, height = outcome
    meta = {key: value for key, value in pair.meta.items() if key not in RESERVED}
    tree = {**meta, "key": pair.key, "captions": list(pair.captions)}
    text = json.dumps(tree, ensure_ascii=False, sort_keys=True).encode("utf-8", "replace")
    writer.add(f"{number:09d}", [(extension, pair.image), ("txt", pair.captions[0].encode()), ("json", text)])
    size = {"width": width, "height": height, "bytes": len(pair.image)}
    return {"row": number, "key": pair.key, "status": "ok", "detail": "", "captions": list(pair.captions), **size}


def transform(row: Row, config: BuildConfig) -> tuple[Pair, str, int, int] | Drop:
    """Captions, then pixels: Row -> (Pair as stored, extension, width, height) or Drop."""
    if isinstance(row, Drop):
        return row
    captions, reason = clean_captions(row.captions, config.captions)
    if reason:
        return Drop(row.key, reason, repr(row.captions)[:200])
    try:
        image, extension, width, height = prepare(row.image, config.images)
    except Reject as reject:
        return Drop(row.key, reject.reason, reject.detail)
    return Pair(row.key, image, captions, row.meta), extension, width, height


def _read_back(path: Path, index: Index) -> None:
    """What the disk holds must be what was meant. Raises DataError."""
    offsets, digest = scan_samples(path)
    if digest != index.xxh3 or offsets != index.offsets.tolist():
        raise DataError(f"{path}: reads back differently from what was written; disk or memory is faulty, run again")


def _publish_shard(
    storage: Storage, shard: int, path: Path, index: Index, records: list[dict[str, Any]], rows: int
) -> dict[str, Any]:
    rejected = Tally(record["status"] for record in records if record["status"] != "ok")
    if rows != index.samples + sum(rejected.values()):
        raise DataError(
            f"shard {shard}: {rows} rows in, {index.samples} out + {sum(rejected.values())} rejected; "
            "the source changed while it was read, build again into a new output"
        )
    name = shard_name(shard)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if not storage.put_file_if_absent(name, path):
        _compare(storage, name, digest)
    publish(storage, f"{name}.idx", pack_index(index))
    publish(storage, f"{shard:05d}.parquet", _parquet(records, _SCHEMA))
    stats = {
        "name": name,
        "in": rows,
        "out": index.samples,
        "rejected": dict(rejected),
        "bytes": index.tar_bytes,
        "digest": digest,
    }
    publish(storage, _stats_name(shard), canonical_json(stats))
    return stats


def _compare(storage: Storage, name: str, digest: str) -> None:
    """A shard that is already there, from a writer that was killed or is faster, must be the same."""
    there = hashlib.sha256(storage.get(name)).hexdigest()
    if there != digest:
        raise DataError(
            f"{storage.root}/{name}: there with sha256 {there[:12]}, made again {digest[:12]}; the source changed, "
            "nothing was overwritten, build into a new output"
        )


def _parquet(records: list[dict[str, Any]], schema: pa.Schema) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(records, schema=schema), sink, compression="zstd")
    return sink.getvalue()


# ----------------------------------------------------------------------------------------------- commit


def _commit(storage: Storage, plan: Plan) -> None:
    """All shards stand: add them up and publish the totals, the manifest last."""
    all_stats = [json.loads(storage.get(_stats_name(shard))) for shard in range(plan.shards)]
    rejected: Tally[str] = Tally()
    for stats in all_stats:
        rejected.update(stats["rejected"])
    rows, samples = sum(stats["in"] for stats in all_stats), sum(stats["out"] for stats in all_stats)
    if rows != plan.rows or rows != samples + sum(rejected.values()):
        raise DataError(
            f"{storage.root}: {plan.rows} rows planned, {rows} in, {samples} out, {sum(rejected.values())} rejected; "
            "shards of another build are among these, use a new output"
        )
    shards = tuple(Shard(stats["name"], stats["out"], stats["bytes"], stats["digest"]) for stats in all_stats)
    publish(storage, REJECTS, _parquet(list(_rejects(storage, all_stats)), _REJECTS_SCHEMA))
    publish(storage, STATS, canonical_json({"in": rows, "out": samples, "rejected": dict(rejected)}))
    if not samples:
        raise DataError(f"{storage.root}: all {rows} rows were rejected ({_listed(rejected)}); see {REJECTS} there")
    publish(storage, MANIFEST, Manifest(shards).to_json())


def _rejects(storage: Storage, all_stats: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for stats in all_stats:
        if stats["rejected"]:
            name = stats["name"].replace(".tar", ".parquet")
            table = pq.read_table(io.BytesIO(storage.get(name)), columns=["row", "key", "status", "detail"])
            for record in table.to_pylist():
                if record["status"] != "ok":
                    yield {**record, "reason": record["status"]}


def _listed(rejected: Tally[str]) -> str:
    return ", ".join(f"{reason} {number}" for reason, number in sorted(rejected.items()))
