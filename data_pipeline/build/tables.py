"""csv, tsv, jsonl, json and parquet, read from any row on.

Text is read once when the build is planned, which notes where every STRIDE-th record begins; later a task opens the
file there. Records are found by the same code both times, so a quotation mark that never closes cannot shift them.
"""

import contextlib
import csv
import hashlib
import io
import itertools
import json
from collections.abc import Iterator
from functools import cached_property
from typing import Any, BinaryIO

import numpy as np
import pyarrow
import pyarrow.parquet

from data_pipeline.build.inputs import beside, input_digest, input_paths, open_input
from data_pipeline.build.layout import STRIDE, Layout, Part, Row, lines_layout
from data_pipeline.build.records import UNREADABLE, RecordReader, json_line, key_of, parse_object
from data_pipeline.config import PairsSource, TableSource
from data_pipeline.errors import ConfigError, DataError
from data_pipeline.text_files import decode_text

SUFFIXES = {
    "csv": (".csv", ".csv.gz"),
    "tsv": (".tsv", ".tsv.gz"),
    "json": (".json", ".json.gz"),
    "jsonl": (".jsonl", ".jsonl.gz"),
    "parquet": (".parquet",),
}
MAX_FIELD_BYTES = 64 * 1024**2

Record = dict[str, Any]


