"""One record of a table -> a Pair, a Link or a Drop: columns are mapped, images looked up, captions taken apart."""

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
RESERVED = ("captions", "key")  # what the .json of every sample has
_STANDARD_ALPHABET = bytes.maketrans(b"-_", b"+/")


class RecordReader:
    """Records of one table as rows; `path` is the table's, where images are looked for beside it."""

    def __init__(self, config: TableSource, path: str) -> None:
        self._config = config
        self._path = path
        self._store: ImageStore | None = None
        self._used = {config.key, config.image, config.sha256, config.md5, *config.captions}

    def row(self, number: int, record: Mapping[str, Any]) -> Row:
        """Never raises for what is in the record: a Drop says what is wrong with it."""
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
        if isinstance(value, Mapping):  # {"bytes": ..., "path": ...}, as Hugging Face's datasets writes images
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
    """What names row `number` of a source: its key column; a row that has nothing there by its place, as no key is."""
    if column is None:
        return f"{number:09d}"
    value = record.get(column)
    return f"row {number:09d}" if is_missing(value) else str(value)


def is_missing(value: Any) -> bool:
    """Is it null, empty text, or NaN, which is what pandas makes of null?"""
    return value is None or value == "" or (isinstance(value, float | Decimal) and value != value)


def _there(record: Mapping[str, Any], column: str) -> Any:
    value = record.get(column)
    return None if is_missing(value) else value


def _text_of(record: Mapping[str, Any], column: str | None) -> str:
    return "" if column is None or is_missing(record.get(column)) else str(record[column])


def as_unicode(text: str) -> str:
    """The text, with what UTF-8 cannot say (half of a surrogate pair, a byte of another encoding) as an escape."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def unnamed(record: Mapping[str, Any], column: str | None, key: str) -> Drop | None:
    """Why nothing can be made of a record before it is looked at further; None where something may."""
    if UNREADABLE in record:
        return Drop(key, str(record.get(REASON, "unreadable_row")), str(record[UNREADABLE]))
    if column is not None and is_missing(record.get(column)):
        return Drop(key, "no_key", f"column {column!r} is empty")
    return None


class ImageStore:
    """Files by name, in a folder or in one tar (scanned once), here or on S3."""

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
        """Raises OSError where there is no such file; names that leave the folder are refused."""
        if self._members is not None:
            return self._member(name)
        if is_remote(self._path):
            return self._remote(name)
        path = (Path(self._path) / name).resolve()
        if not path.is_relative_to(Path(self._path).resolve()):
            raise OSError(f"{name!r} lies outside of {self._path}")
        return path.read_bytes()

    def _member(self, name: str) -> bytes:
        assert self._members is not None
        member = self._members.get(name.removeprefix("./"))
        if member is None:
            raise FileNotFoundError(f"{name!r} is not in {self._path}")
        if member.instead:
            raise OSError(f"{name!r} is {member.instead} in {self._path}, which is not followed; pack the file itself")
        with open_input(self._path) as file:
            file.seek(member.data)
            return file.read(member.size)

    def _remote(self, name: str) -> bytes:
        """Raises OSError for what is not there alone: a server that fails says nothing about the row."""
        if "://" in name or name.startswith("/") or ".." in name.split("/"):
            raise OSError(f"{name!r} lies outside of {self._path}")
        return read_input(f"{self._path}/{name}")


def parse_object(line: str) -> dict[str, Any]:
    """One line of JSON -> its mapping, or {UNREADABLE: why it is none}."""
    try:
        record = parse_json(line)
    except ValueError as error:
        return {UNREADABLE: f"{error}: {line:.80}"}
    return record if isinstance(record, dict) else {UNREADABLE: f"not a JSON object: {line:.80}"}


def json_line(tree: Any) -> str:
    """A value of `load_json` as one line, for `parse_object`; of one with bytes that are not text what can be read."""
    try:
        line = json.dumps(tree, ensure_ascii=False)
        if wrong := wrong_byte(line):
            columns = tree if isinstance(tree, dict) else {}
            pairs = ((name, json.dumps({name: value}, ensure_ascii=False)) for name, value in columns.items())
            readable = {name: columns[name] for name, text in pairs if not wrong_byte(text)}
            line = json.dumps(readable | unreadable(wrong, "wrong_encoding"))
        return as_unicode(line)
    except RecursionError:
        return json.dumps({UNREADABLE: f"nested more than {NESTED_AT_MOST} levels deep"})


def json_value(value: Any) -> Any:
    """A value of a table as it can stand in a .json file.

    NaN and infinities, which JSON lacks, become null; times and dates ISO 8601 text, durations seconds; decimals
    of 64 bits without digits after the point integers, else text, which is exact; maps with unique texts as keys
    objects, other maps lists of pairs; any other type its text. Raises TypeError for bytes.
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
        raise TypeError("bytes cannot stand in JSON")
    if isinstance(value, datetime.timedelta):
        return value.total_seconds()
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, Decimal) and value.as_tuple().exponent == 0 and abs(value) < _LARGEST:
        return int(value)
    return str(value)


def _map_or_list(value: list[Any] | tuple[Any, ...]) -> Any:
    """Arrow gives a map as a list of (key, value)."""
    pairs = [item for item in value if isinstance(item, tuple) and len(item) == 2]
    if pairs and len(pairs) == len(value) == len({name for name, _ in pairs if isinstance(name, str)}):
        return {name: json_value(item) for name, item in pairs}
    return [json_value(item) for item in value]


def attributes(record: Mapping[str, Any], used: Collection[str | None]) -> dict[str, Any]:
    """The columns that have no other use, but for those of bytes. `key` and `captions`, which are a sample's own, are
    kept as source_key and source_captions."""
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
