"""The gate: names, digests, sizes and counts in files from outside are checked here, once, when a file is read.

A kind of file is a TypedDict or a dataclass over the types below, beside the code that reads it. No path may be built
from unchecked text: a name that passed is one path component, in the folder that the file was read from.
"""

import functools
from typing import Annotated, Any

import pydantic
from pydantic import AfterValidator, Field, StringConstraints

from data_pipeline.errors import DataError

LARGEST = 2**48
"""Largest number of bytes or samples that a file may state, so that sums over a dataset are far from overflow."""

OPEN = pydantic.ConfigDict(extra="allow")
"""For kinds whose other keys are not checked, as nothing is built from them."""
CLOSED = pydantic.ConfigDict(extra="forbid")

_LONGEST = 255
_LETTER = r"[^/\\\p{Cc}]"
_FIRST = r"[^/\\.\p{Cc}]"


def _fits_a_disk(name: str) -> str:
    if len(name.encode()) > _LONGEST:
        raise ValueError(f"a file name has at most {_LONGEST} bytes")
    return name


Count = Annotated[int, Field(ge=0, le=LARGEST)]
FileName = Annotated[str, StringConstraints(pattern=rf"^{_FIRST}{_LETTER}*$"), AfterValidator(_fits_a_disk)]
"""One path component: no slash, backslash, control character or leading dot (so neither . nor ..)."""
TarName = Annotated[str, StringConstraints(pattern=rf"^{_FIRST}{_LETTER}*\.tar$"), AfterValidator(_fits_a_disk)]
Sha256 = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]
TokenizerId = Annotated[str, StringConstraints(pattern="^[0-9a-f]{12}$")]
ParameterName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*$", max_length=255)]
"""Parameter name as in torch: words joined by dots."""

_RULES = {
    "^[0-9a-f]{64}$": "a sha256 is 64 lower-case hex digits",
    "^[0-9a-f]{12}$": "an id is 12 lower-case hex digits",
    rf"^{_FIRST}{_LETTER}*$": "a file name without '/', '\\', control characters, or a leading dot",
    rf"^{_FIRST}{_LETTER}*\.tar$": "NAME.tar without '/', '\\', control characters, or a leading dot",
}


def parse(kind: Any, data: bytes, where: str, remedy: str) -> Any:
    """Parse JSON of this kind. Raises DataError that names the first invalid entry, the rule and the remedy.

    Text that is very deep, long or malformed is parsed iteratively or refused.
    """
    try:
        return _adapter(kind).validate_json(data, strict=True)
    except pydantic.ValidationError as error:
        raise _refused(error, where, remedy) from None


def check(kind: Any, value: object, where: str, remedy: str) -> Any:
    """Check a value of this kind. Raises DataError as `parse` does."""
    try:
        return _adapter(kind).validate_python(value, strict=True)
    except pydantic.ValidationError as error:
        raise _refused(error, where, remedy) from None


@functools.cache
def _adapter(kind: Any) -> "pydantic.TypeAdapter[Any]":
    return pydantic.TypeAdapter(kind)


def _refused(error: pydantic.ValidationError, where: str, remedy: str) -> DataError:
    first = error.errors()[0]
    place = ".".join(map(str, first["loc"]))
    rule = _RULES.get(first.get("ctx", {}).get("pattern", ""), first["msg"])
    shown = "" if isinstance(first["input"], dict | bytes) or not place else f"={first['input']!r:.80}"
    return DataError(f"{where}: {place}{shown}{': ' if place else ''}{rule}; {remedy}")
