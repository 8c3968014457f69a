"""Tasks of the build: fetch, decode, filter and count the rows of one shard; write its tar and the files beside it.

Each task is a pure function of (plan, shard) and of the files published by earlier tasks of the same shard: fetch
outcomes are recorded in a journal (`NNNNN_fetch.parquet`) before they are used.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter as Tally
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline import sandbox
from data_pipeline.config import BuildConfig
from data_pipeline.errors import Conflict, DataError, storage_errors
from data_pipeline.images import PreparedImage, Reject
from data_pipeline.ingest.cache import RawCache
from data_pipeline.ingest.captions import clean_captions
from data_pipeline.ingest.fetch import Fetcher, Outcome, fetch_all
from data_pipeline.ingest.filters import Filters
from data_pipeline.ingest.layout import Row
from data_pipeline.ingest.records import RESERVED, as_unicode, json_value
from data_pipeline.schema import Drop, Link, Pair
from data_pipeline.shards.manifest import (
    Index,
    canonical_json,
    index_tar,
    pack_index,
    publish,
    publish_index,
    read_rows,
    side_name,
)
from data_pipeline.shards.tar import TarWriter
from data_pipeline.storage import Storage, open_storage

if TYPE_CHECKING:
    from data_pipeline.ingest.plan import BuildPlan

DETAIL_AT_MOST = 500  # characters
RAW = ".raw"
SURVEY = "_survey.parquet"

_FETCHED = [("http_status", pa.int32()), ("attempts", pa.int32()), ("transient", pa.bool_())]
SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("key", pa.string()),
        ("status", pa.string()),
        ("detail", pa.string()),
        ("captions", pa.list_(pa.string())),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("bytes", pa.int64()),
        ("source_width", pa.int32()),
        ("source_height", pa.int32()),
        ("frames", pa.int32()),
        ("sha256", pa.string()),
        ("phash", pa.string()),
        ("url", pa.string()),
        *_FETCHED,
    ]
)
REJECTS_SCHEMA = pa.schema(
    [("row", pa.int64()), ("key", pa.string()), ("reason", pa.string()), ("detail", pa.string()), ("url", pa.string())]
    + _FETCHED
)
_JOURNAL_SCHEMA = pa.schema(
    [("row", pa.int64()), ("url", pa.string()), ("sha256", pa.string()), ("reason", pa.string())]
    + [("detail", pa.string()), *_FETCHED]
)

Record = dict[str, Any]


def schema_of(config: BuildConfig) -> pa.Schema:
    """Return the columns of a shard's parquet; `colours` is added if near duplicates are searched."""
    return SCHEMA if config.dedup.near_bits is None else SCHEMA.append(pa.field("colours", pa.string()))


def shard_name(shard: int) -> str:
    """Return the file name of a shard: 00000.tar, 00001.tar, ..."""
    return f"{shard:05d}.tar"


def stats_name(shard: int) -> str:
    """Return the name of a shard's statistics, 00000_stats.json; once that file exists, the shard is done."""
    return f"{shard:05d}_stats.json"


def survey_name(shard: int) -> str:
    """Return the name of a shard's image signatures, 00000_survey.parquet, used to find duplicates and then removed."""
    return f"{shard:05d}{SURVEY}"


def journal_name(shard: int) -> str:
    """Return the name of a shard's fetch journal, 00000_fetch.parquet: the outcome of every URL."""
    return f"{shard:05d}_fetch.parquet"


def raw_cache(config: BuildConfig) -> RawCache:
    """Return the cache of fetched bytes."""
    return RawCache(config.fetch.cache or f"{config.output}/{RAW}")


# ------------------------------------------------------------------------------------------------- stages


