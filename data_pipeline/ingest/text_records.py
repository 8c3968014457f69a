"""Read records of a csv, tsv or jsonl file, from its start or from the place of any record.

Every physical line belongs to exactly one record, and records are the same wherever reading starts. Only a quoted field
may span several lines. A quotation mark that opens a field without closing it as RFC 4180 requires rejects only its own
line (`unclosed_quote`); reading continues afresh with the next line.
"""

import csv
import itertools
import json
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

from data_pipeline.config import TableSource
from data_pipeline.errors import DataError
from data_pipeline.ingest.unreadable import unreadable
from data_pipeline.text_files import encoding_of, newline_of, undecodable

MAX_FIELD_CHARS = 64 * 1024**2

Record = dict[str, Any]

_HEAD = 4096
_CHUNK = 1 << 20


class RecordPlace(NamedTuple):
    """Start of a physical line: byte offset and line number, starting at 1."""

    offset: int
    number: int


class Line(NamedTuple):
    """A physical line including its line end. fault: why its bytes cannot be decoded, else empty."""

    place: RecordPlace
    text: str
    fault: str


class Lines:
    """Iterator over the physical lines of a file; lines that are handed back are yielded again.

    Lines end with a line feed, or with a carriage return if the file has no line feed in its first MiB. Under parse
    rule 1 every file is UTF-8 with line feeds, and undecodable bytes are replaced.
    """

    def __init__(self, file: BinaryIO, config: TableSource) -> None:
        self._file, self._old = file, config.parse_rule == 1
        head = file.read(_HEAD)
        self._codec, mark = encoding_of(head, config.encoding)
        if self._old:
            self._codec, mark = "utf-8", mark if self._codec == "utf-8" else 0
        self._newline = newline_of(self._codec)
        carriage_return = "\r".encode(self._codec)
        if carriage_return in head and self._newline not in head and not self._old:
            head += file.read(_CHUNK)
            self._newline = self._newline if self._newline in head else carriage_return
        self._waiting: list[Line] = []  # in reverse order
        self.seek(RecordPlace(mark, 1))

    @property
    def place(self) -> RecordPlace:
        """Place of the next line."""
        return self._waiting[-1].place if self._waiting else self._place

    def seek(self, place: RecordPlace) -> None:
        """Continue with the line that begins at `place`."""
        self._file.seek(place.offset)
        self._waiting.clear()
        self._place = place
        self._raw = self._split() if self._newline != b"\n" else iter(self._file.readline, b"")

    def hand_back(self, lines: list[Line]) -> None:
        """Push back the last lines read, to be yielded again."""
        self._waiting += reversed(lines)

    def __iter__(self) -> "Lines":
        return self

    def __next__(self) -> Line:
        if self._waiting:
            return self._waiting.pop()
        raw, place = next(self._raw), self._place
        self._place = RecordPlace(place.offset + len(raw), place.number + 1)
        try:
            text, fault = raw.decode(self._codec), ""
        except UnicodeDecodeError as error:
            text = raw.decode(self._codec, "replace")
            fault = "" if self._old else f"line {place.number}: {undecodable(error, place.offset)}"
        return Line(place, text if self._old else text.lstrip("\ufeff"), fault)

    def _split(self) -> Iterator[bytes]:
        """Yield lines whose line end is not the single byte of a line feed."""
        rest = b""
        while chunk := self._file.read(_CHUNK):
            rest += chunk
            start = 0
            while stop := _after(self._newline, rest, start):
                yield rest[start:stop]
                start = stop
            rest = rest[start:]
        if rest:
            yield rest


def _after(newline: bytes, data: bytes, start: int) -> int:
    """Return the end of the line that begins at `start`; 0 if `data` ends first. newline: one code unit."""
    found = data.find(newline, start)
    while found >= 0 and (found - start) % len(newline):
        found = data.find(newline, found + 1)
    return found + len(newline) if found >= 0 else 0


class _Feed:
    """Iterator over the text of the line given to `begin` and of the lines that follow; keeps a list of them."""

    def __init__(self, lines: Lines) -> None:
        self._lines = lines
        self._taken: list[Line] = []
        self._first: Line | None = None

    def begin(self, first: Line) -> list[Line]:
        """Start at `first`. Returns the list of lines, which grows as they are consumed."""
        self._first, self._taken = first, [first]
        return self._taken

    def __iter__(self) -> "_Feed":
        return self

    def __next__(self) -> str:
        if self._first is not None:
            line, self._first = self._first, None
        else:
            line = next(self._lines)
            self._taken.append(line)
        return line.text


def _object(text: str) -> Record:
    """Return the columns of a jsonl record; empty if it is not a JSON object."""
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return tree if isinstance(tree, dict) else {}


