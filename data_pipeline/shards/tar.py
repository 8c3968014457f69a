"""Tar reading and writing at byte level: a deterministic ustar writer and a header scanner for any WebDataset tar.

A sample is a run of consecutive files that share a base name up to the first dot: 000000012.png, .txt, .json.
Sizes in headers are untrusted: each is checked against the data that is there, and every parsing step moves forward.
"""

import io
import itertools
import re
from collections.abc import Iterable, Iterator
from typing import BinaryIO, NamedTuple, Protocol

import xxhash

from data_pipeline.errors import DataError

BLOCK = 512
_MAX_NAME = 100
_MAX_SIZE = 8 * 1024**3
_END = bytes(2 * BLOCK)
_REGULAR = ord("0")
_SUM = (1 << 32) - 1
_NUMBERED = re.compile(r"[0-9][0-9._-]*\.[a-z][a-z0-9]*")
_LITTER = re.compile(r"(^|/)(\.[^/]*|thumbs\.db|desktop\.ini)$|(^|/)__MACOSX/|^__[^/]*__($|/)", re.IGNORECASE)
_PACKED = "gz|bz2|xz|zst|zstd|lz4|lzma|z|br"
_COMPRESSED_TAR = re.compile(rf"\.(tar\.({_PACKED})|tgz|tbz2?|txz|tzst)$", re.IGNORECASE)
_COMPRESSED = re.compile(rf"\.({_PACKED}|tgz|tbz2?|txz|tzst|zip)$", re.IGNORECASE)
_OCTAL = re.compile(rb"[0-7]+")
_EXTENDED = b"xXgLK"  # PAX headers of one entry (X: Solaris) and global ones, GNU's long names and long link targets
_MAX_EXTENDED = 1 << 20
_NO_MEMBERS = b"5VDA"  # folders, GNU's volume labels and name lists, access rights
_WITHOUT_BODY = b"123456"  # links, devices, folders and pipes: no contents follow, whatever size they state

NEWEST = 3
"""Version of the rules that group tar members into samples (`group_samples`) and parse them (`samples.read_sample`)."""