class Stages:
    """Processing stages of a shard's rows, to be run in order; each stage passes a row on or turns it into a Drop."""

    def __init__(self, plan: BuildPlan, shard: int, stored: bool) -> None:
        config = plan.config
        self._plan, self._shard, self._config = plan, shard, config
        self._filters = Filters(config.filters)
        self._repeats = plan.repeats_of(shard)
        self._decoder = sandbox.decoder(config.images, config.dedup.near_bits is not None, stored)
        self._cache = raw_cache(config)
        self._journal: dict[int, Record] | None = None
        self._fetched_bytes: Iterator[tuple[str, bytes]] = iter(())

    def run(self, number: int, row: Row) -> tuple[Record, PreparedImage | None, Pair | None]:
        """Process one row. Returns (its record for the shard's parquet, image, pair); both None if rejected."""
        record: Record = {"row": number, "key": as_unicode(row.key)}
        admitted = admit(row, self._config, self._filters)
        if isinstance(admitted, Link):
            admitted = self._fetched(number, admitted, record)
        if isinstance(admitted, Pair):
            if "sha256" not in record:  # a fetched image has one, verified when the cache was read
                record["sha256"] = hashlib.sha256(admitted.image).hexdigest()
            repeat = self._repeats.get(number)
            outcome = repeat or self._look(admitted, record)
        else:
            outcome = admitted
        if isinstance(outcome, Drop):
            return {**record, "status": outcome.reason, "detail": _shortened(outcome.detail)}, None, None
        assert isinstance(admitted, Pair)
        return {**record, "status": "ok", "detail": "", "captions": list(admitted.captions)}, outcome, admitted

    def _look(self, pair: Pair, record: Record) -> PreparedImage | Drop:
        try:
            looked = self._decoder.look(pair.image)
        except Reject as reject:
            return Drop(pair.key, reject.reason, reject.detail)
        image = looked.prepared
        name, why = self._filters.after(values_of(pair, pair.captions) | image_values(image, len(pair.image)))
        if name:
            return Drop(pair.key, name, why)
        record |= {"width": image.width, "height": image.height, "bytes": len(image.data), "frames": image.frames}
        record |= {"source_width": image.source_width, "source_height": image.source_height}
        record |= {"phash": None if looked.phash is None else f"{looked.phash:016x}", "colours": looked.colours}
        return image

    def _fetched(self, number: int, link: Link, record: Record) -> Pair | Drop:
        """Resolve a link to its bytes by the journal, which is created first if no earlier task did."""
        if self._journal is None:
            fetch_shard(self._plan, self._shard)
            self._journal = read_journal(open_storage(self._config.output), self._shard)
            fetched = (record["sha256"] for record in self._journal.values() if not record["reason"])
            self._fetched_bytes = self._cache.get_all(fetched)
        outcome = self._journal.get(number)
        if outcome is None or outcome["url"] != link.url:
            raise DataError(
                f"{self._config.output}/{journal_name(self._shard)}: row {number} differs from the plan; build again"
            )
        record |= {name: outcome[name] for name in ("url", "http_status", "attempts", "transient")}
        if outcome["reason"]:
            return Drop(link.key, outcome["reason"], outcome["detail"])
        digest, data = next(self._fetched_bytes)  # the journal is in row order
        assert digest == outcome["sha256"]
        record["sha256"] = digest
        return Pair(link.key, data, link.captions, {"url": link.url, **link.meta})


def _shortened(detail: str) -> str:
    """Truncate the detail of a rejection to DETAIL_AT_MOST characters; it may quote a value of any length."""
    text = as_unicode(detail[:DETAIL_AT_MOST])
    return text if len(text) < DETAIL_AT_MOST else f"{text[: DETAIL_AT_MOST - 1]}…"


def admit(row: Row, config: BuildConfig, filters: Filters) -> Row:
    """Clean the captions, then apply the filters that do not need the image. Returns the row or a Drop."""
    if isinstance(row, Drop):
        return row
    captions, reason = clean_captions(row.captions, config.captions)
    if reason:
        return Drop(row.key, reason, repr(row.captions)[:200])
    name, why = filters.before(values_of(row, captions))
    if name:
        return Drop(row.key, name, why)
    if isinstance(row, Link):
        return Link(row.key, row.url, captions, row.meta, row.sha256, row.md5)
    return Pair(row.key, row.image, captions, row.meta)