class TextRecords:
    """Iterable of (place, record) of a text table, from its first record or from the one at `place`.

    A jsonl record is its line; a csv or tsv record is a list of fields, as `named` takes it; an unreadable one is the
    result of `unreadable`. names: the columns of a csv or tsv. Raises DataError for an unreadable header.
    """

    def __init__(self, file: BinaryIO, path: str, config: TableSource, place: RecordPlace | None = None) -> None:
        csv.field_size_limit(MAX_FIELD_CHARS)
        self._old = config.parse_rule == 1
        self._lines = Lines(file, config)
        self._jsonl = config.kind == "jsonl"
        self._delimiter = "\t" if config.kind == "tsv" else ","
        self._quoted, self._key = config.quoted, config.key
        self._feed = _Feed(self._lines)
        self._strict = csv.reader(self._feed, delimiter=self._delimiter, strict=True)
        self.names: list[str] = list(config.columns or ())
        if not self._jsonl and not self.names:
            self.names = self._header(path)
        if place is not None:
            self._lines.seek(place)

    def __iter__(self) -> Iterator[tuple[RecordPlace, Record | list[str] | str]]:
        if self._jsonl:
            return self._texts()
        return self._loosely_quoted() if self._old and self._quoted else self._fields()

    def named(self, place: RecordPlace, fields: list[str]) -> Record:
        """Return the fields of a record by column name; an unreadable record if there are too many."""
        if len(fields) > len(self.names):
            shown = f"{len(fields)} fields, {len(self.names)} columns: {self._delimiter.join(fields):.80}"
            return unreadable(f"line {place.number}: {shown}")
        return dict(zip(self.names, fields, strict=False))

    def _header(self, path: str) -> list[str]:
        for _, fields in self:
            if isinstance(fields, list):
                return fields
            if isinstance(fields, dict) and not self._old:
                raise DataError(
                    f"{path}: cannot read the header line ({'; '.join(map(str, fields.values()))}); correct "
                    "it, or set source.encoding, source.quotes or source.columns"
                )
        return []

    def _texts(self) -> Iterator[tuple[RecordPlace, Record | str]]:
        for place, text, fault in self._lines:
            if text.strip():
                yield place, self._rejected(fault, "wrong_encoding", _object(text)) if fault else text

    def _fields(self) -> Iterator[tuple[RecordPlace, Record | list[str]]]:
        for line in self._lines:
            if not (text := line.text.rstrip("\r\n")):
                continue
            if self._quoted and '"' in text:
                yield line.place, self._strictly_quoted(line)
            elif line.fault:
                yield line.place, self._undecodable(line.fault, text.split(self._delimiter))
            else:
                yield line.place, text.split(self._delimiter)

    def _strictly_quoted(self, first: Line) -> Record | list[str]:
        """Parse the record that begins with this line; later lines are consumed only for a multi-line quoted field."""
        lines = self._feed.begin(first)
        try:
            fields = next(self._strict)
            fault = self._miscount(fields) if len(lines) > 1 else ""
        except csv.Error as error:
            fields, fault = [], str(error)
        if fault:
            self._lines.hand_back(lines[1:])
            return self._unclosed(first, fault, lines[-1].place.number)
        wrong = next((line.fault for line in lines if line.fault), "")
        return self._undecodable(wrong, fields) if wrong else fields

    def _miscount(self, fields: list[str]) -> str:
        """Return why a multi-line record is wrong (field count: the closing quote is not its own), else empty."""
        if not self.names or len(fields) == len(self.names):
            return ""
        return f"{len(fields)} fields instead of {len(self.names)}"

    def _unclosed(self, line: Line, fault: str, last: int) -> Record:
        """Return the record of an unclosed quote. fault: the error of csv; last: line number where it was found."""
        head = f"line {line.place.number}: "
        if last == line.place.number and ("new-line" in fault or "larger" in fault):
            return unreadable(f"{head}{fault}")
        where = "" if last == line.place.number else f", up to line {last}"
        before = itertools.takewhile(lambda field: not field.startswith('"'), line.text.split(self._delimiter))
        return self._rejected(
            f"{head}a quotation mark opens a field and is not closed{where} ({fault}); write a "
            f"literal quotation mark twice, or set source.quotes=false: {line.text.strip():.80}",
            "unclosed_quote",
            dict(zip(self.names, before, strict=False)),
        )

    def _undecodable(self, fault: str, fields: list[str]) -> Record:
        return self._rejected(fault, "wrong_encoding", dict(zip(self.names, fields, strict=False)))

    def _rejected(self, detail: str, reason: str, columns: Record) -> Record:
        """Return an unreadable record, with its key if that is readable, so that a retry can find the row."""
        key = columns.get(self._key) if self._key is not None else None
        named = {} if key is None or "\ufffd" in str(key) else {str(self._key): key}
        return {**named, **unreadable(detail, reason)}

    def _loosely_quoted(self) -> Iterator[tuple[RecordPlace, Record | list[str]]]:
        """Yield records under parse rule 1, where an unclosed quotation mark absorbs the following lines."""
        reader = csv.reader((line.text for line in self._lines), delimiter=self._delimiter)
        while True:
            place = self._lines.place
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield place, unreadable(f"line {place.number}: {error}")
                continue
            if fields:
                yield place, fields
