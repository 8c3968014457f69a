"""Where rows come from. A source counts its rows once, then any worker reads any range of them.

Every row of a range comes back, in order, as a Pair or as a Drop: a row that cannot be read is a counted rejection.
"""

import csv
import gzip
import io
import itertools
import json
import re
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from data_pipeline.config import FolderSource, ScenesSource, SourceConfig, TableSource, TarsSource
from data_pipeline.errors import ConfigError, DataError
from data_pipeline.schema import Drop, Pair
from data_pipeline.shards.tar import Member, scan, split_name

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "ico", "ppm", "jp2")

Row = Pair | Drop


class Source(Protocol):
    """Rows 0 .. count() - 1 of what a configuration names."""

    def count(self) -> int:
        """Number of rows. Raises DataError for a source that is missing or empty, ConfigError for a wrong column."""
        ...

    def keys(self) -> Iterator[str] | None:
        """The key of every row in order, where rows bring names that may collide; None where they cannot."""
        ...

    def rows(self, start: int, stop: int) -> Iterator[Row]:
        """Rows [start, stop), one result each."""
        ...


def open_source(config: SourceConfig) -> Source:
    """The source that `config.kind` names."""
    return SOURCES[config.kind](config)


# ---------------------------------------------------------------------------------------------- scenes


class Scenes:
    """Drawn, not read."""

    def __init__(self, config: ScenesSource) -> None:
        self._config = config

    def count(self) -> int:
        return self._config.count

    def keys(self) -> None:
        return None

    def rows(self, start: int, stop: int) -> Iterator[Row]:
        from data_pipeline.build.scenes import scene_pair

        config = self._config
        for index in range(start, stop):
            yield scene_pair(config.seed, index, config.split, config.image_size)


# ---------------------------------------------------------------------------------------------- folder


class Folder:
    """Images below a folder, sorted by name; captions stand beside them."""

    def __init__(self, config: FolderSource) -> None:
        self._root = Path(config.path)

    @cached_property
    def _files(self) -> list[str]:
        _must_exist(self._root, "source.path")
        found = (path.relative_to(self._root) for path in self._root.rglob("*") if path.is_file())
        return sorted(path.as_posix() for path in found if path.suffix.lower().lstrip(".") in IMAGE_EXTENSIONS)

    def count(self) -> int:
        if not self._files:
            raise DataError(f"{self._root}: no images ({', '.join(IMAGE_EXTENSIONS)}) here; check source.path")
        return len(self._files)

    def keys(self) -> Iterator[str]:
        return (name.rpartition(".")[0] for name in self._files)

    def rows(self, start: int, stop: int) -> Iterator[Row]:
        for name in self._files[start:stop]:
            key, path = name.rpartition(".")[0], self._root / name
            try:
                captions, meta = _beside(path)
                yield Pair(key, path.read_bytes(), captions, meta)
            except OSError as error:
                yield Drop(key, "unreadable_file", str(error))
            except (ValueError, TypeError) as error:
                yield Drop(key, "unreadable_caption", str(error))