_COMPRESSIONS = {
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"BZh": ("bzip2", "bunzip2"),
    b"\xfd7zXZ\0": ("xz", "unxz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
    b"\x04\x22\x4d\x18": ("lz4", "unlz4"),
    b"PK\x03\x04": ("zip", "unzip, then pack with tar"),
}


class NotAFile(str):
    """Description of a tar entry that is not a regular file, such as "a hard link to 'a.jpg'"."""


class Member(NamedTuple):
    """An entry of a tar, a regular file unless `instead` is set. Offsets and size are in bytes.

    start: offset of its first header. data: offset of its contents.
    """

    name: str
    start: int
    data: int
    size: int
    instead: NotAFile | None = None

    @property
    def stop(self) -> int:
        """Offset of the next header."""
        return self.data + padded(self.size)


def padded(size: int) -> int:
    """Return `size`, in bytes, rounded up to whole blocks."""
    return -(-size // BLOCK) * BLOCK


def split_name(name: str) -> tuple[str, str]:
    """Split at the first dot of the last path part, WebDataset's rule: `a/b/key.seg.png` -> (`a/b/key`, `seg.png`)."""
    folder, slash, base = name.rpartition("/")
    key, _, extension = base.partition(".")
    return folder + slash + key, extension.lower()


def split_names(names: list[str]) -> list[tuple[str, str]]:
    """Return (key, extension) of consecutive files that have one key under WebDataset's rule.

    Where none has a plain extension and only numbers lie between the dots, as in `22.05.jpg` and `22.06.jpg`, the
    numbers belong to the keys: under WebDataset's rule none of these files would be found.
    """
    parts = [split_name(name) for name in names]
    if all(_NUMBERED.fullmatch(extension) for _, extension in parts):
        return [(name.rpartition(".")[0], name.rpartition(".")[2].lower()) for name in names]
    return parts


def is_litter(name: str) -> bool:
    """Return whether archivers or webdataset made this file, not a user: dot files, `__MACOSX/`, `__meta__/`."""
    return bool(_LITTER.search(name))


def group_samples(members: Iterable[Member], version: int = NEWEST) -> Iterator[list[Member]]:
    """Group consecutive members with one key into samples.

    Version 1, for datasets indexed with it: members are the regular files, litter included, and keys end at the first
    dot. Later versions: links and other entries are members too, litter is not, and keys are those of `split_names`.
    """
    if version == 1:
        members = (member for member in members if not member.instead)
    else:
        members = (member for member in members if not is_litter(member.name))
    for _, group in itertools.groupby(members, key=lambda member: split_name(member.name)[0]):
        sample = list(group)
        if version == 1:
            yield sample
            continue
        keys = [key for key, _ in split_names([member.name for member in sample])]
        for _, part in itertools.groupby(zip(keys, sample, strict=True), key=lambda pair: pair[0]):
            yield [member for _, member in part]


def refuse_compressed(names: Iterable[str], where: str) -> None:
    """Raise DataError when one of the files is a compressed tar, or when there are compressed files and no tar."""
    names = sorted(names)
    pattern = _COMPRESSED_TAR if any(name.endswith(".tar") for name in names) else _COMPRESSED
    if packed := [name for name in names if pattern.search(name)]:
        raise DataError(
            f"{where}: {len(packed)} compressed files, such as {packed[0]}; samples are read by byte offset, "
            "which compression prevents; decompress them first (gunzip, unzstd, bunzip2, unxz)"
        )


# ---------------------------------------------------------------------------------------------- writing


def header(name: str, size: int) -> bytes:
    """Return the ustar header of a regular file: mode 0644; uid, gid, mtime 0, so equal contents give equal bytes."""
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
    """Writes samples in sequence and records the offset of each, in blocks."""

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
        """Write one sample: (extension, contents) pairs in the given order."""
        for extension, data in parts:
            self._write(header(f"{base}.{extension}", len(data)))
            self._write(data)
            self._write(bytes(padded(len(data)) - len(data)))
        self.offsets.append(self.bytes // BLOCK)
        self.sums.append(self._sample.intdigest() & _SUM)
        self._sample.reset()

    def close(self) -> None:
        """End the archive with two empty blocks; the file stays open."""
        self._write(_END)
        self._file.flush()

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)
        self._sample.update(data)
        self.bytes += len(data)


# ---------------------------------------------------------------------------------------------- reading


def parse_files(data: bytes, where: str) -> list[tuple[str, "bytes | NotAFile"]]:
    """Return (name, contents) of every entry in `data` except folders; `data` begins at a header.

    Every sample that is read takes this path: plain headers are parsed here, all others by `parse_members`. Header
    checksums are checked by `scan` and `verify` only.
    """
    files: list[tuple[str, bytes | NotAFile]] = []
    position, total = 0, len(data)
    while position < total:
        body = position + BLOCK
        name_end = data.find(b"\0", position, position + _MAX_NAME)
        digits = data[position + 124 : position + 135]
        if (
            name_end <= position
            or body > total
            or data[position + 156] != _REGULAR
            or data[position + 345]
            or data[position + 135]
            or not digits.isdigit()
        ):
            return [(m.name, m.instead or data[m.data : m.data + m.size]) for m in parse_members(data, where)]
        name = data[position:name_end].decode("utf-8", "surrogateescape")
        try:
            size = int(digits, 8)
        except ValueError:
            raise _no_size(where, position, digits, name) from None
        if body + size > total:
            raise _cut_off(where, name, size, total - body)
        files.append((name, data[body : body + size]))
        position = body + padded(size)
    return files


def parse_members(data: bytes, where: str) -> Iterator[Member]:
    """Yield the entries in `data`, which begins at a header and may end after any file's padding."""
    return _entries(_FileTape(io.BytesIO(data), where, closed=False), where, checked=False)


def scan(file: BinaryIO, where: str, position: int = 0) -> Iterator[Member]:
    """Yield the entries of a tar except folders, from the header at `position` on; reads headers only.

    Raises DataError for a damaged header, for a tar that ends within a file, and for one without its closing blocks,
    the only sign of a cut between two files.
    """
    return _entries(_FileTape(file, where, position), where)


def samples_of(
    pieces: Iterable[bytes], where: str, version: int = NEWEST, total: int | None = None
) -> Iterator[tuple[int, bytes]]:
    """Yield the samples of a tar that arrives in pieces, as (first byte, bytes from there to the next sample).

    version: of the rules in `group_samples`. total: size of the tar, if known. Holds two samples in memory.
    Raises DataError when the tar is damaged or cut off, even between files.
    """
    tape = _PieceTape(pieces, where, total)
    first: int | None = None
    for group in group_samples(_entries(tape, where), version):
        before = tape.cut(group[0].start)
        if first is not None:
            yield first, before
        first = group[0].start
    if first is not None:
        yield first, tape.cut(tape.complete)


def checksum(sample: bytes) -> int:
    """Return the checksum of a sample's bytes that an index stores: the lower half of their xxh3-64."""
    return xxhash.xxh3_64_intdigest(sample) & _SUM


# ---------------------------------------------------------------------------------------------- headers


def _entries(tape: "_Tape", where: str, checked: bool = True) -> Iterator[Member]:
    """Yield every entry except folders, with its extended headers applied. Each step advances by a block or more."""
    start, extended = tape.at, _Extended()
    while block := tape.header():
        name, size, kind, target = parse_header(block, where, tape.at - BLOCK, checked)
        if kind in _EXTENDED:
            if size > _MAX_EXTENDED:
                raise DataError(f"{where}: name of {size} bytes at byte {tape.at - BLOCK}; the tar is damaged")
            extended = extended.with_header(kind, tape.take(size), where)
            continue
        name = name if extended.name is None else extended.name
        while kind == b"S" and block[482 if block[156:157] == b"S" else 504]:  # GNU's map of a sparse file continues
            block = tape.take(BLOCK)
        if kind in _WITHOUT_BODY:
            size = 0
        elif extended.size is not None:
            size = extended.size
        data = tape.at
        tape.skip(size, name)
        if kind not in _NO_MEMBERS and not (kind == b"\0" and name.endswith("/")):
            yield Member(name, start, data, size, _instead(kind, extended, target))
        tape.complete = start = tape.at
        extended = _Extended()


def _instead(kind: bytes, extended: "_Extended", target: str) -> NotAFile | None:
    if kind in b"12":
        return NotAFile(f"a {'hard' if kind == b'1' else 'symbolic'} link to {extended.target or target!r}")
    if kind == b"S" or extended.sparse:
        return NotAFile("a sparse file")
    if kind in b"346":
        return NotAFile("a device or a pipe")
    return None if kind in b"0\0" + b"7" else NotAFile(f"an entry of the unknown type {kind!r}")


def parse_header(block: bytes, where: str, position: int, checked: bool = True) -> tuple[str, int, bytes, str]:
    """Parse one header -> (name, size, type, link target). Raises DataError for no header or an invalid size.

    checked: also verify its checksum, over unsigned bytes or, as some old programs wrote it, over signed ones.
    """
    if checked and not _fits_checksum(block):
        raise DataError(f"{where}: no tar header at byte {position}; {_compression(block, position)}")
    name = block[:100].split(b"\0", 1)[0]
    if block[345] and block[257:263] == b"ustar\0":
        name = block[345:500].split(b"\0", 1)[0] + b"/" + name
    size = _size(block[124:136])
    if size is None:
        raise _no_size(where, position, block[124:136], _text(name))
    return _text(name), size, block[156:157], _text(block[157:257].split(b"\0", 1)[0])


def _fits_checksum(block: bytes) -> bool:
    written = block[148:156].split(b"\0", 1)[0].strip(b" ")
    if not _OCTAL.fullmatch(written):
        return False
    missing = sum(block) - sum(block[148:156]) + 8 * ord(" ") - int(written, 8)
    return not missing or missing == 256 * sum(byte > 127 for byte in block[:148] + block[156:])


def _size(field: bytes) -> int | None:
    """Parse octal digits, or GNU's base 256 for large files; None for anything else, including negative numbers."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.split(b"\0", 1)[0].strip(b" ") or b"0"
    return int(digits, 8) if _OCTAL.fullmatch(digits) else None


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _compression(block: bytes, position: int) -> str:
    """Return what is wrong with a file that has no header, and the remedy."""
    for magic, (name, command) in _COMPRESSIONS.items():
        if position == 0 and block.startswith(magic):
            return f"it is compressed ({name}), and samples are read by byte offset; decompress it ({command})"
    return "the file is damaged or not a tar"


def _no_size(where: str, position: int, field: bytes, name: str) -> DataError:
    return DataError(
        f"{where}: the header at byte {position} has size {field!r} for {name!r}; a size must be octal or GNU's "
        "base 256, not negative; the tar is damaged, download it again"
    )


def _cut_off(where: str, name: str, size: int, there: int) -> DataError:
    return DataError(f"{where}: {name!r} has {there} of {size} bytes; the tar was truncated")


class _Extended(NamedTuple):
    """Fields that GNU and PAX extended headers set for the entry after them."""

    name: str | None = None
    size: int | None = None
    target: str | None = None
    sparse: bool = False

    def with_header(self, kind: bytes, body: bytes, where: str) -> "_Extended":
        """Return the fields after one more extended header: of two names the first counts, as in tarfile.

        Raises DataError for a damaged header.
        """
        if kind in b"LK":
            text = _text(body.split(b"\0", 1)[0])
            return self._or(_Extended(name=text) if kind == b"L" else _Extended(target=text))
        records = dict(_pax_records(body, where))
        if kind == b"g":  # of all entries that follow, which a sample that is read alone cannot know
            if named := sorted({b"path", b"size"} & records.keys()):
                raise DataError(
                    f"{where}: a global PAX header sets {named[0].decode()!r} for every entry; pack the tar again "
                    "without global headers"
                )
            return self
        size = records.get(b"size")
        if size is not None and not (size.isdigit() and len(size) < 20):
            raise DataError(f"{where}: a PAX header has size {size[:40]!r}; the tar is damaged, download it again")
        name, target = records.get(b"GNU.sparse.name", records.get(b"path")), records.get(b"linkpath")
        return self._or(
            _Extended(
                None if name is None else _text(name),
                None if size is None else int(size),
                None if target is None else _text(target),
                any(key.startswith(b"GNU.sparse.") for key in records),
            )
        )

    def _or(self, later: "_Extended") -> "_Extended":
        return _Extended(
            later.name if self.name is None else self.name,
            later.size if self.size is None else self.size,
            later.target if self.target is None else self.target,
            self.sparse or later.sparse,
        )


def _pax_records(body: bytes, where: str) -> Iterator[tuple[bytes, bytes]]:
    """Yield the (key, value) pairs of a PAX header, whose records are "length key=value" and a newline.

    Raises DataError for anything else.
    """
    at = 0
    while at < len(body):
        space = body.find(b" ", at, at + 20)
        digits = body[at:space] if space > at else b""
        end = at + (int(digits) if digits.isdigit() else 0)
        key, equals, value = body[space + 1 : end - 1].partition(b"=")
        if not at < space < end <= len(body) or not equals or body[end - 1 : end] != b"\n":
            raise DataError(
                f"{where}: invalid PAX header {body[at : at + 40]!r}; the tar is damaged, download it again"
            )
        yield key, value
        at = end


# ------------------------------------------------------------------------------------------------ tapes


class _Tape(Protocol):
    """A tar read forward. at: offset of the next byte; complete: end of the last complete entry."""

    at: int
    complete: int

    def header(self) -> bytes:
        """Return the next block, empty at the end of the tar. Raises DataError when the closing blocks are missing."""
        ...

    def take(self, size: int) -> bytes:
        """Return the next `size` bytes and advance past their padding. Raises DataError when they are missing."""
        ...

    def skip(self, size: int, name: str) -> None:
        """Advance past the contents of `name`. Raises DataError when they are missing."""
        ...


class _FileTape:
    """A tape over an open file. closed: whether it must end with a closing block."""

    def __init__(self, file: BinaryIO, where: str, position: int = 0, closed: bool = True) -> None:
        self._file, self._where, self._closed = file, where, closed
        self._total = file.seek(0, io.SEEK_END)
        self.at = self.complete = position

    def header(self) -> bytes:
        self._file.seek(self.at)
        block = self._file.read(BLOCK)
        if len(block) < BLOCK and self._closed:
            raise _no_end(self._where, self._total, block if self.at == 0 else b"")
        if len(block) < BLOCK or not any(block):
            return b""
        self.at += BLOCK
        return block

    def take(self, size: int) -> bytes:
        at = self.at
        self.skip(size, "a long name")
        self._file.seek(at)
        return self._file.read(size)

    def skip(self, size: int, name: str) -> None:
        if self.at + size > self._total:
            raise _cut_off(self._where, name, size, self._total - self.at)
        self.at += padded(size)


class _PieceTape:
    """A tape over pieces of any size, which buffers the bytes since the last cut."""

    def __init__(self, pieces: Iterable[bytes], where: str, total: int | None = None) -> None:
        self._pieces, self._where, self._total = iter(pieces), where, total
        self._kept, self._from = bytearray(), 0
        self.at = self.complete = 0

    def header(self) -> bytes:
        block = self._peek(BLOCK)
        if len(block) < BLOCK:
            raise _no_end(self._where, self.at + len(block), block if self.at == 0 else b"")
        if not any(block):
            return b""
        self.at += BLOCK
        return block

    def take(self, size: int) -> bytes:
        at = self.at
        self.skip(size, "a long name")
        return bytes(self._kept[at - self._from : at - self._from + size])

    def skip(self, size: int, name: str) -> None:
        if self._total is not None and self.at + size > self._total:
            raise _cut_off(self._where, name, size, self._total - self.at)
        there = self._fill(padded(size))
        if there < padded(size):
            raise _cut_off(self._where, name, size, there)
        self.at += padded(size)

    def cut(self, stop: int) -> bytes:
        """Return the bytes from the last cut to `stop`, and drop them from the buffer."""
        count = stop - self._from
        part = bytes(self._kept[:count])
        del self._kept[:count]  # moves the start of the buffer, not its bytes
        self._from = stop
        return part

    def _peek(self, count: int) -> bytes:
        self._fill(count)
        return bytes(self._kept[self.at - self._from : self.at - self._from + count])

    def _fill(self, count: int) -> int:
        """Read until `count` bytes from `at` on are buffered -> the number buffered, at most `count`."""
        wanted = self.at - self._from + count
        while len(self._kept) < wanted:
            piece = next(self._pieces, b"")
            if not piece:
                break
            self._kept += piece
        return min(count, len(self._kept) - (self.at - self._from))


def _no_end(where: str, total: int, start: bytes) -> DataError:
    why = _compression(start, 0)
    return DataError(
        f"{where}: ends at byte {total} without the closing blocks of a tar; "
        + (why if "compressed" in why else "download it again")
    )
