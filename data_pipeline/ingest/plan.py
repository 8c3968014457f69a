"""Build plans: what a build will do, determined by source, configuration and existing output before any work starts.

A dataset grows by generations. Generation 0 is all rows of the source at the time; a later one adds new rows (`grow`)
or previously rejected ones (`data retry`) as further shards. Each generation is pinned by a file of its own, created
once, and ends with a new manifest; existing shards and earlier manifests do not change.
A position is the index of a row within one generation; an id is its index in the whole dataset, and never changes.
"""

import hashlib
import json
import os
import socket
from collections import Counter as Tally
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NotRequired

import cv2
import numpy as np
import PIL
import simplejpeg
import xxhash
from pydantic import TypeAdapter, with_config
from typing_extensions import TypedDict

from data_pipeline import gate
from data_pipeline.config import BuildConfig, PairsSource, SourceConfig, TableSource
from data_pipeline.errors import ConfigError, DataError
from data_pipeline.ingest.captions import check_languages, deny_digest
from data_pipeline.ingest.dedup import first_of_equals
from data_pipeline.ingest.filters import IMAGE_NAMES, TEXT_NAMES, Filters
from data_pipeline.ingest.inputs import open_input
from data_pipeline.ingest.layout import Part, Placement, Row
from data_pipeline.ingest.records import as_unicode
from data_pipeline.ingest.sources import RowSource, open_source
from data_pipeline.patterns import is_remote
from data_pipeline.schema import Drop
from data_pipeline.shards.manifest import (
    Manifest,
    canonical_json,
    read_manifest,
    read_rows,
    read_shard_stats,
    side_name,
)
from data_pipeline.storage import Storage

BUILD = "build.json"
FINAL_REASONS = frozenset(
    {"duplicate_key", "files_apart", "duplicate_image", "near_duplicate"}
)  # never retried: the result would be the same

_WITH_COLUMNS = ("csv", "tsv", "parquet", "cc3m", "muge")
_DECIDE_ROWS = ("kind", "key", "columns", "quotes", "parse_rule")  # source settings that determine the rows
_WITH_PARSE_RULE = ("csv", "tsv", "json", "jsonl", "parquet", "cc3m", "muge")
_SOURCE: TypeAdapter[SourceConfig] = TypeAdapter(SourceConfig)
_AT_ONCE = 1 << 16


