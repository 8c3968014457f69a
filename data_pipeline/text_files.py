"""Bytes of text files -> str, for every reader: a byte order mark names the encoding and is taken off.

Without a mark text is UTF-8, or what the configuration says. Nothing is replaced: bytes that are no text are an error.
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
    """A whole text file without its byte order mark; `encoding` applies where there is no mark, UTF-8 by default.

    Raises UndecodableText, a ValueError.
    """
    name, mark = encoding_of(data, encoding)
    try:
        return data[mark:].decode(name).lstrip(_MARK)
    except UnicodeDecodeError as error:
        raise UndecodableText(undecodable(error, mark)) from None


def decode_around(data: bytes, encoding: str | None = None) -> str:
    """As `decode_text`, but bytes that are not text become a place that `wrong_byte` finds: of a whole JSON file only
    the values with such bytes are lost."""
    name, _ = encoding_of(data, encoding)
    return data.decode(name, _AROUND).lstrip(_MARK)


def wrong_byte(text: str) -> str:
    """The first byte in text of `decode_around` that is not text, in words; empty where there is none."""
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
    """The first bytes of a file -> (codec, length of the byte order mark); a mark overrules `encoding`."""
    for mark, name in _MARKS:
        if head.startswith(mark):
            return name, len(mark)
    name = codecs.lookup(encoding or "utf-8").name
    return _WITHOUT_MARK.get(name, name), 0


def undecodable(error: UnicodeDecodeError, offset: int = 0) -> str:
    """The first wrong byte of a piece of text that begins at byte `offset` of its file, in words."""
    return f"byte 0x{error.object[error.start]:02x} at {offset + error.start} is not {error.encoding.upper()}"


def newline_of(codec: str) -> bytes:
    """A line feed in a codec of `encoding_of`. Raises LookupError for a codec that is no encoding of text files."""
    newline = "\n".encode(codec)
    if len(newline.strip(b"\0")) != 1:
        raise LookupError(f"{codec} is not an encoding of text files")
    return newline