def _beside(image: Path) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Captions and attributes of the .json or .txt file beside an image; none where there is no such file."""
    if (path := image.with_suffix(".json")).is_file():
        return captions_of_json(json.loads(path.read_text(encoding="utf-8")))
    if (path := image.with_suffix(".txt")).is_file():
        return tuple(path.read_text(encoding="utf-8").splitlines()), {}
    return (), {}


def captions_of_json(tree: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    """A caption file: text, a list of texts, or a mapping with captions / caption / text -> (captions, the rest)."""
    if not isinstance(tree, dict):
        return as_captions(tree), {}
    for name in ("captions", "caption", "text"):
        if name in tree:
            return as_captions(tree[name]), {key: value for key, value in tree.items() if key != name}
    return (), tree


def as_captions(value: Any) -> tuple[str, ...]:
    """Text or a list of texts -> captions; None counts as none. Raises TypeError for anything else."""
    if value is None:
        return ()
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
        return tuple(value)
    raise TypeError(f"a caption is text or a list of texts, not {value!r:.80}")


# ---------------------------------------------------------------------------------------------- tables


class Table:
    """csv, tsv (with a header line), jsonl (also .gz), parquet; images in a folder, in a tar, or inline."""

    def __init__(self, config: TableSource) -> None:
        self._config = config
        path = Path(config.path)
        self._file = path / config.table if config.table else path

    def count(self) -> int:
        _must_exist(self._file, "source.path (and source.table)")
        if self._file.is_dir():
            raise ConfigError(f"{self._file}: a folder; name the {self._config.kind} file in it as source.table")
        self._check_columns()
        rows = self._parquet.metadata.num_rows if self._config.kind == "parquet" else sum(1 for _ in self._records())
        if not rows:
            raise DataError(f"{self._file}: no rows; a dataset needs at least one")
        return rows

    def keys(self) -> Iterator[str] | None:
        column = self._config.key
        if column is None:
            return None
        return (str(record.get(column)) for record in self._records([column]))

    def rows(self, start: int, stop: int) -> Iterator[Row]:
        for number, record in enumerate(itertools.islice(self._records(start=start), stop - start), start):
            yield self._row(number, record)

    def _row(self, number: int, record: dict[str, Any]) -> Row:
        config = self._config
        key = f"{number:09d}" if config.key is None else str(record.get(config.key))
        if _UNREADABLE in record:
            return Drop(key, "unreadable_row", record[_UNREADABLE])
        try:
            captions = tuple(text for column in config.captions for text in as_captions(record.get(column)))
        except TypeError as error:
            return Drop(key, "unreadable_caption", str(error))
        value = record.get(config.image)
        if value is None or value == "":
            return Drop(key, "no_image", f"column {config.image!r} is empty")
        try:
            image = value if isinstance(value, bytes) else self._images.read(str(value))
        except OSError as error:
            return Drop(key, "unreadable_file", str(error))
        used = {config.key, config.image, *config.captions}
        meta = {name: item for name, item in record.items() if name not in used and _is_json(item)}
        return Pair(key, image, captions, meta)

    @cached_property
    def _images(self) -> "ImageStore":
        return ImageStore(self._file.parent / self._config.images)

    @cached_property
    def _parquet(self) -> Any:
        import pyarrow.parquet

        try:
            return pyarrow.parquet.ParquetFile(self._file)
        except pyarrow.ArrowInvalid as error:
            raise DataError(f"{self._file}: not a parquet file ({error})") from None

    def _records(self, columns: list[str] | None = None, start: int = 0) -> Iterator[dict[str, Any]]:
        """Every row from `start` as a mapping; parquet reads `columns` only and skips row groups before `start`."""
        if self._config.kind == "parquet":
            return self._parquet_records(columns, start)
        reader = self._json_records() if self._config.kind == "jsonl" else self._csv_records()
        return itertools.islice(reader, start, None)

    def _parquet_records(self, columns: list[str] | None, start: int) -> Iterator[dict[str, Any]]:
        file = self._parquet
        groups, before = [], 0
        for group in range(file.metadata.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if before + rows <= start:
                before += rows
            else:
                groups.append(group)
        batches = file.iter_batches(batch_size=256, row_groups=groups, columns=columns) if groups else iter(())
        records = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
        return itertools.islice(records, start - before, None)

    def _json_records(self) -> Iterator[dict[str, Any]]:
        with self._text() as file:
            for line in file:
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                    yield record if isinstance(record, dict) else {_UNREADABLE: f"not a JSON object: {line:.80}"}
                except ValueError as error:
                    yield {_UNREADABLE: f"{error}: {line:.80}"}

    def _csv_records(self) -> Iterator[dict[str, Any]]:
        with self._text() as file:
            reader = csv.DictReader(file, delimiter="\t" if self._config.kind == "tsv" else ",", restkey=_REST)
            for record in reader:
                yield {_UNREADABLE: "more fields than columns"} if _REST in record else dict(record)

    def _text(self) -> io.TextIOBase:
        options: dict[str, Any] = {"encoding": "utf-8-sig", "errors": "replace", "newline": ""}
        if self._file.suffix == ".gz":
            return gzip.open(self._file, "rt", **options)  # noqa: SIM115
        return self._file.open(**options)

    def _check_columns(self) -> None:
        config = self._config
        if config.kind == "parquet":
            there = list(self._parquet.schema_arrow.names)
        else:
            there = [name for name in next(iter(self._records()), {}) if name != _UNREADABLE]
            if not there:
                return
        asked = [("key", config.key), ("image", config.image), *(("captions", column) for column in config.captions)]
        for name, column in asked:
            if column is not None and column not in there:
                raise ConfigError(f"source.{name}={column!r}: not a column of {self._file}, it has {', '.join(there)}")


_UNREADABLE = "\0unreadable"
_REST = "\0rest"


def _is_json(value: Any) -> bool:
    """Can the value stand in a .json file?"""
    if isinstance(value, list):
        return all(_is_json(item) for item in value)
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_json(item) for key, item in value.items())
    return value is None or isinstance(value, str | int | float | bool)


class ImageStore:
    """Files by name, in a folder or in one tar (scanned once)."""

    def __init__(self, path: Path) -> None:
        _must_exist(path, "source.images")
        self._path = path
        self._members: dict[str, Member] | None = None
        if path.is_file():
            with path.open("rb") as file:
                self._members = {member.name.removeprefix("./"): member for member in scan(file, str(path))}

    def read(self, name: str) -> bytes:
        """Raises OSError where there is no such file; names that leave the folder are refused."""
        if self._members is None:
            path = (self._path / name).resolve()
            if not path.is_relative_to(self._path.resolve()):
                raise OSError(f"{name!r} lies outside of {self._path}")
            return path.read_bytes()
        member = self._members.get(name.removeprefix("./"))
        if member is None:
            raise FileNotFoundError(f"{name!r} is not in {self._path}")
        with self._path.open("rb") as file:
            file.seek(member.data)
            return file.read(member.size)


# ------------------------------------------------------------------------------------------------ tars


class Tars:
    """Samples of WebDataset tars, in the order of the files; a key is TAR/KEY, as keys repeat between tars."""

    def __init__(self, config: TarsSource) -> None:
        self._path = config.path

    @cached_property
    def _samples(self) -> list[tuple[Path, str, list[Member]]]:
        """(tar, key, members) of every sample."""
        return [(path, *sample) for path in tar_paths(self._path) for sample in _grouped(path)]

    def count(self) -> int:
        if not self._samples:
            raise DataError(f"{self._path}: no samples in these tars; check source.path")
        return len(self._samples)

    def keys(self) -> Iterator[str]:
        return (f"{path.stem}/{key}" for path, key, _ in self._samples)

    def rows(self, start: int, stop: int) -> Iterator[Row]:
        for path, key, members in self._samples[start:stop]:
            yield self._row(f"{path.stem}/{key}", path, members)

    def _row(self, key: str, path: Path, members: list[Member]) -> Row:
        parts: dict[str, bytes] = {}
        with path.open("rb") as file:
            for member in members:
                file.seek(member.data)
                parts[split_name(member.name)[1]] = file.read(member.size)
        images = [parts[extension] for extension in parts if extension in IMAGE_EXTENSIONS]
        if not images:
            return Drop(key, "no_image", f"files: {', '.join(sorted(parts))}")
        try:
            captions, meta = captions_of_parts(parts)
        except (ValueError, TypeError) as error:
            return Drop(key, "unreadable_caption", str(error))
        return Pair(key, images[0], captions, meta)


def captions_of_parts(parts: dict[str, bytes]) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Captions and attributes of a sample's .json and .txt: the list in .json is complete, else .txt counts."""
    tree = json.loads(parts["json"]) if "json" in parts else {}
    captions, meta = captions_of_json(tree)
    if "txt" in parts and (not captions or not (isinstance(tree, dict) and "captions" in tree)):
        captions = (parts["txt"].decode("utf-8"),)
    return captions, meta


