"""Parse the files of one sample: its image, texts, label and attributes.

The only parser of images with captions beside them, in folders and tars, so builds, the index, `Stream`, image codes,
vocabularies and reports see the same samples, and reject the same ones for the same reasons.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import orjson

from data_pipeline.shards.tar import NEWEST, NotAFile, is_litter, split_name, split_names
from data_pipeline.text_files import decode_text

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "ico", "ppm", "jp2")
CAPTION_NAMES = ("captions", "caption", "text")
NESTED_AT_MOST = 100  # levels of JSON: Python's own limit depends on the caller's stack, and this must not

_IMAGES_1 = frozenset(IMAGE_EXTENSIONS[:9])  # of version 1
_READ = frozenset((*IMAGE_EXTENSIONS, "json", "txt"))
_TOO_DEEP = f"nested deeper than {NESTED_AT_MOST} levels"
_LABEL = re.compile(rb"\s*[0-9]{1,9}\s*")
_LONG_NUMBER = re.compile(rb"[0-9]{19}")


class Unreadable(ValueError):
    """A sample that cannot be used. reason: one word with underscores, for counting."""

    def __init__(self, key: str, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.key, self.reason, self.detail = key, reason, detail


class Contents(NamedTuple):
    """Contents of a sample's files. key: their base name; label: number in its .cls; meta: the rest of its .json."""

    key: str
    image: bytes | None
    texts: tuple[str, ...]
    label: int | None
    meta: dict[str, Any]


def read_sample(
    files: Iterable[tuple[str, bytes | NotAFile]], version: int = NEWEST, encoding: str | None = None
) -> Contents:
    """Parse the files of one sample, in the order of its tar, as `parse_files` returns them.

    version: of the rules that the dataset was indexed with. encoding: of text without a byte order mark.
    Raises Unreadable: duplicate_file, linked_file, no_image, unreadable_caption. Without an image a sample needs a
    text, and before version 3 it cannot be used at all.
    """
    if version == 1:
        return _read_by_version_1(files)
    key, parts = _parts(files)
    if links := [f"{extension} is {part}" for extension, part in parts.items() if isinstance(part, NotAFile)]:
        raise Unreadable(key, "linked_file", f"{', '.join(links)}; links are not followed, pack with tar -h")
    read: dict[str, bytes] = {extension: part for extension, part in parts.items() if isinstance(part, bytes)}
    image = next((read[extension] for extension in read if extension in IMAGE_EXTENSIONS), None)
    texts, meta = tuple[str, ...](), dict[str, Any]()
    if image is not None or version > 2:
        try:
            texts, meta = read_captions(read.get, encoding)
        except (ValueError, TypeError) as error:
            raise Unreadable(key, "unreadable_caption", str(error)) from None
    if image is None and not texts:
        raise Unreadable(key, "no_image", f"no image among the files: {', '.join(sorted(read))}")
    return Contents(key, image, texts, label_of(read.get("cls")), meta)


def read_alike(files: Sequence[tuple[str, bytes | NotAFile]]) -> str | None:
    """Return the key of a sample whose files version 1 and the newest rules both see and read alike; otherwise None."""
    keys = {split_name(name)[0] for name, _ in files}
    if len(keys) != 1 or any(isinstance(part, NotAFile) or is_litter(name) for name, part in files):
        return None
    return keys.pop() if _outcome(files, 1) == _outcome(files, NEWEST) else None


def _outcome(files: Sequence[tuple[str, bytes | NotAFile]], version: int) -> Contents | tuple[str, str]:
    try:
        return read_sample(files, version)
    except Unreadable as fault:
        return fault.key, fault.reason


def label_of(contents: bytes | None) -> int | None:
    """Return the class in a .cls, as webdataset writes it: digits. None if it is missing or anything else."""
    return int(contents) if contents is not None and _LABEL.fullmatch(contents) else None


def image_of(files: Iterable[tuple[str, bytes | NotAFile]]) -> tuple[str, bytes] | None:
    """Return (name, contents) of the image of a sample, whatever else it holds; None if there is none."""
    there = [(name, part) for name, part in files if isinstance(part, bytes) and not is_litter(name)]
    named = split_names([name for name, _ in there])
    images = (file for file, (_, extension) in zip(there, named, strict=True) if extension in IMAGE_EXTENSIONS)
    return next(images, None)


def _parts(files: Iterable[tuple[str, bytes | NotAFile]]) -> tuple[str, dict[str, bytes | NotAFile]]:
    """Return the key of a sample and its files by extension; links only in place of files that are read."""
    files = [(name, contents) for name, contents in files if not is_litter(name)]
    named = split_names([name for name, _ in files])
    key = named[-1][0] if named else ""
    parts: dict[str, bytes | NotAFile] = {}
    for (_, extension), (name, contents) in zip(named, files, strict=True):
        if extension in parts:
            raise Unreadable(key, "duplicate_file", f"{name} occurs twice")
        if extension in _READ or not isinstance(contents, NotAFile):
            parts[extension] = contents
    return key, parts


