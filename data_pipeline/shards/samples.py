"""What the files of one sample say: its image, its captions, its attributes.

The only reader of captions and images beside them, for folders and tars: builds, the index, `Stream`, image codes,
vocabularies and reports see the same samples, and reject the same ones for the same reasons.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import orjson

from data_pipeline.shards.tar import NEWEST, NotAFile, is_litter, split_names
from data_pipeline.text_files import decode_text

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "ico", "ppm", "jp2")
CAPTION_NAMES = ("captions", "caption", "text")
NESTED_AT_MOST = 100  # levels of JSON: Python's own limit depends on who calls, and this must not

_READ = frozenset((*IMAGE_EXTENSIONS, "json", "txt"))
_TOO_DEEP = f"nested more than {NESTED_AT_MOST} levels deep"
_LONG_NUMBER = re.compile(rb"[0-9]{19}")


class Unreadable(ValueError):
    """A sample that cannot be used. reason: one word with underscores, which is counted."""

    def __init__(self, key: str, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.key, self.reason, self.detail = key, reason, detail


class Contents(NamedTuple):
    """What a sample's files say. key: their base name; meta: the rest of its .json."""

    key: str
    image: bytes
    captions: tuple[str, ...]
    meta: dict[str, Any]


def read_sample(
    files: Iterable[tuple[str, bytes | NotAFile]], version: int = NEWEST, encoding: str | None = None
) -> Contents:
    """The files of one sample in the order of its tar, as `parse_files` gives them -> what they say.

    version: of the rules that the dataset was indexed by. encoding: of text without a byte order mark.
    Raises Unreadable: duplicate_file, linked_file, no_image, unreadable_caption.
    """
    key, parts = _parts(files, version)
    if links := [f"{extension} is {part}" for extension, part in parts.items() if isinstance(part, NotAFile)]:
        raise Unreadable(key, "linked_file", f"{', '.join(links)}; links are not followed: pack with tar -h")
    read: dict[str, bytes] = {extension: part for extension, part in parts.items() if isinstance(part, bytes)}
    image = next((read[extension] for extension in read if extension in IMAGE_EXTENSIONS), None)
    if image is None:
        raise Unreadable(key, "no_image", f"no image among the files: {', '.join(sorted(read))}")
    try:
        return Contents(key, image, *read_captions(read.get, encoding, version))
    except (ValueError, TypeError) as error:
        raise Unreadable(key, "unreadable_caption", str(error)) from None


def image_of(files: Iterable[tuple[str, bytes | NotAFile]]) -> tuple[str, bytes] | None:
    """(name, contents) of the image of a sample, whatever else it holds; None where there is none."""
    there = [(name, part) for name, part in files if isinstance(part, bytes) and not is_litter(name)]
    named = split_names([name for name, _ in there])
    images = (file for file, (_, extension) in zip(there, named, strict=True) if extension in IMAGE_EXTENSIONS)
    return next(images, None)


def _parts(files: Iterable[tuple[str, bytes | NotAFile]], version: int) -> tuple[str, dict[str, bytes | NotAFile]]:
    """-> key of a sample, and its files by extension; links only where they stand for something that is read."""
    if version == 1:
        files = [(name, contents) for name, contents in files if not isinstance(contents, NotAFile)]
    else:
        files = [(name, contents) for name, contents in files if not is_litter(name)]
    named = split_names([name for name, _ in files])
    key = named[-1][0] if named else ""
    parts: dict[str, bytes | NotAFile] = {}
    for (_, extension), (name, contents) in zip(named, files, strict=True):
        if extension in parts:
            raise Unreadable(key, "duplicate_file", f"{name} occurs twice; which one belongs to the others is not said")
        if extension in _READ or not isinstance(contents, NotAFile):
            parts[extension] = contents
    return key, parts


# --------------------------------------------------------------------------------------------- captions


def read_captions(
    read: Callable[[str], bytes | None], encoding: str | None = None, version: int = NEWEST
) -> tuple[tuple[str, ...], dict[str, Any]]:
    """-> (captions, attributes) of the .json and .txt of an image; read("json") -> its bytes, None where there is none.

    The captions are those of the .json, else the lines of the .txt. In datasets that were indexed by version 1 a .txt
    is one caption, and counts before a `caption` of the .json.
    Raises ValueError for JSON that is none and for bytes that are no text, TypeError for captions that are no text.
    """
    contents = read("json")
    tree = {} if contents is None else parse_json(contents, encoding)
    captions, meta = captions_of_json(tree)
    whole = version == 1 and not (isinstance(tree, dict) and tree.get("captions") is not None)
    if (whole or not captions) and (text := read("txt")) is not None:
        decoded = decode_text(text, encoding)
        captions = _said([decoded] if whole else decoded.splitlines())
    return captions, meta


def captions_of_json(tree: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Text, a list of texts, or a mapping with one of these as captions, caption or text -> (captions, the rest).

    Of the three names the first that has a caption counts. Raises TypeError for captions that are no text.
    """
    if not isinstance(tree, dict):
        return _said(as_captions(tree)), {}
    captions, rest = tuple[str, ...](), dict(tree)
    for name in CAPTION_NAMES:
        if not captions and name in rest:
            captions = _said(as_captions(rest.pop(name)))
    return captions, rest


def as_captions(value: Any) -> tuple[str, ...]:
    """Text or a list of texts -> captions; None counts as none. Raises TypeError for anything else."""
    if value is None:
        return ()
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list | tuple) and all(isinstance(item, str | None) for item in value):
        return tuple(item for item in value if item is not None)
    raise TypeError(f"a caption is text or a list of texts, not {value!r:.80}")


def _said(captions: Iterable[str]) -> tuple[str, ...]:
    """Captions without those that are blank, and without halves of surrogate pairs."""
    return tuple(text.encode("utf-8", "replace").decode() for text in captions if text and not text.isspace())


def parse_json(contents: str | bytes, encoding: str | None = None) -> Any:
    """The JSON of one row, NaN and integers of any size too. Raises ValueError for what is none or nested too deep."""
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


# ---------------------------------------------------------------------------------------------- account


class Account:
    """in = out + rejected over the samples of one tar, in their order."""

    def __init__(self) -> None:
        self.samples = 0
        self.rejected: Counter[str] = Counter()
        self._keys: set[int] = set()

    def add(self, key: str, reason: str) -> None:
        """One more sample; `reason` is empty for one that can be used."""
        self.samples += 1
        if reason:
            self.rejected["files_apart" if reason == "no_image" and hash(key) in self._keys else reason] += 1
        self._keys.add(hash(key))
