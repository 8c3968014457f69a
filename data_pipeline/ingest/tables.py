"""Table sources with random access by row: csv, tsv, jsonl, json and parquet.

Planning reads a text file once and records the offset of every STRIDE-th record; tasks later start reading there.
"""

import contextlib
import hashlib
import io
import itertools
import json
from collections.abc import Collection, Iterator
from functools import cached_property
from typing import Any, BinaryIO

import numpy as np
import pyarrow
import pyarrow.parquet

from data_pipeline.config import PairsSource, TableSource
from data_pipeline.errors import ConfigError, DataError
from data_pipeline.ingest.inputs import beside, input_digest, input_paths, open_input, partition_of
from data_pipeline.ingest.layout import STRIDE, Part, Placement, Row, joined, lines_layout
from data_pipeline.ingest.records import RecordReader, json_line, key_of, parse_object
from data_pipeline.ingest.text_records import Record, RecordPlace, TextRecords
from data_pipeline.ingest.unreadable import UNREADABLE
from data_pipeline.text_files import decode_around

SUFFIXES = {
    "csv": (".csv", ".csv.gz"),
    "tsv": (".tsv", ".tsv.gz"),
    "json": (".json", ".json.gz"),
    "jsonl": (".jsonl", ".jsonl.gz"),
    "parquet": (".parquet",),
}

_NAMES_SHOWN = 50


