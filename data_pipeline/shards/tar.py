"""Tars, byte for byte: a deterministic ustar writer and a scanner for the headers of any WebDataset tar.

A sample is a run of neighbouring files with one base name up to the first dot: 000000012.png, .txt, .json.
"""

from collections.abc import Iterable, Iterator
from typing import BinaryIO, NamedTuple

import xxhash

from data_pipeline.errors import DataError

BLOCK = 512
_MAX_NAME = 100
_MAX_SIZE = 8 * 1024**3
_END = bytes(2 * BLOCK)
_REGULAR = ord("0")
_SUM = (1 << 32) - 1


class Member(NamedTuple):
    """A regular file within a tar; positions in bytes. `start` is its first header, `data` where its contents begin."""

    name: str
    start: int
    data: int
    size: int

    @property
    def stop(self) -> int:
        """Where the next header begins."""
        return self.data + padded(self.size)


def padded(size: int) -> int:
    """`size` bytes rounded up to whole blocks."""
    return -(-size // BLOCK) * BLOCK


def split_name(name: str) -> tuple[str, str]:
    """`a/b/key.seg.png` -> (`a/b/key`, `seg.png`): WebDataset's rule, the first dot of the last part."""
    folder, slash, base = name.rpartition("/")
    key, _, extension = base.partition(".")
    return folder + slash + key, extension.lower()


# ---------------------------------------------------------------------------------------------- writing


def header(name: str, size: int) -> bytes:
    """The ustar header of a regular file: mode 0644, uid, gid and mtime 0, so that equal contents are equal bytes."""
    encoded = name.encode()
    if not 0 < len(encoded) <= _MAX_NAME or size >= _MAX_SIZE:
        raise DataError(f"tar member {name!r} of {size} bytes: a ustar name has 1 to 100 bytes, a file less than 8 GiB")
    block = bytearray(BLOCK)
    block[0 : len(encoded)] = encoded
    block[100:108] = b"0000644\0"
    block[108:116] = block[116:124] = b"0000000\0"
    block[124:136] = b"%011o\0" % size
    block[136:148] = b"00000000000\0"
    block[148:156] = b" " * 8
    block[156:157] = b"0"
    block[257:265] = b"ustar\x0000"
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


class TarWriter:
    """Writes samples one after another and remembers where each begins, in blocks."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._hash = xxhash.xxh3_64()
        self._sample = xxhash.xxh3_64()
        self.bytes = 0
        self.offsets = [0]
        self.sums: list[int] = []

    @property
    def xxh3(self) -> int:
        """xxh3-64 of everything written so far."""
        return self._hash.intdigest()

    def add(self, base: str, parts: list[tuple[str, bytes]]) -> None:
        """One sample: (extension, contents) in the order given."""
        for extension, data in parts:
            self._write(header(f"{base}.{extension}", len(data)))
            self._write(data)
            self._write(bytes(padded(len(data)) - len(data)))
        self.offsets.append(self.bytes // BLOCK)
        self.sums.append(self._sample.intdigest() & _SUM)
        self._sample.reset()

    def close(self) -> None:
        """Two empty blocks end the archive; the file stays open."""
        self._write(_END)
        self._file.flush()

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)
        self._sample.update(data)
        self.bytes += len(data)


# ---------------------------------------------------------------------------------------------- reading


def parse_files(data: bytes, where: str) -> list[tuple[str, bytes]]:
    """(name, contents) of the regular files within `data`, which begins at a header.

    The path of every sample that is read: plain headers are taken apart here, whatever else occurs in tars is left to
    `parse_members`, and header checksums to `scan` and `verify`.
    """
    files: list[tuple[str, bytes]] = []
    position, total = 0, len(data)
    while position < total:
        body = position + BLOCK
        name_end = data.find(b"\0", position, position + _MAX_NAME)
        if name_end <= position or body > total or data[position + 156] != _REGULAR or data[position + 345]:
            return [(m.name, data[m.data : m.data + m.size]) for m in parse_members(data, where)]
        try:
            size = int(data[position + 124 : position + 135], 8)
        except ValueError:
            raise DataError(f"{where}: no tar header at byte {position}; the file is damaged or no tar") from None
        if body + size > total:
            raise DataError(f"{where}: a file claims {size} bytes, {total - body} are there; the tar was cut off")
        name = data[position:name_end].decode("utf-8", "surrogateescape")
        files.append((name, data[body : body + size]))
        position = body + padded(size)
    return files


def parse_members(data: bytes, where: str) -> Iterator[Member]:
    """The regular files within `data`, which begins at a header and ends after the last file's padding."""
    position, start, long_name = 0, 0, ""
    while position + BLOCK <= len(data):
        block = data[position : position + BLOCK]
        if block[0] == 0 and not any(block):
            return
        name, size, kind = parse_header(block, where, position, checked=False)
        body = position + BLOCK
        if body + size > len(data):
            raise DataError(f"{where}: {name!r} claims {size} bytes, {len(data) - body} are there; the tar was cut off")
        position = body + padded(size)
        if kind in b"xL":
            long_name = _long_name(data[body : body + size], kind, where) or long_name
            continue
        if kind in b"0\0":
            yield Member(long_name or name, start, body, size)
        start, long_name = position, ""


def scan(file: BinaryIO, where: str, position: int = 0) -> Iterator[Member]:
    """The regular files of a tar from the header at `position` on, reading headers only.

    Raises DataError when the tar ends within a file. A tar without its two closing blocks was cut between files, which
    nothing else can see: refused too.
    """
    total = file.seek(0, 2)
    start, long_name = position, ""
    while True:
        file.seek(position)
        block = file.read(BLOCK)
        if len(block) < BLOCK:
            raise DataError(f"{where}: ends at byte {total} without the closing blocks of a tar; fetch it again")
        if not any(block):
            return
        name, size, kind = parse_header(block, where, position)
        body = position + BLOCK
        if body + size > total:
            raise DataError(f"{where}: {name!r} claims {size} bytes, {total - body} are there; the tar was cut off")
        position = body + padded(size)
        if kind in b"xL":
            long_name = _long_name(file.read(size), kind, where) or long_name
            continue
        if kind in b"0\0":
            yield Member(long_name or name, start, body, size)
        start, long_name = position, ""


def samples_of(pieces: Iterable[bytes], where: str) -> Iterator[tuple[int, bytes]]:
    """The samples of a tar that comes piece by piece -> (first byte, the bytes from it to the next sample).

    Holds one sample at a time. Raises DataError where the tar is cut off, also between files, or damaged.
    """
    source = _Pieces(pieces)
    start, key, sample = 0, "", list[bytes]()
    ahead_start, long_name, ahead = 0, "", list[bytes]()  # headers that belong to the next file
    while True:
        position = source.taken
        block = source.take(BLOCK)
        if len(block) < BLOCK:
            raise DataError(f"{where}: ends at byte {source.taken} without the closing blocks of a tar; fetch it again")
        if block[0] == 0 and not any(block):
            break
        name, size, kind = parse_header(block, where, position)
        body = source.take(padded(size))
        if len(body) < padded(size):
            raise DataError(f"{where}: {name!r} claims {size} bytes, {len(body)} are there; the tar was cut off")
        ahead_start = ahead_start if ahead else position
        ahead += (block, body)
        if kind in b"xL":
            long_name = _long_name(body[:size], kind, where) or long_name
            continue
        if kind in b"0\0":
            found = split_name(long_name or name)[0]
            if sample and found != key:
                yield start, b"".join(sample)
                sample = []
            start, key = (start, key) if sample else (ahead_start, found)
            sample += ahead
        elif sample:
            sample += ahead  # a folder or the like lies within the sample before it
        ahead, long_name = [], ""
    if sample:
        yield start, b"".join(sample)


class _Pieces:
    """Bytes in the sizes asked for, out of pieces of any size."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._pieces = iter(pieces)
        self._rest = memoryview(b"")
        self.taken = 0

    def take(self, count: int) -> bytes:
        """The next `count` bytes; fewer at the end."""
        parts = []
        wanted = count
        while wanted:
            if not self._rest:
                self._rest = memoryview(next(self._pieces, b""))
                if not self._rest:
                    break
            parts.append(self._rest[:wanted])
            self._rest = self._rest[len(parts[-1]) :]
            wanted -= len(parts[-1])
        self.taken += count - wanted
        return b"".join(parts)


def checksum(sample: bytes) -> int:
    """What an index keeps of a sample's bytes: the lower half of their xxh3-64."""
    return xxhash.xxh3_64_intdigest(sample) & _SUM


def parse_header(block: bytes, where: str, position: int, checked: bool = True) -> tuple[str, int, bytes]:
    """One header -> (name, size, type). Raises DataError where there is none, `checked` by its checksum too."""
    try:
        size = _number(block[124:136])
        whole = not checked or int(block[148:156].split(b"\0")[0], 8) == sum(block) - sum(block[148:156]) + 256
    except ValueError:
        whole = False
    if not whole:
        raise DataError(f"{where}: no tar header at byte {position}; the file is damaged or no tar")
    name = block[:100].split(b"\0", 1)[0]
    if block[345] and block[257:263] == b"ustar\0":
        name = block[345:500].split(b"\0", 1)[0] + b"/" + name
    return name.decode("utf-8", "surrogateescape"), size, block[156:157]


def _number(field: bytes) -> int:
    """Octal, or GNU's base 256 for large files."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    return int(field.split(b"\0", 1)[0].strip() or b"0", 8)


def _long_name(body: bytes, kind: bytes, where: str) -> str:
    """The name that a GNU (L) or PAX (x) header gives to the next file; empty where PAX says other things.

    Raises DataError for a PAX header whose records ("length key=value" and a line break) are none.
    """
    if kind == b"L":
        return body.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
    while body:
        digits, _, rest = body.partition(b" ")
        length = int(digits) if digits.isdigit() else 0
        if not len(digits) < length <= len(body):
            raise DataError(f"{where}: a PAX header says {body[:40]!r}; the tar is damaged, fetch it again")
        key, _, value = rest[: length - len(digits) - 1].partition(b"=")
        if key == b"path":
            return value.rstrip(b"\n").decode("utf-8", "surrogateescape")
        body = body[length:]
    return ""