def values_of(row: Pair | Link, captions: tuple[str, ...]) -> dict[str, Any]:
    """Return the names that filters may use for a row: attributes, key (a column `key` if there is one), captions."""
    key = row.meta.get("source_key", row.key)
    return {"key": key, **row.meta, **caption_values(captions)}


def caption_values(captions: tuple[str, ...]) -> dict[str, Any]:
    """Return the filter names for captions: caption (the first), chars (its length), captions (all)."""
    return {"caption": captions[0], "captions": list(captions), "chars": len(captions[0])}


def image_values(image: PreparedImage, size: int) -> dict[str, Any]:
    """Return the filter names for the source image: width, height, area, aspect (long / short side), bytes."""
    width, height = image.source_width, image.source_height
    sides = {"width": width, "height": height, "area": width * height}
    return {**sides, "aspect": max(width, height) / min(width, height), "bytes": size}


# ------------------------------------------------------------------------------------------------- fetching


def links_of(plan: BuildPlan, shard: int) -> tuple[list[int], list[Link]]:
    """Return (ids, links) of the rows of a shard that must be fetched, without those already rejected."""
    filters = Filters(plan.config.filters)
    admitted = ((number, admit(row, plan.config, filters)) for number, row in plan.read(shard) if isinstance(row, Link))
    pairs = [(number, link) for number, link in admitted if isinstance(link, Link)]
    return [number for number, _ in pairs], [link for _, link in pairs]


def fetch_shard(plan: BuildPlan, shard: int) -> int:
    """Fetch the links of a shard and publish its journal. Returns their number; 0 if the journal exists already."""
    storage = open_storage(plan.config.output)
    if storage.exists(journal_name(shard)):
        return 0
    numbers, links = links_of(plan, shard)
    return _write_journal(storage, shard, numbers, links, fetch_all(links, plan.config.fetch, raw_cache(plan.config)))


class ShardFetcher:
    """Ray actor that fetches for several shards concurrently, within the limits of one Fetcher."""

    def __init__(self, config: BuildConfig) -> None:
        self._rules, self._cache = config.fetch, raw_cache(config)
        self._fetcher: Fetcher | None = None

    async def fetch(self, plan: BuildPlan, shard: int) -> int:
        """Do the same as `fetch_shard`."""
        plan.enter()
        storage = open_storage(plan.config.output)
        if storage.exists(journal_name(shard)):
            return 0
        if self._fetcher is None:
            self._fetcher = await Fetcher(self._rules, self._cache).__aenter__()
        numbers, links = links_of(plan, shard)
        return _write_journal(storage, shard, numbers, links, await self._fetcher.fetch_all(links))


def _write_journal(storage: Storage, shard: int, numbers: list[int], links: list[Link], outcomes: list[Outcome]) -> int:
    """Publish the journal unless another task did meanwhile: the first one is kept, since its shard uses it."""
    records = [
        {"row": number, "url": link.url, **vars(outcome)}
        for number, link, outcome in zip(numbers, links, outcomes, strict=True)
    ]
    storage.put_if_absent(journal_name(shard), to_parquet(records, _JOURNAL_SCHEMA))
    return len(records)


def read_journal(storage: Storage, shard: int) -> dict[int, Record]:
    """Read a shard's journal: fetch outcome by row id."""
    return {record["row"]: record for record in read_rows(storage, journal_name(shard)).to_pylist()}


# ------------------------------------------------------------------------------------------------- tasks


def survey_shard(plan: BuildPlan, shard: int, after: object = None) -> int:
    """Decode every image of a shard and publish its signatures. Returns the number of rows that would be stored."""
    plan.enter()
    storage = open_storage(plan.config.output)
    stages = Stages(plan, shard, stored=False)
    records = [stages.run(number, row)[0] for number, row in plan.read(shard)]
    publish(storage, survey_name(shard), to_parquet(records, schema_of(plan.config)))
    return sum(record["status"] == "ok" for record in records)


