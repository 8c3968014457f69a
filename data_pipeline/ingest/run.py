"""The dataset build: plan, one task per shard, commit, statistics. Output depends on source and configuration alone.

1. Plan: count the rows, note rows with repeated keys, and create `build.json`, which pins the inputs of the shards;
   another configuration with the same output is refused.
2. If duplicates are to be removed: survey every image once, then decide which rows are kept.
3. Make shard k from rows [k * shard_size, (k + 1) * shard_size) only, in a scratch file, read it back, and publish its
   files by creating their names, `NNNNN_stats.json` last: once that file exists, the shard is done.
4. When all shards are done, write rejects.parquet, stats.json, and manifest.json last. A rerun makes what is missing.
5. A later generation (`grow`, `retry`) adds shards; the previous manifest is kept as manifest-FINGERPRINT.json.
"""

import contextlib
import io
import itertools
from collections import Counter as Tally
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_pipeline.config import BuildConfig
from data_pipeline.errors import Conflict, DataError
from data_pipeline.ingest.dedup import duplicates
from data_pipeline.ingest.plan import (
    BuildPlan,
    as_begun,
    compare_pins,
    grown_plan,
    make_plan,
    pin,
    pin_name,
    read_pin,
    retry_plan,
    rules_of,
    source_pin,
)
from data_pipeline.ingest.shard import (
    RAW,
    REJECTS_SCHEMA,
    SURVEY,
    ShardFetcher,
    build_shard,
    shard_name,
    stats_name,
    survey_name,
    survey_shard,
)
from data_pipeline.schema import Link
from data_pipeline.shards.manifest import (
    MANIFEST,
    STATS,
    Manifest,
    Shard,
    ShardStats,
    canonical_json,
    older_manifest,
    publish,
    read_manifest,
    read_rows,
    read_shard_stats,
    read_totals,
    side_name,
)
from data_pipeline.signatures import COLOUR_BYTES
from data_pipeline.storage import Storage, open_storage
from data_pipeline.workers import Counter, ray_session, run_tasks

REJECTS = "rejects.parquet"

_ROWS_ASKED = 64
_ROWS_WRITTEN = 10_000
_SHARDS_AHEAD = 8  # per worker when images are fetched, so that one stalled URL does not block the other shards


def build(config: BuildConfig, progress: bool = True) -> dict[str, Any]:
    """Build, resume or grow a dataset. Returns its stats.json plus `dataset`, `shards` and `fingerprint`.

    Raises ConfigError for an unknown column or an output begun with another configuration; DataError for a missing or
    empty source or a storage failure.
    """
    storage = open_storage(config.output)
    config = as_begun(storage, config)
    plan = make_plan(config)
    if config.grow and storage.exists(MANIFEST):
        return _grow(storage, plan, progress)
    pin(storage, 0, {**rules_of(config), **source_pin(plan)})
    if not storage.exists(MANIFEST):
        _make(storage, plan, Manifest(()), progress)
    _tidy(storage, config)
    return report_of(storage)


def retry(config: BuildConfig, progress: bool = True) -> dict[str, Any]:
    """Retry the rejected rows of a finished build, except duplicates, as further shards. Returns as `build` does.

    Raises ConfigError if the output was built with other rules, DataError if it is not finished.
    """
    storage = open_storage(config.output)
    manifest = read_manifest(storage)
    _check_rules(storage, config)
    config = as_begun(storage, config)
    rejects = (table.to_pylist() for table in _rejects(storage, _all_stats(storage, manifest)))
    plan = retry_plan(config, storage, list(itertools.chain.from_iterable(rejects)), _newest_source(storage))
    if plan.rows:
        assert plan.ids is not None
        _pin_later(storage, manifest, {"kind": "retry", "ids": plan.ids.tolist()})
        _make(storage, plan, manifest, progress)
    _tidy(storage, config)
    return report_of(storage)


def report_of(storage: Storage) -> dict[str, Any]:
    """Return the result of a finished build, as `build` describes."""
    stats = read_totals(storage)
    manifest = read_manifest(storage)
    return {"dataset": storage.root, **stats, "shards": len(manifest.shards), "fingerprint": manifest.fingerprint}


# ------------------------------------------------------------------------------------------ generations


