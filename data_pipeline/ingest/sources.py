"""Row sources. A source is planned once; afterwards any worker can read any range of its rows.

Reading a range returns every row in order as a Pair, a Link to be fetched, or a Drop: an unreadable row is a counted
rejection.
"""

import contextlib
import io
import itertools
import json
import os
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow.parquet
import xxhash

from data_pipeline.config import CocoSource, FolderSource, ScenesSource, SourceConfig, TarsSource
from data_pipeline.errors import ConfigError, DataError
from data_pipeline.foreign import foreign_model
from data_pipeline.ingest.inputs import beside, input_paths, must_exist, open_input, read_input, readable
from data_pipeline.ingest.layout import Part, Placement, Row, joined, lines_layout
from data_pipeline.ingest.records import (
    ImageStore,
    as_unicode,
    attributes,
    json_line,
    key_of,
    parse_object,
    unnamed,
)
from data_pipeline.ingest.tables import Table, load_json, parquet_errors, published_table
from data_pipeline.ingest.unreadable import UNREADABLE
from data_pipeline.patterns import expand_braces, is_remote
from data_pipeline.remote import Forbidden, S3Storage
from data_pipeline.schema import Drop, Link, Pair
from data_pipeline.shards.samples import IMAGE_EXTENSIONS, Unreadable, as_captions, read_captions, read_sample
from data_pipeline.shards.tar import Member, NotAFile, group_samples, refuse_compressed, scan, split_names

TAR_STRIDE = 64  # samples between two recorded offsets of a tar


class RowSource(Protocol):
    """A configured source with rows 0 .. count() - 1."""

    @property
    def layout(self) -> Placement:
        """Row layout; planned on first use unless passed in. Raises as `count` does."""
        ...

    def count(self) -> int:
        """Return the number of rows. Raises DataError for a missing or empty source, ConfigError for a wrong column."""
        ...

    def keys(self) -> Iterator[str] | None:
        """Return the key of every row in order; None if keys are generated, so that they cannot collide."""
        ...

    def rows(self, start: int, stop: int) -> Iterator[Row]:
        """Yield rows [start, stop), one result per row."""
        ...


def open_source(config: SourceConfig, layout: Placement | None = None) -> RowSource:
    """Open the source of kind `config.kind`. layout: that of the same source, planned before."""
    return SOURCES[config.kind](config, layout)


# ---------------------------------------------------------------------------------------------- scenes


class Scenes:
    """Synthetic scenes, generated on demand."""

    def __init__(self, config: ScenesSource, layout: Placement | None = None) -> None:
        self._config = config
        self.layout = Placement((Part("scenes", config.count, "drawn", np.array([], np.int64)),))

    def count(self) -> int:
        return self._config.count

    def keys(self) -> None:
        return None

    def rows(self, start: int, stop: int) -> Iterator[Row]:
        from data_pipeline.scenes import scene_pair

        config = self._config
        for index in range(start, stop):
            yield scene_pair(config.seed, index, config.split, config.image_size)


# ---------------------------------------------------------------------------------------------- folder


class Folder:
    """Images in a folder and its subfolders, sorted by name, with captions in files beside them.

    A key is the path below the folder without its extension; with several folders it starts with the folder's name.
    """

    def __init__(self, config: FolderSource, layout: Placement | None = None) -> None:
        self._path, self._encoding = config.path, config.encoding
        self._roots = [root for part in config.path.split("::") for root in expand_braces(part)]
        self._given = layout

    @cached_property
    def layout(self) -> Placement:
        if self._given is not None:
            return self._given
        return joined([lines_layout(root, _images_below(root)) for root in self._roots])

    def count(self) -> int:
        if not self.layout.rows:
            known, hint = ", ".join(IMAGE_EXTENSIONS), foreign_model(self._path)
            raise DataError(f"{self._path}: no images ({known}); check source.path{hint}")
        return self.layout.rows

    def keys(self) -> Iterator[str]:
        return (self._key(root, name) for root, name in self._names(0, self.layout.rows))

    def rows(self, start: int, stop: int) -> Iterator[Row]:
        for root, name in self._names(start, stop):
            key = self._key(root, name)
            try:
                captions, meta = _beside(f"{root}/{name}", self._encoding)
                yield Pair(key, read_input(f"{root}/{name}"), captions, meta)
            except OSError as error:
                yield Drop(key, "unreadable_file", str(error))
            except (ValueError, TypeError) as error:
                yield Drop(key, "unreadable_caption", str(error))

    def _names(self, start: int, stop: int) -> Iterator[tuple[str, str]]:
        """Yield (folder, path below it) of rows [start, stop)."""
        for part, first, last in self.layout.ranges(start, stop):
            yield from ((part.path, name) for name in self.layout.texts(start, start + last - first))
            start += last - first

    def _key(self, root: str, name: str) -> str:
        own = f"{root.rstrip('/').rpartition('/')[2]}/" if len(self._roots) > 1 else ""
        return own + name.rpartition(".")[0]


