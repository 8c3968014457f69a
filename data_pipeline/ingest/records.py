"""Convert table records to a Pair, a Link or a Drop: map columns, load images, extract captions."""

import base64
import binascii
import contextlib
import datetime
import json
import math
from collections.abc import Collection, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

from data_pipeline.config import TableSource
from data_pipeline.ingest.inputs import beside, must_exist, open_input, read_input, without_query
from data_pipeline.ingest.layout import Row
from data_pipeline.ingest.unreadable import REASON, UNREADABLE, unreadable
from data_pipeline.patterns import is_remote
from data_pipeline.schema import Drop, Link, Pair
from data_pipeline.shards.samples import NESTED_AT_MOST, as_captions, parse_json
from data_pipeline.shards.tar import Member, refuse_compressed, scan
from data_pipeline.text_files import wrong_byte

_LARGEST = 1 << 63
RESERVED = ("captions", "key")  # present in the .json of every sample
_STANDARD_ALPHABET = bytes.maketrans(b"-_", b"+/")


class RecordReader:
    """Converts the records of one table to rows. path: of the table; image names resolve against its folder."""

    def __init__(self, config: TableSource, path: str) -> None:
        self._config = config
        self._path = path
        self._store: ImageStore | None = None
        self._used = {config.key, config.image, config.sha256, config.md5, *config.captions}

    def row(self, number: int, record: Mapping[str, Any]) -> Row:
        """Convert one record to a row. Bad contents never raise; they give a Drop with the reason."""
        config = self._config
        key = key_of(record, config.key, number)
        if (drop := unnamed(record, config.key, key)) is not None:
            return drop
        try:
            captions = tuple(text for column in config.captions for text in as_captions(_there(record, column)))
        except TypeError as error:
            return Drop(key, "unreadable_caption", str(error))
        meta = attributes(record, self._used)
        value = record.get(config.image)
        if is_missing(value) or value == b"":
            return Drop(key, "no_image", f"column {config.image!r} is empty")
        if isinstance(value, str) and value.lstrip().lower().startswith(("http://", "https://")):
            digests = [_text_of(record, column) for column in (config.sha256, config.md5)]
            return Link(key, as_unicode(value.strip()), captions, meta, *digests)
        try:
            return Pair(key, self._image(value), captions, meta)
        except binascii.Error as error:
            return Drop(key, "wrong_base64", f"column {config.image!r}: {error}")
        except (OSError, ValueError) as error:
            return Drop(key, "unreadable_file", str(error))

    def _image(self, value: Any) -> bytes:
        if isinstance(value, Mapping):  # {"bytes": ..., "path": ...}, the image format of Hugging Face datasets
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes) and not self._config.base64:
            return value
        if self._config.base64:
            text = value if isinstance(value, bytes) else str(value).encode("ascii", "replace")
            text = text.strip().rstrip(b"=").translate(_STANDARD_ALPHABET)
            return base64.b64decode(text + b"=" * (-len(text) % 4), validate=True)
        if self._store is None:
            self._store = ImageStore(beside(self._path, self._config.images))
        return self._store.read(str(value))


def key_of(record: Mapping[str, Any], column: str | None, number: int) -> str:
    """Return the key of row `number`: its key column, else its number.

    If the key column is empty, it is "row NUMBER", which cannot be mistaken for a key.
    """
    if column is None:
        return f"{number:09d}"
    value = record.get(column)
    return f"row {number:09d}" if is_missing(value) else str(value)


def is_missing(value: Any) -> bool:
    """Return whether a value is null, an empty string, or NaN (how pandas writes null)."""
    return value is None or value == "" or (isinstance(value, float | Decimal) and value != value)


def _there(record: Mapping[str, Any], column: str) -> Any:
    value = record.get(column)
    return None if is_missing(value) else value


def _text_of(record: Mapping[str, Any], column: str | None) -> str:
    return "" if column is None or is_missing(record.get(column)) else str(record[column])


