"""Decode text files, for every reader: a byte order mark selects the encoding and is removed.

Without a mark, text is UTF-8 or what the configuration says. Nothing is replaced: undecodable bytes are an error.
"""

import codecs
import re

_MARKS = (  # UTF-32 first: its little-endian mark begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_WITHOUT_MARK = {"utf-8-sig": "utf-8", "utf-16": "utf-16-le", "utf-32": "utf-32-le"}
_MARK = "\ufeff"


class UndecodableText(ValueError):
    """Bytes that are not text in the expected encoding; the message names the first such byte and its position."""


def decode_text(data: bytes, encoding: str | None = None) -> str:
    """Decode a whole text file without its byte order mark; `encoding`, by default UTF-8, applies if there is no mark.

    Raises UndecodableText, a ValueError.
    """
    name, mark = encoding_of(data, encoding)
    try:
        return data[mark:].decode(name).lstrip(_MARK)
    except UnicodeDecodeError as error:
        raise UndecodableText(undecodable(error, mark)) from None


def decode_around(data: bytes, encoding: str | None = None) -> str:
    """Decode as `decode_text` does, but mark undecodable bytes for `wrong_byte` to find: of a whole JSON file only the
    values with such bytes are lost."""
    name, _ = encoding_of(data, encoding)
    return data.decode(name, _AROUND).lstrip(_MARK)


def wrong_byte(text: str) -> str:
    """Describe the first undecodable byte in text from `decode_around`; empty if there is none."""
    found = _PLACE.search(text)
    return found[1] if found else ""


def _place_of(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return f"{_EDGE}{undecodable(error)}{_EDGE}", error.end


_EDGE = "\udcff"  # half of a surrogate pair, which no encoding has
_PLACE = re.compile(f"{_EDGE}(byte 0x[^{_EDGE}]*){_EDGE}")
_AROUND = "tessera.around"
codecs.register_error(_AROUND, _place_of)


def encoding_of(head: bytes, encoding: str | None = None) -> tuple[str, int]:
    """Return (codec, length of the byte order mark) from the first bytes of a file; a mark overrides `encoding`."""
    for mark, name in _MARKS:
        if head.startswith(mark):
            return name, len(mark)
    name = codecs.lookup(encoding or "utf-8").name
    return _WITHOUT_MARK.get(name, name), 0


def undecodable(error: UnicodeDecodeError, offset: int = 0) -> str:
    """Describe the first undecodable byte of a piece of text that begins at byte `offset` of its file."""
    return f"byte 0x{error.object[error.start]:02x} at {offset + error.start} is not {error.encoding.upper()}"


def newline_of(codec: str) -> bytes:
    """Return a line feed in a codec of `encoding_of`. Raises LookupError for a codec that is not for text files."""
    newline = "\n".encode(codec)
    if len(newline.strip(b"\0")) != 1:
        raise LookupError(f"{codec} is not an encoding of text files")
    return newline