def _read_by_version_1(files: Iterable[tuple[str, bytes | NotAFile]]) -> Contents:
    """Parse a sample of a dataset built or indexed with version 1, so that the dataset and runs on it never change.

    Of several images the first counts, of several texts the last; links are ignored.
    """
    key, image, text, label, tree = "", None, None, None, dict[str, Any]()
    for name, contents in files:
        if isinstance(contents, NotAFile):
            continue
        key, extension = split_name(name)
        if extension == "json":
            tree = _object(key, contents)
        elif extension == "txt":
            text = contents
        elif extension == "cls":
            label = label_of(contents)
        elif image is None and extension in _IMAGES_1:
            image = contents
    if image is None:
        raise Unreadable(key, "no_image", "no image among the files")
    try:
        return Contents(key, image, _captions_by_version_1(tree, text), label, tree)
    except (UnicodeDecodeError, TypeError) as error:
        raise Unreadable(key, "unreadable_caption", str(error)) from None


def _captions_by_version_1(tree: dict[str, Any], text: bytes | None) -> tuple[str, ...]:
    """Return the `captions` of the .json, removed from it, else the whole .txt, else the `caption` of the .json."""
    captions = tree.pop("captions", None)
    if captions is None:
        captions = [tree.get("caption") or None] if text is None else [text.decode()]
    return tuple(one.encode("utf-8", "replace").decode() for one in captions if isinstance(one, str))


def _object(key: str, contents: bytes) -> dict[str, Any]:
    """Parse the object in a .json, which may hold NaN and integers of any size."""
    try:
        try:
            tree = orjson.loads(contents)
        except ValueError:
            tree = json.loads(contents)
    except (ValueError, RecursionError) as error:
        raise Unreadable(key, "unreadable_caption", f"not JSON ({error})") from None
    if not isinstance(tree, dict):
        raise Unreadable(key, "unreadable_caption", f"JSON {type(tree).__name__} instead of an object")
    return tree


# --------------------------------------------------------------------------------------------- captions


def read_captions(
    read: Callable[[str], bytes | None], encoding: str | None = None
) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Return (captions, attributes) in the .json and .txt of an image; read("json") -> its bytes, None if missing.

    The captions are those of the .json, else the lines of the .txt.
    Raises ValueError for invalid JSON and undecodable bytes, TypeError for captions that are not text.
    """
    contents = read("json")
    tree = {} if contents is None else parse_json(contents, encoding)
    captions, meta = captions_of_json(tree)
    if not captions and (text := read("txt")) is not None:
        captions = _said(decode_text(text, encoding).splitlines())
    return captions, meta


def captions_of_json(tree: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Split text, a list of texts, or a mapping with one as captions, caption or text -> (captions, the rest).

    Of the three names the first that has a caption counts. Raises TypeError for captions that are not text.
    """
    if not isinstance(tree, dict):
        return _said(as_captions(tree)), {}
    captions, rest = tuple[str, ...](), dict(tree)
    for name in CAPTION_NAMES:
        if not captions and name in rest:
            captions = _said(as_captions(rest.pop(name)))
    return captions, rest


def as_captions(value: Any) -> tuple[str, ...]:
    """Convert text or a list of texts to captions; None gives none. Raises TypeError for anything else."""
    if value is None:
        return ()
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list | tuple) and all(isinstance(item, str | None) for item in value):
        return tuple(item for item in value if item is not None)
    raise TypeError(f"a caption must be a string or a list of strings, not {value!r:.80}")


def _said(captions: Iterable[str]) -> tuple[str, ...]:
    """Return the captions that are not blank, with "?" for halves of surrogate pairs."""
    return tuple(text.encode("utf-8", "replace").decode() for text in captions if text and not text.isspace())


def parse_json(contents: str | bytes, encoding: str | None = None) -> Any:
    """Parse JSON, which may hold NaN and integers of any size. Raises ValueError if invalid or nested too deep."""
    if isinstance(contents, bytes):
        flat = contents.count(b"[") + contents.count(b"{") <= NESTED_AT_MOST
        if encoding is None and flat and not _LONG_NUMBER.search(contents):
            try:
                return orjson.loads(contents)
            except ValueError:
                pass  # NaN, a byte order mark or another encoding
        contents = decode_text(contents, encoding)
    try:
        tree = json.loads(contents)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    level, within = 0, [tree]
    while within := [one for one in within if isinstance(one, dict | list)]:
        if (level := level + 1) > NESTED_AT_MOST:
            raise ValueError(_TOO_DEEP)
        within = [item for one in within for item in (one.values() if isinstance(one, dict) else one)]
    return tree


# ------------------------------------------------------------------------------------------- accounting


class Account:
    """Counts of the samples of one tar, added in order: in = out + rejected. key: base name of a sample's files."""

    def __init__(self) -> None:
        self.samples = 0
        self.rejected: Counter[str] = Counter()
        self._keys: set[int] = set()

    def add(self, contents: Contents) -> bool:
        """Count a sample that was read -> whether it can be used."""
        reason = ""
        if contents.image is None or not contents.texts:
            reason = "files_apart" if hash(contents.key) in self._keys else ""
        if not contents.texts and contents.label is None:
            reason = reason or "empty_caption"
        self._count(contents.key, reason)
        return not reason

    def reject(self, key: str, reason: str) -> None:
        """Count a sample that cannot be read."""
        self._count(key, "files_apart" if reason == "no_image" and hash(key) in self._keys else reason)

    def _count(self, key: str, reason: str) -> None:
        self.samples += 1
        if reason:
            self.rejected[reason] += 1
        self._keys.add(hash(key))