def _grow(storage: Storage, whole: BuildPlan, progress: bool) -> dict[str, Any]:
    manifest = read_manifest(storage)
    _check_rules(storage, whole.config)
    plan = grown_plan(whole, storage, manifest, _newest_source(storage))
    if plan.rows:
        assert plan.selected is not None
        tree = {"kind": "grow", "selected": [int(plan.selected[0]), len(plan.selected)]}
        _pin_later(storage, manifest, {**tree, **source_pin(plan)})
        _make(storage, plan, manifest, progress)
    _tidy(storage, whole.config)
    return report_of(storage)


def _check_rules(storage: Storage, config: BuildConfig) -> None:
    rules = rules_of(config)
    compare_pins(storage, read_pin(storage, 0), rules, tuple(rules))


def _generations(storage: Storage) -> int:
    """Return the number of generations begun, finished or not."""
    names = set(storage.list())
    return next(number for number in range(len(names) + 1) if pin_name(number) not in names)


def _newest_source(storage: Storage) -> dict[str, Any]:
    """Return the pin of the last finished generation that read a source.

    A pin based on the current manifest is skipped: that generation is not finished.
    """
    base = read_manifest(storage).fingerprint
    trees = (read_pin(storage, number) for number in reversed(range(_generations(storage))))
    found = next((tree for tree in trees if "parts" in tree and tree.get("base") != base), None)
    if found is None:
        raise DataError(f"{storage.root}: no {pin_name(0)} with the files that were read; build into a new output")
    return found


def _pin_later(storage: Storage, base: Manifest, tree: dict[str, Any]) -> None:
    """Pin the generation that follows `base`: a new one, or an unfinished one begun before."""
    tree = {"base": base.fingerprint, **tree}
    count = _generations(storage)
    begun = count > 1 and read_pin(storage, count - 1)["base"] == base.fingerprint
    pin(storage, count - begun, tree)


# ----------------------------------------------------------------------------------------------- shards


def _make(storage: Storage, plan: BuildPlan, base: Manifest, progress: bool) -> None:
    """Run all tasks of a generation, then commit it."""
    try:
        if _missing(storage, plan, stats_name):
            with ray_session(plan.config.workers, plan.config.ray_address):
                _run_all(storage, plan, base, progress)
        _commit(storage, plan, base)
    except Conflict:
        raise
    except DataError:
        if not _is_followed(storage, base):
            raise


def _is_followed(storage: Storage, base: Manifest) -> bool:
    """Return whether another run of the same build has committed, and so removed files that this run still reads."""
    with contextlib.suppress(DataError):
        return read_manifest(storage).fingerprint != base.fingerprint
    return False


def _run_all(storage: Storage, plan: BuildPlan, base: Manifest, progress: bool) -> None:
    linked = _is_linked(plan)
    if plan.config.dedup.wanted:
        _run(storage, plan, survey_shard, "look", linked, progress)
        plan = replace(plan, repeats=_repeats(storage, plan, base))
    _run(storage, plan, build_shard, "build", linked, progress)


def _missing(storage: Storage, plan: BuildPlan, result_name: Callable[[int], str]) -> list[int]:
    """Return the shards whose result file, `result_name(shard)`, does not exist yet."""
    there = set(storage.list())
    return [shard for shard in plan.shards if result_name(shard) not in there]


def _tidy(storage: Storage, config: BuildConfig) -> None:
    """Remove files that only an unfinished build needs. Also cleans up after a run killed right after its commit."""
    for name in storage.list():
        if name.endswith(SURVEY):
            storage.remove(name)
    if config.fetch.cache is None:
        open_storage(f"{storage.root}/{RAW}").remove_all()
    storage.clean()


def _is_linked(plan: BuildPlan) -> bool:
    """Return whether any of the first rows must be fetched. Links in later rows are fetched by their shard's task."""
    rows = itertools.islice(plan.read(plan.first_shard), _ROWS_ASKED)
    return any(isinstance(row, Link) for _, row in rows)


def _run(storage: Storage, plan: BuildPlan, task: Any, title: str, linked: bool, progress: bool) -> None:
    """Run the task for every shard that has no result yet."""
    result_name = stats_name if task is build_shard else survey_name
    missing = _missing(storage, plan, result_name)
    rejected: Tally[str] = Tally()
    before = plan.rows - sum(_rows(plan, shard) for shard in missing)
    with Counter(title, plan.rows, progress, before) as counter:
        ahead = _SHARDS_AHEAD if linked else None
        for shard, result in run_tasks(_submitter(plan, task, linked), missing, plan.config.workers, ahead):
            rejected.update(result["rejected"] if isinstance(result, dict) else {})
            counter.add(_rows(plan, shard), rejected)