def _images_below(root: str) -> list[str]:
    """Return the sorted names of the images below a local folder or an S3 prefix."""
    if root.startswith("s3://"):
        names = S3Storage(root).names_below()
    elif is_remote(root):
        raise ConfigError(f"source.path={root}: only s3:// can list a folder; use a table or tars instead")
    else:
        must_exist(Path(root), "source.path")
        with readable(root):
            names = _files_below(root)
    if odd := [name for name in names if as_unicode(name) != name]:
        raise DataError(f"{root}/{as_unicode(odd[0])}: {len(odd)} file names are not UTF-8; rename them")
    return sorted(name for name in names if name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS)


def _files_below(root: str) -> list[str]:
    """Return the names of the files below a folder. Follows links to folders, but not to a parent folder.

    Raises OSError for a folder that cannot be listed, since its files would be missing silently.
    """
    names = []
    waiting: list[tuple[str, tuple[tuple[int, int], ...]]] = [("", ())]  # folder, and (device, inode) of its parents
    while waiting:
        below, above = waiting.pop()
        status = os.stat(f"{root}/{below}")
        here = (status.st_dev, status.st_ino)
        if here in above:
            continue
        with os.scandir(f"{root}/{below}") as entries:
            for entry in entries:
                kind = Path(entry) if entry.is_symlink() else entry  # for a broken link, Path returns False for both
                if kind.is_dir():
                    waiting.append((f"{below}{entry.name}/", (*above, here)))
                elif kind.is_file():
                    names.append(below + entry.name)
    return names