def _grouped(path: Path) -> Iterator[tuple[str, list[Member]]]:
    with path.open("rb") as file:
        for key, members in itertools.groupby(scan(file, str(path)), key=lambda member: split_name(member.name)[0]):
            yield key, list(members)


def tar_paths(pattern: str) -> list[Path]:
    """A folder, a file, `{00000..00099}` ranges and `::` unions -> paths. Raises DataError for what is not there."""
    paths: list[Path] = []
    for part in pattern.split("::"):
        for name in expand_braces(part):
            path = Path(name)
            _must_exist(path, "source.path")
            paths += sorted(path.glob("*.tar")) if path.is_dir() else [path]
    return paths


def expand_braces(pattern: str) -> list[str]:
    """`a-{08..11}.tar` -> a-08.tar ... a-11.tar; the width is that of the first number."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if match is None:
        return [pattern]
    first, last = match.groups()
    heads = [f"{pattern[: match.start()]}{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
    return [head + tail for head in heads for tail in expand_braces(pattern[match.end() :])]


def _must_exist(path: Path, field: str) -> None:
    if not path.exists():
        raise DataError(f"{path}: not there; {field} names a file or folder of this machine, relative to {Path.cwd()}")


SOURCES: dict[str, Callable[[Any], Source]] = {
    "scenes": Scenes,
    "folder": Folder,
    "tars": Tars,
    "csv": Table,
    "tsv": Table,
    "jsonl": Table,
    "parquet": Table,
}