def _rows(plan: BuildPlan, shard: int) -> int:
    start, stop = plan.bounds(shard)
    return stop - start


def _submitter(plan: BuildPlan, task: Any, linked: bool) -> Any:
    """Return a function submit(shard) -> Ray reference.

    If images are fetched, the task waits for the fetch, which runs in an actor that reserves no CPU.
    """
    import ray

    plan_reference = ray.put(plan)
    remote = ray.remote(task).options(num_cpus=1, max_retries=3)
    if not linked:
        return lambda shard: remote.remote(plan_reference, shard)
    count = max(1, plan.config.workers // 2)
    options = {"num_cpus": 0, "max_concurrency": 64, "max_restarts": -1, "max_task_retries": 3}
    actor = ray.remote(ShardFetcher).options(**options, scheduling_strategy="SPREAD")
    fetchers = [actor.remote(plan.config) for _ in range(count)]
    return lambda shard: remote.remote(
        plan_reference, shard, fetchers[shard % count].fetch.remote(plan_reference, shard)
    )


def _repeats(storage: Storage, plan: BuildPlan, base: Manifest) -> np.ndarray:
    """Find duplicates among the new images and between them and the dataset. Returns `BuildPlan.repeats`."""
    rules = plan.config.dedup
    names = [side_name(shard.name, ".parquet") for shard in base.shards] + [survey_name(s) for s in plan.shards]
    tables = [_signatures(storage, name) for name in names]
    known = sum(len(table[0]) for table in tables[: len(base.shards)])
    rows, digests, hashes, hashed, colours = (np.concatenate(column) for column in zip(*tables, strict=True))
    del tables
    # an image too plain for a perceptual hash has no near duplicates: only its bytes are compared
    keepers, same = duplicates(digests if rules.exact else None, hashes, hashed, rules.near_bits, colours)
    found = known + np.flatnonzero(keepers[known:] >= 0)
    positions = rows[found]
    if plan.ids is not None:
        ranked = np.argsort(plan.ids)
        positions = ranked[np.searchsorted(plan.ids, positions, sorter=ranked)]
    repeats = np.stack([positions, rows[keepers[found]], same[found]], 1).astype(np.int64)
    return repeats[np.argsort(positions)]


def _signatures(storage: Storage, name: str) -> tuple[np.ndarray, ...]:
    """Read the signatures of the stored rows: (ids, digests, hashes, hashed, colours).

    ids: int64 [n]. digests: uint64 [n, 2], first 128 bits of the sha256. hashes: uint64 [n] perceptual hashes, valid
    where `hashed`, bool [n]. colours: uint8 [n, COLOUR_BYTES], zero if unknown (earlier versions did not record it).
    """
    table = read_rows(storage, name, ["row", "status", "sha256", "phash"], ["colours"])
    kept = table.filter(pc.equal(table["status"], "ok"))
    digests = np.frombuffer(b"".join(bytes.fromhex(text[:32]) for text in kept["sha256"].to_pylist()), np.uint64)
    hashes = np.array([int(text or "0", 16) for text in kept["phash"].to_pylist()], np.uint64)
    texts = kept["colours"].to_pylist() if "colours" in kept.column_names else [None] * len(kept)
    colours = np.frombuffer(b"".join(bytes.fromhex(text or "00" * COLOUR_BYTES) for text in texts), np.uint8)
    hashed = pc.is_valid(kept["phash"]).to_numpy()
    return _ids(kept), digests.reshape(-1, 2), hashes, hashed, colours.reshape(-1, COLOUR_BYTES)


# ----------------------------------------------------------------------------------------------- commit


def _commit(storage: Storage, plan: BuildPlan, base: Manifest) -> None:
    """Once all shards are done, add up their statistics and publish the totals, the manifest last."""
    new = [read_shard_stats(storage, shard_name(shard)) for shard in plan.shards]
    all_stats = [*_all_stats(storage, base), *new]
    if sum(stats["in"] for stats in new) != plan.rows:
        raise DataError(
            f"{storage.root}: {plan.rows} rows planned, {sum(stats['in'] for stats in new)} read; shards of another "
            "build are mixed in, use a new output"
        )
    totals = add_up(all_stats)
    if totals["in"] != totals["out"] + sum(totals["rejected"].values()):
        raise DataError(
            f"{storage.root}: {totals} does not add up; shards of another build are mixed in, use a new output"
        )
    rejects = _as_parquet(_rejects(storage, all_stats))
    put = storage.replace if base.shards else lambda name, data: publish(storage, name, data)
    if base.shards:
        publish(storage, older_manifest(base.fingerprint), base.to_json())
    put(REJECTS, rejects)
    put(STATS, canonical_json(totals))
    if not totals["out"]:
        listed = ", ".join(f"{reason} {number}" for reason, number in sorted(totals["rejected"].items()))
        raise DataError(f"{storage.root}: all {totals['in']} rows were rejected ({listed}); see {REJECTS} there")
    shards = tuple(Shard(stats["name"], stats["out"], stats["bytes"], stats["digest"]) for stats in new)
    put(MANIFEST, Manifest((*base.shards, *shards)).to_json())


def add_up(all_stats: list[ShardStats]) -> dict[str, Any]:
    """Add up the statistics of all shards; a retried row counts once, with its last outcome."""
    rejected: Tally[str] = Tally()
    for stats in all_stats:
        rejected.update(stats["rejected"])
        rejected.subtract(stats.get("retried", {}))
    rows = sum(stats["in"] for stats in all_stats if "retried" not in stats)
    return {"in": rows, "out": sum(stats["out"] for stats in all_stats), "rejected": dict(+rejected)}


def _all_stats(storage: Storage, manifest: Manifest) -> list[ShardStats]:
    return [read_shard_stats(storage, shard.name) for shard in manifest.shards]


def _rejects(storage: Storage, all_stats: list[ShardStats]) -> Iterator[pa.Table]:
    """Yield the currently rejected rows by id, with their last reason: one table (REJECTS_SCHEMA) per shard.

    Ids ascend from shard to shard, so only one shard and the retried rows are in memory.
    """
    again = _tried_again(storage, [stats["name"] for stats in all_stats if "retried" in stats])
    tried, still = _ids(again), again.filter(_is_rejected(again))
    for stats in all_stats:
        if "retried" in stats or not stats["rejected"]:
            continue
        rows = _outcomes(storage, stats["name"])
        first = rows.filter(pa.array(_is_rejected(rows) & ~np.isin(_ids(rows), tried)))
        here = (_ids(still) >= _ids(rows)[0]) & (_ids(still) <= _ids(rows)[-1])
        yield pa.concat_tables([first, still.filter(pa.array(here))]).sort_by("row")


def _tried_again(storage: Storage, names: list[str]) -> pa.Table:
    """Return the last outcome of each row in these shards."""
    table = pa.concat_tables([REJECTS_SCHEMA.empty_table(), *(_outcomes(storage, name) for name in names)])
    last = {row: place for place, row in enumerate(_ids(table).tolist())}
    return table.take(pa.array(sorted(last.values()), pa.int64()))


def _outcomes(storage: Storage, shard: str) -> pa.Table:
    """Return every row of a shard in REJECTS_SCHEMA; the reason of a stored row is ok."""
    columns = ["row", "key", "status", "detail", "url", "http_status", "attempts", "transient"]
    return read_rows(storage, side_name(shard, ".parquet"), columns).rename_columns(REJECTS_SCHEMA.names)


def _ids(table: pa.Table) -> np.ndarray:
    return table["row"].to_numpy()


def _is_rejected(table: pa.Table) -> np.ndarray:
    return np.array(table["reason"].to_pylist(), object) != "ok"


def _as_parquet(tables: Iterator[pa.Table]) -> bytes:
    """Write rows as parquet in groups of _ROWS_WRITTEN; the bytes do not depend on how rows are split into tables."""
    sink, waiting = io.BytesIO(), [REJECTS_SCHEMA.empty_table()]
    with pq.ParquetWriter(sink, REJECTS_SCHEMA, compression="zstd") as writer:
        for table in tables:
            waiting.append(table)
            while sum(map(len, waiting)) >= _ROWS_WRITTEN:
                whole = pa.concat_tables(waiting)
                writer.write_table(whole.slice(0, _ROWS_WRITTEN))
                waiting = [whole.slice(_ROWS_WRITTEN)]
        writer.write_table(pa.concat_tables(waiting))
    return sink.getvalue()