def _beside(image: str, encoding: str | None) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Read captions and attributes from the .json and .txt files beside an image; empty without such files."""
    stem = image.rpartition(".")[0]

    def read(extension: str) -> bytes | None:
        with contextlib.suppress(FileNotFoundError):
            return read_input(f"{stem}.{extension}")
        return None

    return read_captions(read, encoding)


# ------------------------------------------------------------------------------------------------ COCO


class Coco:
    """COCO captions JSON: one row per image, captions ordered by id; licences are kept as attributes."""

    def __init__(self, config: CocoSource, layout: Placement | None = None) -> None:
        self._config = config
        self._stores: dict[str, ImageStore] = {}
        self._given = layout

    @cached_property
    def layout(self) -> Placement:
        if self._given is not None:
            return self._given
        paths = input_paths(self._config.path, (".json", ".json.gz"))
        if not paths:
            raise DataError(f"{self._config.path}: no .json files; check source.path")
        if self._config.images is None:
            return lines_layout(
                self._config.path, [line for path in paths for line in _coco_lines(path, self._config.encoding)]
            )
        return joined([lines_layout(path, list(_coco_lines(path, self._config.encoding))) for path in paths])

    def count(self) -> int:
        if not self.layout.rows:
            raise DataError(f"{self._config.path}: no images; check source.path{foreign_model(self._config.path)}")
        return self.layout.rows

    def keys(self) -> Iterator[str]:
        lines = self.layout.texts(0, self.layout.rows)
        return (key_of(parse_object(line), "id", number) for number, line in enumerate(lines))

    def rows(self, start: int, stop: int) -> Iterator[Row]:
        for part, first, last in self.layout.ranges(start, stop):
            images = self._images(part.path)
            for number, line in enumerate(self.layout.texts(start, start + last - first), start):
                record = parse_object(line)
                key = key_of(record, "id", number)
                yield unnamed(record, "id", key) or self._row(key, record, images)
            start += last - first

    def _row(self, key: str, record: dict[str, Any], images: ImageStore | None) -> Row:
        meta: dict[str, Any] = {
            name: record[name] for name in ("license", "license_url", "flickr_url") if name in record
        }
        name = record.get("coco_url") if images is None else record.get("file_name")
        try:
            captions = as_captions(record["captions"])
            if name is None:
                return Drop(key, "no_image", "neither file_name nor coco_url")
            if images is None:
                return Link(key, as_unicode(str(name)), captions, meta)
            return Pair(key, images.read(str(name)), captions, meta)
        except TypeError as error:
            return Drop(key, "unreadable_caption", str(error))
        except (OSError, ValueError) as error:
            return Drop(key, "unreadable_file", str(error))

    def _images(self, path: str) -> ImageStore | None:
        """Return the images that belong to one of the JSON files; None if they are fetched."""
        if self._config.images is None:
            return None
        folder = beside(path, self._config.images)
        if folder not in self._stores:
            self._stores[folder] = ImageStore(folder)
        return self._stores[folder]


def _coco_lines(path: str, encoding: str | None) -> Iterator[str]:
    """Yield one JSON line per image: its record, `captions` and its licence's URL. Images without an id come last."""
    tree = load_json(path, encoding)
    if not isinstance(tree, dict) or not all(isinstance(tree.get(name), list) for name in ("images", "annotations")):
        raise DataError(f"{path}: not COCO captions, which have `images` and `annotations`; check source.kind")
    licenses = {_id(entry.get("id")): entry.get("url") for entry in _objects(path, tree, "licenses")}
    captions: dict[Any, list[tuple[Any, Any]]] = {}
    for annotation in _objects(path, tree, "annotations"):
        image_id = _id(annotation.get("image_id"))
        captions.setdefault(image_id, []).append((annotation.get("id"), annotation.get("caption")))
    images = [image if isinstance(image, dict) else {UNREADABLE: f"{image!r:.80}"} for image in tree["images"]]
    for image in sorted(images, key=lambda image: (image.get("id") is None, str(image.get("id")).zfill(20))):
        found = captions.get(_id(image.get("id")), ())
        texts = [text for _, text in sorted(found, key=lambda pair: str(pair[0]).zfill(20))]
        license_id = _id(image.get("license"))
        license_url = {"license_url": licenses[license_id]} if license_id in licenses else {}
        yield json_line({**image, **license_url, "captions": texts})