class Table:
    """Rows of one or several tables of one kind; images in a folder, in a tar, inline, or to be fetched."""

    def __init__(self, config: TableSource, layout: Layout | None = None) -> None:
        self._config = config
        self._given = layout

    @cached_property
    def layout(self) -> Layout:
        """Where the rows are; read now unless it was handed over."""
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

    def _plan(self) -> Layout:
        config = self._config
        path = config.path if config.table is None else beside(f"{config.path}/x", config.table)
        paths = input_paths(path, SUFFIXES[config.kind], "source.path (and source.table)")
        if not paths:
            raise ConfigError(f"{path}: a folder; name the {config.kind} file in it as source.table")
        if config.kind == "json":
            return self._plan_json(paths)
        return Layout(tuple(self._plan_part(path) for path in paths))

    def _plan_part(self, path: str) -> Part:
        if self._config.kind == "parquet":
            return self._plan_parquet(path)
        offsets, rows, names = [], 0, list(self._config.columns or ())
        with open_input(path) as file:
            text = TextRecords(file, self._config)
            names = text.names
            for rows, (offset, record) in enumerate(text, 1):
                if rows == 1 and isinstance(record, dict):  # a jsonl file's columns are those of its first row
                    names = [name for name in record if name != UNREADABLE]
                if (rows - 1) % STRIDE == 0:
                    offsets.append(offset)
        if rows and names:
            self._check_columns(path, names)
        digest, size = input_digest(path)
        return Part(path, rows, digest, np.array(offsets, np.int64), size)

    def _plan_parquet(self, path: str) -> Part:
        with open_input(path) as source, parquet_errors(path):
            file = pyarrow.parquet.ParquetFile(source)
            self._check_columns(path, list(file.schema_arrow.names))
            digest = hashlib.sha256(_described(file.metadata, source)).hexdigest()
            return Part(path, file.metadata.num_rows, digest, np.array([], np.int64))

    def _plan_json(self, paths: list[str]) -> Layout:
        """A JSON list has no rows that could be found again: each is kept as one line."""
        lines: list[str] = []
        for path in paths:
            tree = load_json(path)
            if not isinstance(tree, list):
                raise DataError(f"{path}: holds {type(tree).__name__}; kind json is a list of objects, else use jsonl")
            lines += [json_line(item) for item in tree]
        first = parse_object(lines[0]) if lines else {UNREADABLE: ""}
        if UNREADABLE not in first:
            self._check_columns(paths[0], list(first))
        return lines_layout(paths[0], lines)

    def _check_columns(self, path: str, there: list[str]) -> None:
        config = self._config
        asked = [("key", config.key), ("image", config.image), *(("captions", column) for column in config.captions)]
        for name, column in [*asked, ("sha256", config.sha256), ("md5", config.md5)]:
            if column is not None and column not in there:
                raise ConfigError(f"source.{name}={column!r}: not a column of {path}, it has {', '.join(there)}")

    # ------------------------------------------------------------------------------------------- reading

    def _records(self, start: int, stop: int, columns: list[str] | None = None) -> Iterator[tuple[str, Record]]:
        """(path of the table, record) of rows [start, stop); parquet reads `columns` only."""
        for part, first, last in self.layout.ranges(start, stop):
            yield from ((part.path, record) for record in self._part_records(part, first, last, columns))

    def _part_records(self, part: Part, first: int, last: int, columns: list[str] | None) -> Iterator[Record]:
        if self.layout.lines is not None:
            yield from (parse_object(line) for line in self.layout.texts(first, last))
        elif self._config.kind == "parquet":
            yield from parquet_records(part, first, last, columns)
        elif len(part.offsets):
            with open_input(part.path) as file:
                text = TextRecords(file, self._config, int(part.offsets[first // STRIDE]))
                skipped = first % STRIDE
                for _, record in itertools.islice(text, skipped, skipped + last - first):
                    yield record if isinstance(record, dict) else text.named(record)


class TextRecords:
    """(offset, record) of a text table from its first record, or from the one at `offset`, on.

    A jsonl record is a mapping, a csv or tsv record a list of fields, as `named` takes it; a record that cannot be
    read is {UNREADABLE: why}. names: the columns of a csv or tsv.
    """

    def __init__(self, file: BinaryIO, config: TableSource, offset: int | None = None) -> None:
        self._lines = _Lines(file)
        self._jsonl = config.kind == "jsonl"
        self._delimiter = "\t" if config.kind == "tsv" else ","
        self._quotes = config.quotes
        self.names: list[str] = list(config.columns or ())
        if not self._jsonl and not self.names:
            self.names = next((fields for _, fields in self._fields() if isinstance(fields, list)), [])
        if offset is not None:
            self._lines.seek(offset)

    def __iter__(self) -> Iterator[tuple[int, Record | list[str]]]:
        return self._objects() if self._jsonl else self._fields()

    def named(self, fields: list[str]) -> Record:
        """A line's fields under the names of the columns."""
        if len(fields) > len(self.names):
            return {UNREADABLE: f"{len(fields)} fields, {len(self.names)} columns: {self._delimiter.join(fields):.80}"}
        return dict(zip(self.names, fields, strict=False))

    def _objects(self) -> Iterator[tuple[int, Record]]:
        for line in self._lines:
            if line.strip():
                yield self._lines.start, parse_object(line)

    def _fields(self) -> Iterator[tuple[int, Record | list[str]]]:
        if not self._quotes:
            for line in self._lines:
                if line.strip("\r\n"):
                    yield self._lines.start, line.rstrip("\r\n").split(self._delimiter)
            return
        csv.field_size_limit(MAX_FIELD_BYTES)
        reader = csv.reader(self._lines, delimiter=self._delimiter)
        while True:
            start = self._lines.stop
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield start, {UNREADABLE: f"{error}, at byte {start}"}
                continue
            if fields:
                yield start, fields


class _Lines:
    """Text lines of a binary file, one at a time, with the byte where the newest begins and ends."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.start = self.stop = 0

    def seek(self, offset: int) -> None:
        self._file.seek(offset)
        self.start = self.stop = offset

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = self._file.readline()
        if not line:
            raise StopIteration
        self.start = self.stop
        self.stop += len(line)
        return line.decode("utf-8-sig" if self.start == 0 else "utf-8", "replace")


def load_json(path: str) -> Any:
    """A whole JSON file. Raises DataError where it is none."""
    with open_input(path) as file:
        try:
            return json.loads(decode_text(file.read()))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: not JSON ({error}); check source.path and source.kind") from None


_PAUSED: dict[tuple[Any, ...], "ParquetReader"] = {}  # at most one


def parquet_records(part: Part, start: int, stop: int, columns: list[str] | None) -> Iterator[Record]:
    """Records [start, stop) of a parquet file; row groups before them are not read.

    A row group is decoded from its beginning only. Where a range ends within one, its reader waits for the next range
    of this process, so that a worker decodes a large group once and not once a shard.
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
    """Records of one parquet file; going on after the last one that was asked for decodes nothing twice."""

    def __init__(self, path: str, columns: list[str] | None) -> None:
        self._path = path
        self._source = open_input(path)
        with parquet_errors(path):
            self._file = pyarrow.parquet.ParquetFile(self._source)
        metadata = self._file.metadata
        sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        self._begins = np.cumsum([0, *sizes])  # of the groups, and the end
        self._columns = columns
        self._batches: Iterator[tuple[int, Any]] = iter(())
        self._newest: tuple[int, Any] = (-1, None)  # (number of its first row, batch)

    def records(self, start: int, stop: int) -> Iterator[Record]:
        """Records [start, stop), or as many of them as the file has."""
        with parquet_errors(self._path):
            for first, batch in self._from(start):
                self._newest = first, batch
                begin, end = max(first, start), min(first + batch.num_rows, stop)
                if begin < end:
                    yield from _records_of(batch.slice(begin - first, end - begin))
                if end == stop:
                    return

    def is_within_group(self, row: int) -> bool:
        """Is there a row group that begins before this row and ends after it?"""
        return row < self._begins[-1] and row not in self._begins

    def close(self) -> None:
        self._source.close()

    def _from(self, start: int) -> Iterator[tuple[int, Any]]:
        """Batches from the group of row `start` on, or from where this reader stands where that is further."""
        group = int(np.searchsorted(self._begins, start, side="right")) - 1
        if self._begins[group] <= self._newest[0] <= start:
            return itertools.chain([self._newest], self._batches)
        self._batches = _decoded(self._file, self._begins, group, self._columns)  # without self: no cycle to collect
        return self._batches


def _decoded(file: Any, begins: np.ndarray, group: int, columns: list[str] | None) -> Iterator[tuple[int, Any]]:
    """(number of its first row, batch) from a row group on; `begins` are the groups' first rows, and the end."""
    # a reader of one group at a time: one of all prepares them all, some 45 KB each; and by one thread: each of Arrow's
    # keeps memory of its own, some 30 MB
    options = {"batch_size": 256, "use_threads": False, "columns": columns}
    for number in range(group, len(begins) - 1):
        first = int(begins[number])
        for batch in file.iter_batches(row_groups=[number], **options):
            yield first, batch
            first += batch.num_rows


def _described(metadata: Any, source: BinaryIO) -> bytes:
    """What a parquet file says about itself: its footer, as it is where its statistics are no text."""
    try:
        return json.dumps(metadata.to_dict(), sort_keys=True, default=str).encode()
    except (ValueError, OverflowError):
        source.seek(-8, io.SEEK_END)
        size = int.from_bytes(source.read(4), "little")
        source.seek(-8 - size, io.SEEK_END)
        return source.read(size)


def _records_of(batch: Any) -> list[Record]:
    """The records of a batch; one with a value that Python cannot hold, such as text that is not UTF-8, says so."""
    try:
        return list(batch.to_pylist())
    except (ValueError, OverflowError):
        return [_record_of(batch, number) for number in range(batch.num_rows)]


def _record_of(batch: Any, number: int) -> Record:
    record: Record = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            record[name] = column[number].as_py()
        except (ValueError, OverflowError) as error:
            record[UNREADABLE] = f"column {name!r}: {error}"
    return record


@contextlib.contextmanager
def parquet_errors(path: str) -> Iterator[None]:
    """Turns what Arrow raises into a DataError."""
    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        said = " ".join(str(error).split())
        raise DataError(f"{path}: not a parquet file, or a damaged one ({said:.200}); fetch it again") from None


def published_table(config: PairsSource, layout: Layout | None = None) -> Table:
    """cc3m and muge as the tables that they are."""
    columns = {"cc3m": ("caption", "url"), "muge": ("id", "caption", "image")}[config.kind]
    settings = TableSource(
        kind="tsv",
        path=config.path,
        image=columns[-1] if config.kind == "muge" else "url",
        captions=("caption",),
        columns=columns,
        quotes=False,
        base64=config.kind == "muge",
    )
    return Table(settings, layout)