def as_unicode(text: str) -> str:
    """Escape what UTF-8 cannot encode (lone surrogates, undecodable bytes) with backslashes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def unnamed(record: Mapping[str, Any], column: str | None, key: str) -> Drop | None:
    """Return the Drop of an unreadable record or one without a key; None for any other."""
    if UNREADABLE in record:
        return Drop(key, str(record.get(REASON, "unreadable_row")), str(record[UNREADABLE]))
    if column is not None and is_missing(record.get(column)):
        return Drop(key, "no_key", f"column {column!r} is empty")
    return None


class ImageStore:
    """Read files by name from a folder or a tar (scanned once), local or remote."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._members: dict[str, Member] | None = None
        if not is_remote(path):
            must_exist(Path(path), "source.images")
        if not Path(path).is_dir():
            refuse_compressed([without_query(path).rpartition("/")[2]], path)
        if without_query(path).endswith(".tar"):
            with open_input(path) as file:
                self._members = {member.name.removeprefix("./"): member for member in scan(file, path)}

    def read(self, name: str) -> bytes:
        """Read one file. Raises OSError if it is missing, or if its name leads outside the folder."""
        if self._members is not None:
            return self._member(name)
        if is_remote(self._path):
            return self._remote(name)
        path = (Path(self._path) / name).resolve()
        if not path.is_relative_to(Path(self._path).resolve()):
            raise OSError(f"{name!r} is outside of {self._path}")
        return path.read_bytes()

    def _member(self, name: str) -> bytes:
        assert self._members is not None
        member = self._members.get(name.removeprefix("./"))
        if member is None:
            raise FileNotFoundError(f"{name!r} is not in {self._path}")
        if member.instead:
            raise OSError(f"{name!r} is {member.instead} in {self._path}, which is not read; pack the file itself")
        with open_input(self._path) as file:
            file.seek(member.data)
            return file.read(member.size)

    def _remote(self, name: str) -> bytes:
        """Read one remote file. Raises OSError only for a missing file or an invalid name, which reject the row.

        A failing server is no fault of the row and raises DataError.
        """
        if "://" in name or name.startswith("/") or ".." in name.split("/"):
            raise OSError(f"{name!r} is outside of {self._path}")
        return read_input(f"{self._path}/{name}")


def parse_object(line: str) -> dict[str, Any]:
    """Parse one line of JSON. Returns its object, or {UNREADABLE: reason} if it is not one."""
    try:
        record = parse_json(line)
    except ValueError as error:
        return {UNREADABLE: f"{error}: {line:.80}"}
    return record if isinstance(record, dict) else {UNREADABLE: f"not a JSON object: {line:.80}"}


def json_line(tree: Any) -> str:
    """Serialize a value of `load_json` as one line for `parse_object`.

    An object with undecodable bytes keeps its readable columns and is marked unreadable.
    """
    try:
        line = json.dumps(tree, ensure_ascii=False)
        if wrong := wrong_byte(line):
            columns = tree if isinstance(tree, dict) else {}
            pairs = ((name, json.dumps({name: value}, ensure_ascii=False)) for name, value in columns.items())
            readable = {name: columns[name] for name, text in pairs if not wrong_byte(text)}
            line = json.dumps(readable | unreadable(wrong, "wrong_encoding"))
        return as_unicode(line)
    except RecursionError:
        return json.dumps({UNREADABLE: f"nested deeper than {NESTED_AT_MOST} levels"})


def json_value(value: Any) -> Any:
    """Convert a table value to a JSON value.

    NaN and infinities, which JSON lacks, become null; times and dates ISO 8601 strings, durations seconds; integral
    decimals within 64 bits integers, other decimals strings, which are exact; maps with unique string keys objects,
    other maps lists of pairs; any other type its string form. Raises TypeError for bytes.
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, dict):
        return {str(name): json_value(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return _map_or_list(value)
    if isinstance(value, bytes):
        raise TypeError("JSON cannot hold bytes")
    if isinstance(value, datetime.timedelta):
        return value.total_seconds()
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, Decimal) and value.as_tuple().exponent == 0 and abs(value) < _LARGEST:
        return int(value)
    return str(value)


def _map_or_list(value: list[Any] | tuple[Any, ...]) -> Any:
    """Convert a list; Arrow returns a map as a list of (key, value), which becomes an object if keys are unique."""
    pairs = [item for item in value if isinstance(item, tuple) and len(item) == 2]
    if pairs and len(pairs) == len(value) == len({name for name, _ in pairs if isinstance(name, str)}):
        return {name: json_value(item) for name, item in pairs}
    return [json_value(item) for item in value]


def attributes(record: Mapping[str, Any], used: Collection[str | None]) -> dict[str, Any]:
    """Return the columns not in `used`, except those with bytes, as JSON values.

    `key` and `captions`, reserved for the sample's own, are renamed to source_key and source_captions.
    """
    meta = {}
    for name, item in record.items():
        if name not in used:
            with contextlib.suppress(TypeError):
                meta[_free_name(name, record)] = json_value(item)
    return meta


def _free_name(name: str, record: Mapping[str, Any]) -> str:
    if name not in RESERVED:
        return name
    while (name := f"source_{name}") in record:
        pass
    return name