class Table:
    """Rows of one or more tables of one kind, with images in a folder, in a tar, inline, or to be fetched."""

    def __init__(self, config: TableSource, layout: Placement | None = None) -> None:
        self._config = config
        self._path = config.path if config.table is None else beside(f"{config.path}/x", config.table)
        self._given = layout
        self._asked_columns = {column for _, column in self._asked()}
        self._columns: dict[str, None] = {}  # jsonl, json: column names found so far
        self._told: dict[str, None] = {}  # jsonl, json: column names from partition folders

    @cached_property
    def layout(self) -> Placement:
        """Row layout; planned on first use unless passed in."""
        return self._given or self._plan()

    def count(self) -> int:
        if not self.layout.rows:
            raise DataError(f"{self._config.path}: no rows; a dataset needs at least one")
        return self.layout.rows

    def keys(self) -> Iterator[str] | None:
        column = self._config.key
        if column is None:
            return None
        records = self._records(0, self.layout.rows, [column])
        return (key_of(record, column, number) for number, (_, record) in enumerate(records))

    def rows(self, start: int, stop: int) -> Iterator[Row]:
        readers: dict[str, RecordReader] = {}
        for number, (path, record) in enumerate(self._records(start, stop), start):
            if path not in readers:
                readers[path] = RecordReader(self._config, path)
            yield readers[path].row(number, record)

    # ------------------------------------------------------------------------------------------ planning

    def _plan(self) -> Placement:
        config = self._config
        path = self._path
        paths = input_paths(path, SUFFIXES[config.kind], "source.path (and source.table)")
        if not paths:
            raise ConfigError(f"{path}: a folder; set source.table to the {config.kind} file in it")
        if config.kind in ("json", "jsonl"):
            self._told |= dict.fromkeys(name for path in paths for name in self._partition(path))
            self._asked_columns -= self._told.keys()
        if config.kind == "json":
            return self._plan_json(paths)
        layout = Placement(tuple(self._plan_part(path) for path in paths))
        self._check_found(paths)
        return layout

    def _plan_part(self, path: str) -> Part:
        if self._config.kind == "parquet":
            return self._plan_parquet(path)
        places, rows = [], 0
        with open_input(path) as file:
            text = TextRecords(file, path, self._config)
            for rows, (place, record) in enumerate(text, 1):
                if rows == 1 and text.names:
                    self._check_columns(path, [*text.names, *self._partition(path)])
                if isinstance(record, str):
                    self._look_for_columns(record)
                if (rows - 1) % STRIDE == 0:
                    places.append(place)
        digest, size = input_digest(path)
        offsets, numbers = np.array(places, np.int64).reshape(-1, 2).T
        return Part(path, rows, digest, offsets, size, numbers)

    def _plan_parquet(self, path: str) -> Part:
        with open_input(path) as source, parquet_errors(path):
            file = pyarrow.parquet.ParquetFile(source)
            self._check_columns(path, [*file.schema_arrow.names, *self._partition(path)])
            digest = hashlib.sha256(_described(file.metadata, source))
            if self._config.parse_rule > 1:
                _add_columns(digest, file, source, self._config.image)
            return Part(path, file.metadata.num_rows, digest.hexdigest(), np.array([], np.int64))

    def _plan_json(self, paths: list[str]) -> Placement:
        """Plan JSON lists: they have no addressable rows, so the layout stores each item as one line."""
        each = []
        for path in paths:
            tree = load_json(path, self._config.encoding)
            if not isinstance(tree, list):
                raise DataError(f"{path}: {type(tree).__name__} instead of a list; use source.kind=jsonl for lines")
            each.append([json_line(item) for item in tree])
        for line in itertools.chain.from_iterable(each):
            self._look_for_columns(line)
        self._check_found(paths)
        if self._config.parse_rule == 1:  # rule 1 treats all files as one
            return lines_layout(paths[0], list(itertools.chain.from_iterable(each)))
        return joined([lines_layout(path, lines) for path, lines in zip(paths, each, strict=True)])

    def _asked(self) -> list[tuple[str, str]]:
        """Return (setting, column) for every column that the configuration names."""
        config = self._config
        asked = [("key", config.key), ("image", config.image), *(("captions", column) for column in config.captions)]
        asked += [("sha256", config.sha256), ("md5", config.md5)]
        return [(setting, column) for setting, column in asked if column is not None]

    def _check_columns(self, path: str, there: Collection[str]) -> None:
        for setting, column in self._asked():
            if list(there).count(column) > 1:
                raise ConfigError(f"source.{setting}={column!r}: {path} has several columns of this name; rename them")
            if column not in there:
                hint = "; source.quotes=true removes the quotation marks" if f'"{column}"' in there else ""
                listed = ", ".join(itertools.islice(there, _NAMES_SHOWN))
                raise ConfigError(f"source.{setting}={column!r}: not a column of {path}; columns are {listed}{hint}")

    def _look_for_columns(self, line: str) -> None:
        """Record the columns of a jsonl or json record; the table's columns are the union over its records."""
        if not self._asked_columns <= self._columns.keys():
            record = parse_object(line)
            self._columns |= {} if UNREADABLE in record else dict.fromkeys(record)

    def _check_found(self, paths: list[str]) -> None:
        if self._columns:
            self._check_columns(
                paths[0] if len(paths) == 1 else f"these {len(paths)} files", [*self._columns, *self._told]
            )

    # ------------------------------------------------------------------------------------------- reading

    def _records(self, start: int, stop: int, columns: list[str] | None = None) -> Iterator[tuple[str, Record]]:
        """Yield (path of the table, record) for rows [start, stop); parquet reads `columns` only."""
        for part, first, last in self.layout.ranges(start, stop):
            told = self._partition(part.path)
            wanted = None if columns is None or told.keys() & set(columns) else columns
            records = (
                self._part_records(part, first, last, wanted)
                if self.layout.lines is None
                else map(parse_object, self.layout.texts(start, start + last - first))
            )
            for record in records:
                yield part.path, {**told, **record} if told else record
            start += last - first

    def _partition(self, path: str) -> dict[str, str | None]:
        """Return the columns given by the folders of a partitioned table; none under parse rule 1."""
        return partition_of(self._path, path) if self._config.parse_rule > 1 else {}

    def _part_records(self, part: Part, first: int, last: int, columns: list[str] | None) -> Iterator[Record]:
        if self._config.kind == "parquet":
            yield from parquet_records(part, first, last, columns)
        elif len(part.offsets):
            with open_input(part.path) as file:
                place = RecordPlace(int(part.offsets[first // STRIDE]), int(part.numbers[first // STRIDE]))
                text = TextRecords(file, part.path, self._config, place)
                skipped = first % STRIDE
                for where, record in itertools.islice(text, skipped, skipped + last - first):
                    if isinstance(record, str):
                        yield parse_object(record)
                    else:
                        yield record if isinstance(record, dict) else text.named(where, record)


def load_json(path: str, encoding: str | None = None) -> Any:
    """Parse a whole JSON file; undecodable bytes are marked for `json_line`. Raises DataError if it is not JSON."""
    with open_input(path) as file:
        try:
            return json.loads(decode_around(file.read(), encoding))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: not JSON ({error}); check source.path and source.kind") from None


_PAUSED: dict[tuple[Any, ...], "ParquetReader"] = {}  # at most one


def parquet_records(part: Part, start: int, stop: int, columns: list[str] | None) -> Iterator[Record]:
    """Yield records [start, stop) of a parquet file; earlier row groups are not read.

    A row group can only be decoded from its start. If a range ends inside one, its reader is kept for this process's
    next range, so that a worker decodes a large group once instead of once per shard.
    """
    key = (part.path, part.digest, None if columns is None else tuple(columns))
    reader = _PAUSED.pop(key, None) or ParquetReader(part.path, columns)
    _forget_paused()
    try:
        yield from reader.records(start, stop)
        if reader.is_within_group(stop):
            _PAUSED[key] = reader
    finally:
        if key not in _PAUSED:
            reader.close()


def _forget_paused() -> None:
    while _PAUSED:
        _PAUSED.popitem()[1].close()


class ParquetReader:
    """Reads records of one parquet file; reading on from the previous range decodes nothing twice."""

    def __init__(self, path: str, columns: list[str] | None) -> None:
        self._path = path
        self._source = open_input(path)
        with parquet_errors(path):
            self._file = pyarrow.parquet.ParquetFile(self._source)
        metadata = self._file.metadata
        sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        self._begins = np.cumsum([0, *sizes])  # first row of each group, and the number of rows
        self._columns = columns
        self._batches: Iterator[tuple[int, Any]] = iter(())
        self._newest: tuple[int, Any] = (-1, None)  # (number of its first row, batch)

    def records(self, start: int, stop: int) -> Iterator[Record]:
        """Yield records [start, stop), or as many of them as the file has."""
        with parquet_errors(self._path):
            for first, batch in self._from(start):
                self._newest = first, batch
                begin, end = max(first, start), min(first + batch.num_rows, stop)
                if begin < end:
                    yield from _records_of(batch.slice(begin - first, end - begin))
                if end == stop:
                    return

    def is_within_group(self, row: int) -> bool:
        """Return whether `row` is strictly inside a row group, not at a boundary."""
        return row < self._begins[-1] and row not in self._begins

    def close(self) -> None:
        self._source.close()

    def _from(self, start: int) -> Iterator[tuple[int, Any]]:
        """Return (first row, batch) pairs from the group of row `start`, or from the current batch if it is closer."""
        group = int(np.searchsorted(self._begins, start, side="right")) - 1
        if self._begins[group] <= self._newest[0] <= start:
            return itertools.chain([self._newest], self._batches)
        self._batches = _decoded(self._file, self._begins, group, self._columns)  # without self: no reference cycle
        return self._batches


def _decoded(file: Any, begins: np.ndarray, group: int, columns: list[str] | None) -> Iterator[tuple[int, Any]]:
    """Yield (first row, batch) from a row group on. begins: first row of each group, then the number of rows."""
    # one reader per group: a reader over all groups prepares each of them, about 45 KB per group;
    # one thread: each Arrow thread keeps about 30 MB of its own
    options = {"batch_size": 256, "use_threads": False, "columns": columns}
    for number in range(group, len(begins) - 1):
        first = int(begins[number])
        for batch in file.iter_batches(row_groups=[number], **options):
            yield first, batch
            first += batch.num_rows


def _described(metadata: Any, source: BinaryIO) -> bytes:
    """Return a parquet file's metadata as JSON; its raw footer if the statistics cannot be decoded as text."""
    try:
        return json.dumps(metadata.to_dict(), sort_keys=True, default=str).encode()
    except (ValueError, OverflowError):
        source.seek(-8, io.SEEK_END)
        size = int.from_bytes(source.read(4), "little")
        source.seek(-8 - size, io.SEEK_END)
        return source.read(size)


def _add_columns(digest: Any, file: Any, source: BinaryIO, image: str) -> None:
    """Update a digest with the stored bytes of all columns but embedded images, whose sizes are in the footer."""
    kind = file.schema_arrow.field(image).type
    inside = not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind))
    for group in range(file.metadata.num_row_groups):
        columns = [file.metadata.row_group(group).column(number) for number in range(file.metadata.num_columns)]
        for column in columns:
            if inside and column.path_in_schema.partition(".")[0] == image:
                continue
            source.seek(min(filter(None, (column.dictionary_page_offset, column.data_page_offset)), default=0))
            left = column.total_compressed_size
            while left and (chunk := source.read(min(left, 1 << 22))):
                digest.update(chunk)
                left -= len(chunk)


def _records_of(batch: Any) -> list[Record]:
    """Return the records of a batch; values Python cannot represent, such as invalid UTF-8, make one unreadable."""
    try:
        return list(batch.to_pylist())
    except (ValueError, OverflowError, LookupError):
        return [_record_of(batch, number) for number in range(batch.num_rows)]


def _record_of(batch: Any, number: int) -> Record:
    record: Record = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            record[name] = _value_of(column.slice(number, 1))
        except (ValueError, OverflowError) as error:
            record[UNREADABLE] = f"column {name!r}: {error}"
    return record


def _value_of(column: Any) -> Any:
    """Return the value of a one-row column; times out of Python's range or in unknown time zones as text."""
    try:
        return column[0].as_py()
    except (ValueError, OverflowError, LookupError):
        kind = column.type
        if not pyarrow.types.is_temporal(kind):
            raise
        if pyarrow.types.is_timestamp(kind):
            column = column.cast(pyarrow.timestamp(kind.unit, "UTC" if kind.tz else None))
        return column.cast(pyarrow.string())[0].as_py()


@contextlib.contextmanager
def parquet_errors(path: str) -> Iterator[None]:
    """Convert Arrow's errors to a DataError."""
    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        said = " ".join(str(error).split())
        raise DataError(f"{path}: not a valid parquet file ({said:.200}); download it again") from None


def published_table(config: PairsSource, layout: Placement | None = None) -> Table:
    """Open cc3m or muge as the tsv table it is published as."""
    columns = {"cc3m": ("caption", "url"), "muge": ("id", "caption", "image")}[config.kind]
    settings = TableSource(
        kind="tsv",
        path=config.path,
        image=columns[-1] if config.kind == "muge" else "url",
        captions=("caption",),
        columns=columns,
        quotes=False,
        base64=config.kind == "muge",
        parse_rule=config.parse_rule,
    )
    return Table(settings, layout)