@dataclass(frozen=True)
class BuildPlan:
    """Plan of one generation, passed to every task; arrays are int64.

    duplicates: sorted positions whose key an earlier row has. selected: source row per position, None for all rows.
    ids: id per position, None if ids equal positions. repeats: [m, 3] duplicate images: position (sorted), id of the
    row kept instead, 1 if the bytes are equal. reasons: previous rejection reason per position, for a retry.
    folder: working directory of the command, against which relative paths resolve.
    """

    config: BuildConfig
    layout: Placement
    rows: int
    duplicates: np.ndarray
    first_shard: int = 0
    selected: np.ndarray | None = None
    ids: np.ndarray | None = None
    repeats: np.ndarray | None = None
    reasons: tuple[str, ...] = ()
    folder: str = field(default_factory=os.getcwd)

    @property
    def shards(self) -> range:
        """Numbers of the shards of this generation."""
        return range(self.first_shard, self.first_shard - (-self.rows // self.config.shard_size))

    def bounds(self, shard: int) -> tuple[int, int]:
        """Positions [start, stop) of a shard."""
        start = (shard - self.first_shard) * self.config.shard_size
        return start, min(start + self.config.shard_size, self.rows)

    def read(self, shard: int) -> Iterator[tuple[int, Row]]:
        """Yield (id, row) for every position of a shard, from a newly opened source."""
        start, stop = self.bounds(shard)
        duplicates = set(self.duplicates[slice(*np.searchsorted(self.duplicates, [start, stop]))].tolist())
        source = open_source(self.config.source, self.layout)
        rows = (row for first, last in self._runs(start, stop) for row in source.rows(first, last))
        for position, row in enumerate(rows, start):
            known = self._repeat(row) if position in duplicates else row
            yield position if self.ids is None else int(self.ids[position]), known

    def _repeat(self, row: Row) -> Drop:
        """Return the rejection of a row whose key an earlier row has."""
        if self.config.source.kind == "tars" and isinstance(row, Drop) and row.reason == "no_image":
            remedy = "the files of a sample must be adjacent, pack the tar again in order (tar --sort=name)"
            return Drop(row.key, "files_apart", f"{row.detail}; its key occurs earlier in the tar too: {remedy}")
        return Drop(row.key, "duplicate_key", "an earlier row has this key")

    def enter(self) -> None:
        """Change to `folder`; every task does this first, because cluster processes start in another directory.

        Paths are not made absolute instead: they appear in the details of rejected rows, which must not depend on
        whether a cluster was used. Raises DataError if this node lacks the folder and a configured path is relative.
        """
        try:
            os.chdir(self.folder)
        except OSError as error:
            if relative := _relative_paths(self.config):
                raise DataError(
                    f"{self.folder}: {error.strerror} on node {socket.gethostname()}, base of {', '.join(relative)}; "
                    "use absolute paths, in folders that all nodes share"
                ) from None

    def tried_again(self, shard: int) -> dict[str, int]:
        """Count the previous rejection reasons of a shard's rows; empty if the rows are new."""
        return dict(Tally(self.reasons[slice(*self.bounds(shard))]))

    def repeats_of(self, shard: int) -> dict[int, Drop]:
        """Map the ids of a shard's duplicate images to their rejections (with an empty key)."""
        if self.repeats is None:
            return {}
        start, stop = self.bounds(shard)
        part = self.repeats[slice(*np.searchsorted(self.repeats[:, 0], [start, stop]))].tolist()
        ids = range(self.rows) if self.ids is None else self.ids
        return {
            int(ids[position]): Drop("", *(("duplicate_image", f"same bytes as row {keeper}") if same else
                                           ("near_duplicate", f"looks like row {keeper}")))
            for position, keeper, same in part
        }  # fmt: skip

    def _runs(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Yield positions [start, stop) as ranges of consecutive source rows."""
        if self.selected is None:
            yield start, stop
            return
        rows = self.selected[start:stop]
        breaks = np.flatnonzero(np.diff(rows) != 1) + 1
        for run in np.split(rows, breaks):
            if len(run):
                yield int(run[0]), int(run[-1]) + 1


# ------------------------------------------------------------------------------------------- generations


def make_plan(config: BuildConfig) -> BuildPlan:
    """Plan generation 0: every row. Raises ConfigError or DataError for an invalid source or invalid rules."""
    check_rules(config)
    source = open_source(config.source)
    rows = source.count()
    _check_filter_names(config, source)
    keys = source.keys()
    return BuildPlan(config, source.layout, rows, _repeated(key_digests(keys)) if keys is not None else _none())


def grown_plan(whole: BuildPlan, storage: Storage, manifest: Manifest, pinned: dict[str, Any]) -> BuildPlan:
    """Plan the next generation from source rows that the dataset lacks: by key, else all rows after its last one.

    Raises DataError if the key column changed, or if rows without keys are no longer those that were built.
    """
    source = open_source(whole.config.source, whole.layout)
    _check_settings(("key",), whole.config, pinned, storage)
    keys, known = source.keys(), _rows_in(storage, manifest)
    if keys is None:
        _check_same(whole.config, whole.layout, pinned, storage)
        selected = np.arange(known, whole.rows)
    else:
        old, new = key_digests(_keys_of(storage, manifest)), key_digests(keys)
        firsts = first_of_equals(np.concatenate([old, new]))[len(old) :]
        selected = np.flatnonzero(firsts == np.arange(len(old), len(old) + len(new)))
    ids = known + np.arange(len(selected))
    return BuildPlan(whole.config, whole.layout, len(selected), _none(), len(manifest.shards), selected, ids)


def retry_plan(
    config: BuildConfig, storage: Storage, rejects: list[dict[str, Any]], pinned: dict[str, Any]
) -> BuildPlan:
    """Plan the next generation from rejected rows that the source still has, except duplicates.

    Raises DataError if the key column changed, or if rows without keys are no longer those that were built.
    """
    check_rules(config)
    _check_settings(("key",), config, pinned, storage)
    source = open_source(config.source)
    rows = source.count()
    again = [reject for reject in rejects if reject["reason"] not in FINAL_REASONS]
    keys = source.keys()
    if keys is None:
        _check_same(config, source.layout, pinned, storage)
        places = {reject["key"]: int(reject["row"]) for reject in again if reject["row"] < rows}
    else:
        wanted = {reject["key"] for reject in again}
        places = {key: row for row, key in reversed(list(enumerate(map(as_unicode, keys)))) if key in wanted}
    again = sorted((reject for reject in again if reject["key"] in places), key=lambda reject: places[reject["key"]])
    selected = np.array([places[reject["key"]] for reject in again], np.int64)
    ids = np.array([reject["row"] for reject in again], np.int64)
    reasons = tuple(reject["reason"] for reject in again)
    first_shard = len(read_manifest(storage).shards)
    return BuildPlan(config, source.layout, len(again), _none(), first_shard, selected, ids, reasons=reasons)


def _relative_paths(config: BuildConfig) -> list[str]:
    """Return the relative local paths that the tasks of a build open."""
    paths = [config.output, *getattr(config.source, "path", "").split("::"), config.fetch.cache, config.captions.deny]
    return [path for path in paths if path and not is_remote(path) and not Path(path).is_absolute()]


def check_rules(config: BuildConfig) -> None:
    """Raise ConfigError for an invalid filter condition or an unknown language."""
    Filters(config.filters)
    check_languages(config.captions.languages)


def _check_filter_names(config: BuildConfig, source: RowSource) -> None:
    """Raise ConfigError for a filter name that no row can have; only checked for tables with fixed columns."""
    first = next(iter(source.rows(0, 1)))
    if config.source.kind not in _WITH_COLUMNS or isinstance(first, Drop):
        return
    known = {*first.meta, *IMAGE_NAMES, *TEXT_NAMES}
    for name in sorted(Filters(config.filters).names - known):
        raise ConfigError(
            f"filters: {name!r} is not a column that filters can use; columns are "
            f"{', '.join(sorted(known))}; source.captions is named caption, source.key is named key"
        )


def _check_same(config: BuildConfig, layout: Placement, pinned: dict[str, Any], storage: Storage) -> None:
    """Raise DataError unless the rows built before are unchanged; rows added after them are allowed.

    For sources without keys: a row is named by its number, so another row in its place would be stored under its name.
    """
    _check_settings(_DECIDE_ROWS, config, pinned, storage)
    parts = pinned["parts"]
    if len(layout.parts) < len(parts):
        raise DataError(
            f"source.path: {len(layout.parts)} files, {storage.root} was built from {len(parts)}; rows without a key "
            "are identified by number, so pass all files, or build with source.key into a new output"
        )
    for number, (old, part) in enumerate(zip(parts, layout.parts, strict=False)):
        if number == len(parts) - 1 and part.rows > old["rows"] and _continues(part, old):
            continue
        if (part.rows, part.digest) != (old["rows"], old["digest"]):
            raise DataError(
                f"{part.path}: {storage.root} was built from other contents; rows without a key go by number, "
                "so new rows must follow the old ones; restore it, or build with source.key into a new output"
            )


def _check_settings(names: tuple[str, ...], config: BuildConfig, pinned: dict[str, Any], storage: Storage) -> None:
    """Raise DataError if one of these source settings differs from what the dataset was built with."""
    was, now = pinned.get("source", {}), _source_tree(config.source)
    if differ := [name for name in names if was.get(name) != now.get(name)]:
        listed = ", ".join(f"source.{name}={now.get(name)!r} (built with {was.get(name)!r})" for name in differ)
        raise DataError(
            f"{storage.root}: rows are identified by {listed}; use the value it was built with, or build "
            "into a new output"
        )


def _continues(part: Part, old: dict[str, Any]) -> bool:
    """Return whether the file begins with the bytes that were built and continues on a new line."""
    left = old.get("bytes", 0)
    if not 0 < left < part.bytes:
        return False
    digest, last = xxhash.xxh3_128(), b""
    with open_input(part.path) as file:
        while left and (chunk := file.read(min(left, 1 << 22))):
            digest.update(chunk)
            left -= len(chunk)
            last = chunk[-1:]
        following = file.read(1)
    ends = b"\n\r\0"  # \0 is half of a line feed in UTF-16
    return bool(digest.hexdigest() == old["digest"]) and (last in ends or following in ends)


# --------------------------------------------------------------------------------------------------- keys


def key_digests(keys: Iterable[str]) -> np.ndarray:
    """Hash keys for comparison: 128-bit xxh3 -> uint64 [n, 2]."""
    blocks, digests = [], []
    for key in keys:
        digests.append(xxhash.xxh3_128_digest(as_unicode(key).encode()))
        if len(digests) == _AT_ONCE:
            blocks.append(np.frombuffer(b"".join(digests), np.uint64))
            digests = []
    return np.concatenate([*blocks, np.frombuffer(b"".join(digests), np.uint64)]).reshape(-1, 2)


def _repeated(digests: np.ndarray) -> np.ndarray:
    """Return the sorted positions whose key an earlier row has."""
    return np.flatnonzero(first_of_equals(digests) != np.arange(len(digests)))


def _none() -> np.ndarray:
    return np.array([], np.int64)


def _rows_in(storage: Storage, manifest: Manifest) -> int:
    """Return the number of source rows that a dataset has processed; retried rows count once."""
    stats = (read_shard_stats(storage, shard.name) for shard in manifest.shards)
    return sum(tree["in"] for tree in stats if "retried" not in tree)


def _keys_of(storage: Storage, manifest: Manifest) -> Iterator[str]:
    for shard in manifest.shards:
        yield from read_rows(storage, side_name(shard.name, ".parquet"), ["key"]).column("key").to_pylist()


# ---------------------------------------------------------------------------------------------------- pins


@with_config(gate.CLOSED)
class _Part(TypedDict):
    """One input file of a pin."""

    rows: gate.Count
    digest: str
    bytes: NotRequired[gate.Count]


@with_config(gate.OPEN)
class _Pin(TypedDict):
    """The entries of a pin (build.json, build-0001.json, ...) that are used; all others are only compared."""

    base: NotRequired[gate.Sha256]
    rows: NotRequired[gate.Count]
    parts: NotRequired[list[_Part]]
    source: NotRequired[dict[str, Any]]


def pin_name(generation: int) -> str:
    """Return the file name of a generation's pin: build.json, build-0001.json, ..."""
    return f"build-{generation:04d}.json" if generation else BUILD


def rules_of(config: BuildConfig) -> dict[str, Any]:
    """Return everything but the source that determines the output bytes; fixed for all generations of a dataset."""
    return {
        "images": config.images.model_dump(mode="json"),
        "captions": {**config.captions.model_dump(mode="json"), "deny": deny_digest(config.captions.deny)},
        "fetch": {"max_bytes": config.fetch.max_bytes, "opt_out": list(config.fetch.opt_out)},
        "filters": config.filters,
        "dedup": config.dedup.model_dump(mode="json"),
        "shard_size": config.shard_size,
        "encoders": {"opencv": cv2.__version__, "pillow": PIL.__version__, "simplejpeg": simplejpeg.__version__},
    }


def source_pin(plan: BuildPlan) -> dict[str, Any]:
    """Return the pin entries that describe what a generation reads."""
    parts = [{"rows": part.rows, "digest": part.digest, "bytes": int(part.bytes)} for part in plan.layout.parts]
    return {
        "source": _source_tree(plan.config.source),
        "parts": parts,
        "rows": plan.rows,
        "duplicates": hashlib.sha256(plan.duplicates.astype("<i8").tobytes()).hexdigest(),
    }


def pin(storage: Storage, generation: int, tree: dict[str, Any]) -> None:
    """Create the generation's pin. Raises ConfigError if one with different contents exists."""
    tree = {"version": 2, **tree}
    if storage.put_if_absent(pin_name(generation), canonical_json(tree)):
        return
    there = read_pin(storage, generation)
    compare_pins(storage, there, tree, tuple(tree))


def read_pin(storage: Storage, generation: int) -> dict[str, Any]:
    """Read a pin. Raises DataError if it is missing or invalid."""
    name = pin_name(generation)
    pin: dict[str, Any] = gate.parse(
        _Pin, storage.get(name), f"{storage.root}/{name}", "build the dataset again into a new output"
    )
    if generation and "base" not in pin:
        raise DataError(f"{storage.root}/{name}: has no base; build into a new output")
    if "source" in pin:
        pin["source"] = _with_defaults(pin["source"])
    return pin


def _source_tree(source: SourceConfig) -> dict[str, Any]:
    """Return a source's settings as JSON, with derived defaults (`quotes`) made explicit."""
    quotes = {"quotes": source.quoted} if isinstance(source, TableSource) else {}
    return source.model_dump(mode="json") | quotes


def _with_defaults(tree: dict[str, Any]) -> dict[str, Any]:
    """Return a pin's source settings with defaults for fields added since; a missing parse rule means rule 1."""
    rule = {"parse_rule": 1} if tree.get("kind") in _WITH_PARSE_RULE else {}
    try:
        return _source_tree(_SOURCE.validate_python(rule | tree))
    except ValueError:  # written by an incompatible version: it will differ from every source
        return tree


def as_begun(storage: Storage, config: BuildConfig) -> BuildConfig:
    """Return the configuration with the parse rule of the dataset begun in its output, unless it sets one itself."""
    source = config.source
    stated = not isinstance(source, TableSource | PairsSource) or "parse_rule" in source.model_fields_set
    if stated or not storage.exists(BUILD):
        return config
    rule = read_pin(storage, 0).get("source", {}).get("parse_rule", 2)
    return config.model_copy(update={"source": source.model_copy(update={"parse_rule": rule})})


def compare_pins(storage: Storage, there: dict[str, Any], now: dict[str, Any], names: tuple[str, ...]) -> None:
    """Raise ConfigError listing those of `names` that differ."""
    differ = [name for name in names if there.get(name) != json.loads(json.dumps(now[name]))]
    if not differ:
        return
    only_source = set(differ) <= {"source", "parts", "rows", "duplicates"}
    lines = [f"{name}: {there.get(name)!r:.300} before, {now[name]!r:.300} now" for name in differ]
    raise ConfigError(
        f"{storage.root}: belongs to another build, nothing was changed; use a new output, or its configuration"
        + (", or grow=true to add the new rows of a source to a finished build" if only_source else "")
        + "\n  "
        + "\n  ".join(lines)
    )