def _objects(path: str, tree: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """Return the list of objects `name` of a COCO file. Raises DataError if any entry is not an object."""
    entries = tree.get(name) or []
    wrong = [f"{name}[{n}] is {entry!r:.80}" for n, entry in enumerate(entries) if not isinstance(entry, dict)]
    if wrong:
        raise DataError(f"{path}: {wrong[0]}, not an object ({len(wrong)} in total); correct or remove them")
    return list(entries)


def _id(value: Any) -> Any:
    """Return a hashable form of a JSON value, for lookups."""
    return json.dumps(value) if isinstance(value, dict | list) else value


# ------------------------------------------------------------------------------------------------ tars


class Tars:
    """Samples of WebDataset tars, in file order; keys are TAR/KEY, since keys repeat between tars."""

    def __init__(self, config: TarsSource, layout: Placement | None = None) -> None:
        self._path = config.path
        self._given = layout

    @cached_property
    def layout(self) -> Placement:
        return self._given or Placement(tuple(_plan_tar(path) for path in _tar_paths(self._path)))

    def count(self) -> int:
        if not self.layout.rows:
            raise DataError(f"{self._path}: no samples in these tars; check source.path")
        return self.layout.rows

    def keys(self) -> Iterator[str]:
        for part in self.layout.parts:
            with open_input(part.path) as file:
                yield from (f"{_stem(part.path)}/{key}" for key, _ in _grouped(scan(file, part.path)))

    def rows(self, start: int, stop: int) -> Iterator[Row]:
        for part, first, last in self.layout.ranges(start, stop):
            table = _beside_tar(part.path)
            with open_input(part.path) as file:
                members = scan(file, part.path, int(part.offsets[first // TAR_STRIDE]))
                skipped = first % TAR_STRIDE
                for key, group in itertools.islice(_grouped(members), skipped, skipped + last - first):
                    files = [(member.name, _contents(file, member)) for member in group]
                    yield _sample_row(f"{_stem(part.path)}/{key}", files, table.get(key, {}))


def _tar_paths(pattern: str) -> list[str]:
    """Resolve tars by folder, file, `{00000..00099}` ranges, * and `::` unions.

    Raises DataError for missing or compressed ones.
    """
    refuse_compressed((path.rpartition("/")[2] for path in input_paths(pattern, ("",))), pattern)
    return input_paths(pattern, (".tar",))


def _sample_row(key: str, files: list[tuple[str, bytes | NotAFile]], beside_tar: dict[str, Any]) -> Row:
    """Convert the files of a sample to a row. beside_tar: attributes used where its .json lacks them."""
    try:
        read = read_sample(files)
    except Unreadable as fault:
        return Drop(key, fault.reason, fault.detail)
    if read.image is None:
        return Drop(key, "no_image", f"no image among the files: {', '.join(sorted(name for name, _ in files))}")
    return Pair(key, read.image, read.texts, {**beside_tar, **read.meta})


def _plan_tar(path: str) -> Part:
    """Count the samples and record the offset of every TAR_STRIDE-th. digest: over member names, offsets and sizes."""
    offsets, rows, described = [], 0, xxhash.xxh3_128()
    with open_input(path) as file:
        for rows, (key, members) in enumerate(_grouped(scan(file, path)), 1):
            if (rows - 1) % TAR_STRIDE == 0:
                offsets.append(members[0].start)
            parts = [(member.name, member.data, member.size) for member in members]
            described.update(as_unicode(f"{key} {parts}").encode())
    return Part(path, rows, described.hexdigest(), np.array(offsets, np.int64))


def _grouped(members: Iterator[Member]) -> Iterator[tuple[str, list[Member]]]:
    for group in group_samples(members):
        yield split_names([member.name for member in group])[0][0], group


def _contents(file: Any, member: Member) -> bytes | NotAFile:
    if member.instead:
        return member.instead
    file.seek(member.data)
    return bytes(file.read(member.size))


def _stem(path: str) -> str:
    return path.rpartition("/")[2].removesuffix(".tar")


def _beside_tar(path: str) -> dict[str, dict[str, Any]]:
    """Read attributes by key from img2dataset's NAME.parquet beside NAME.tar; empty if there is none."""
    table_path = path.removesuffix(".tar") + ".parquet"
    if is_remote(path) and not path.endswith(".tar"):  # a URL with a query: its neighbours cannot be named
        return {}
    with readable(table_path):
        try:
            data = read_input(table_path)
        except (
            FileNotFoundError,
            IsADirectoryError,
            Forbidden,
        ):  # without permission to list, S3 answers 403 for a missing object
            return {}
    with parquet_errors(table_path):
        table = pyarrow.parquet.read_table(io.BytesIO(data))
    if "key" not in table.column_names:
        return {}
    kept = [name for name in table.column_names if name not in ("caption", "captions", "status", "error_message")]
    records = table.select(kept).to_pylist()
    return {str(record["key"]): attributes(record, ("key",)) for record in records}


SOURCES: dict[str, Callable[[Any, Placement | None], RowSource]] = {
    "scenes": Scenes,
    "folder": Folder,
    "tars": Tars,
    "coco": Coco,
    "cc3m": published_table,
    "muge": published_table,
    "csv": Table,
    "tsv": Table,
    "json": Table,
    "jsonl": Table,
    "parquet": Table,
}