def build_shard(plan: BuildPlan, shard: int, after: object = None) -> Record:
    """Make and publish one shard. Returns its stats: `in`, `out`, `rejected`, `name`, `bytes`, `digest`.

    after: unused; a dependency for Ray's scheduler.
    """
    cv2.setNumThreads(1)
    plan.enter()
    storage = open_storage(plan.config.output)
    with storage.scratch() as folder, storage_errors(folder):
        path = folder / shard_name(shard)
        stages = Stages(plan, shard, stored=True)
        with path.open("wb") as file:
            writer = TarWriter(file)
            records = [_store(writer, *stages.run(number, row)) for number, row in plan.read(shard)]
            writer.close()
        index = Index(writer.bytes, writer.xxh3, np.array(writer.offsets, np.uint32), np.array(writer.sums, np.uint32))
        _read_back(path, index)
        stats = _stats(plan, shard, path, index, records)
        if not storage.put_file_if_absent(stats["name"], path):
            _compare(storage, stats["name"], stats["digest"])
    publish_index(storage, stats["name"], index)
    publish(storage, side_name(stats["name"], ".parquet"), to_parquet(records, schema_of(plan.config)))
    publish(storage, stats_name(shard), canonical_json(stats))
    return stats


def _store(writer: TarWriter, record: Record, image: PreparedImage | None, pair: Pair | None) -> Record:
    """Write the sample, unless the row is rejected. Returns the record."""
    if image is not None and pair is not None:
        meta = {key: json_value(value) for key, value in pair.meta.items() if key not in RESERVED}
        tree = {**meta, "key": pair.key, "captions": list(pair.captions)}
        text = json.dumps(tree, ensure_ascii=False, sort_keys=True, allow_nan=False).encode("utf-8", "replace")
        parts = [(image.extension, image.data), ("txt", pair.captions[0].encode()), ("json", text)]
        writer.add(f"{record['row']:09d}", parts)
    return record


def _read_back(path: Any, index: Index) -> None:
    """Index the tar as read back from disk. Raises DataError unless it equals what was written."""
    found, _ = index_tar(open_storage(path.parent).stream(path.name), str(path))
    if pack_index(found) != pack_index(index):
        raise DataError(f"{path}: read back other bytes than were written; check disk and memory, then run again")


def _stats(plan: BuildPlan, shard: int, path: Any, index: Index, records: list[Record]) -> Record:
    """Return the statistics of one shard. Raises DataError if the counts do not add up."""
    start, stop = plan.bounds(shard)
    rejected = Tally(record["status"] for record in records if record["status"] != "ok")
    if stop - start != index.samples + sum(rejected.values()):
        raise DataError(
            f"shard {shard}: {stop - start} rows in, {index.samples} out + {sum(rejected.values())} rejected; "
            "the source changed during the build, build again into a new output"
        )
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    again = plan.tried_again(shard)
    return {
        "name": shard_name(shard),
        "in": stop - start,
        "out": index.samples,
        "rejected": dict(rejected),
        "bytes": index.tar_bytes,
        "digest": digest,
        **({"retried": again} if again else {}),
    }


def _compare(storage: Storage, name: str, digest: str) -> None:
    """Raise Conflict unless the existing shard, from a killed or faster writer, has the same digest."""
    there = hashlib.sha256(storage.get(name)).hexdigest()
    if there != digest:
        raise Conflict(
            f"{storage.root}/{name}: exists with sha256 {there[:12]}, rebuilt as {digest[:12]}; the source changed, "
            "nothing was overwritten, build into a new output"
        )


def to_parquet(records: list[Record], schema: pa.Schema) -> bytes:
    """Write records as parquet; the same records give the same bytes."""
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(records, schema=schema), sink, compression="zstd")
    return sink.getvalue()
