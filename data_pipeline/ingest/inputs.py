"""Find and open input files, local, on S3 or over http(s): {00..99} ranges, * patterns and `::` unions."""

import contextlib
import gzip
import io
import itertools
import re
import zlib
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import unquote

import xxhash

from data_pipeline.errors import DataError
from data_pipeline.patterns import expand_braces, is_remote
from data_pipeline.remote import HttpStorage, NotFound, S3Storage, Version
from data_pipeline.storage import open_storage

_BUFFER = 1 << 20
GZIP_MAGIC = b"\x1f\x8b"
_WINDOW = 8 << 20
_HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"


def without_query(path: str) -> str:
    """Return the path; for an http(s) URL, without query and fragment."""
    return path.partition("?")[0].partition("#")[0] if path.startswith(("http://", "https://")) else path


def beside(path: str, name: str) -> str:
    """Return `name` resolved against the folder of `path`."""
    if is_remote(name) or not is_remote(path):
        return name if is_remote(name) else str(Path(path).parent / name)
    return path.rpartition("/")[0] + "/" + name.removeprefix("./")


def input_paths(pattern: str, suffixes: tuple[str, ...], field: str = "source.path") -> list[str]:
    """Return the files that a pattern names, in its order.

    A folder expands to its files with one of `suffixes`, sorted, including those in `column=value` folders of a
    partitioned table. Hidden files, such as macOS's ._NAME, are skipped. Raises DataError for missing files, naming the
    setting `field`.
    """
    paths: list[str] = []
    for part in pattern.split("::"):
        for name in expand_braces(part):
            paths += _remote_paths(name, suffixes, field) if is_remote(name) else _local_paths(name, suffixes, field)
    return paths


def _local_paths(name: str, suffixes: tuple[str, ...], field: str) -> list[str]:
    path = Path(name)
    with readable(name, field):
        if "*" in name and not path.exists():
            root = Path(path.anchor or ".")
            files = (str(file) for file in root.glob(str(path.relative_to(path.anchor))) if file.is_file())
            if found := sorted(file for file in files if not _is_hidden(file, name)):
                return found
        must_exist(path, field)
        if path.is_dir():
            return sorted(_files_in(path, suffixes))
    return [name]


def _files_in(folder: Path, suffixes: tuple[str, ...]) -> Iterator[str]:
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.name.endswith(suffixes):
            yield str(path)
        elif "=" in path.name and path.is_dir():
            yield from _files_in(path, suffixes)


def _is_hidden(path: str, pattern: str) -> bool:
    """Return whether a path component begins with a dot and is not spelled out in the pattern."""
    return any(part.startswith(".") and part not in pattern.split("/") for part in path.split("/"))


def _parts_of(path: str) -> list[str]:
    """Split a path into its components, without the scheme."""
    return [part for part in path.partition("://")[2 * is_remote(path)].split("/") if part not in ("", ".")]


def partition_of(pattern: str, path: str) -> dict[str, str | None]:
    """Return the column values given by the `column=value` folders of a partitioned table.

    Only path components after the fixed start of the pattern (up to its first *) count. Format as written by Hive and
    Spark: percent-encoded, null as __HIVE_DEFAULT_PARTITION__.
    """
    if "=" not in path:
        return {}
    for name in (name for part in pattern.split("::") for name in expand_braces(part)):
        parts, fixed = _parts_of(path), list(itertools.takewhile(lambda part: "*" not in part, _parts_of(name)))
        if parts[: len(fixed)] == fixed:
            pairs = [part.partition("=") for part in parts[len(fixed) : -1] if "=" in part]
            return {unquote(column): None if value == _HIVE_NULL else unquote(value) for column, _, value in pairs}
    return {}


def _remote_paths(name: str, suffixes: tuple[str, ...], field: str) -> list[str]:
    if name.startswith(("http://", "https://")):
        return [name]
    with _named(name, field):
        system, path = _filesystem(name)
        if "*" in name:
            found = sorted(file for file in map(str, system.glob(path)) if not _is_hidden(file, path))
        elif system.isdir(path):
            found = sorted(_remote_files_in(system, path, suffixes))
        else:
            system.info(path)
            found = [path]
        if not found:
            raise FileNotFoundError(name)
    return [system.unstrip_protocol(file) for file in found]


def _remote_files_in(system: Any, folder: str, suffixes: tuple[str, ...]) -> Iterator[str]:
    for entry in system.ls(folder, detail=True):
        path = str(entry["name"]).rstrip("/")
        name = path.rpartition("/")[2]
        if name.startswith("."):
            continue
        if name.endswith(suffixes):
            yield path
        elif "=" in name and entry["type"] == "directory" and path != folder.rstrip("/"):
            yield from _remote_files_in(system, path, suffixes)


def open_input(path: str) -> BinaryIO:
    """Open a seekable stream of the file's bytes, decompressed if its name ends in .gz or a server sends gzip.

    Raises DataError, also while reading, for a file that is missing, unreadable, truncated or damaged. Seeking in a
    .gz decompresses everything before the target, so many files are faster than one large one.
    """
    if is_remote(path):
        file, packed = _open_remote(path)
        return _checked(path, file, packed) if packed else file
    must_exist(Path(path), "source.path")
    with readable(path):
        return _checked(path, open(path, "rb", buffering=0), path.endswith(".gz"))  # noqa: SIM115


def read_input(path: str) -> bytes:
    """Read a whole file; a .gz file is returned compressed.

    Raises OSError; FileNotFoundError if the file is missing, also on a remote server.
    """
    if not is_remote(path):
        return Path(path).read_bytes()
    try:
        file, packed = _open_remote(path)
        with _checked(path, file, True) if packed and not without_query(path).endswith(".gz") else file as opened:
            return opened.read()
    except NotFound as error:
        raise FileNotFoundError(str(error)) from None


def _open_remote(path: str) -> tuple[BinaryIO, bool]:
    """Return (stream of the file's stored bytes, whether they are gzip)."""
    if not path.startswith(("s3://", "http://", "https://")):
        with _named(path, "source.path"):
            system, inner = _filesystem(path)
            return cast(BinaryIO, io.BufferedReader(system.open(inner, "rb"), _BUFFER)), path.endswith(".gz")
    remote = RemoteFile(path)
    file = io.BufferedReader(remote, _BUFFER)
    packed = path.endswith(".gz")
    if not packed and (remote.packed or _named_gzip(path)):  # headers and queries may be wrong: check the bytes
        packed = file.peek(2)[:2] == GZIP_MAGIC
    return cast(BinaryIO, file), packed


def _named_gzip(path: str) -> bool:
    """Return whether .gz ends the path of an http(s) URL with a query or fragment, or a value in its query."""
    return path.startswith("http") and re.search(r"\.gz[?&#]", path) is not None


def _checked(path: str, file: Any, packed: bool) -> BinaryIO:
    return cast(BinaryIO, io.BufferedReader(_CheckedFile(path, file, packed), _BUFFER))


class _CheckedFile(io.RawIOBase):
    """An open file, decompressed if `packed` (gzip). Raises DataError when reading or seeking fails."""

    def __init__(self, path: str, file: Any, packed: bool) -> None:
        self._path, self._inner = path, file
        self._file = gzip.GzipFile(fileobj=file) if packed else file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return int(self._file.tell())

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        with readable(self._path):
            return int(self._file.seek(offset, whence))

    def readinto(self, buffer: Any) -> int:
        with readable(self._path):
            return int(self._file.readinto(buffer))

    def close(self) -> None:
        self._file.close()
        self._inner.close()
        super().close()


class RemoteFile(io.RawIOBase):
    """A seekable file on S3 or over http(s). A GET that breaks, stalls or is refused resumes where it stopped.

    Reading from the start uses one GET, from any other offset ranges of _WINDOW bytes. Raises DataError.
    packed: the server declares the bytes as gzip.
    """

    def __init__(self, path: str) -> None:
        folder, _, self._name = path.rpartition("/")
        self._storage = cast(S3Storage | HttpStorage, open_storage(folder))
        self.packed = False
        if isinstance(self._storage, HttpStorage):
            self._storage.takes_packed = True
            told = self._storage.head(self._name)
            self._size, self.packed = told.version.size, told.packed
        else:
            self._size, _ = self._storage.stat(self._name)
        self._at = 0
        self._seen: dict[str, Version] = {}
        self._pieces: Iterator[bytes] = iter(())
        self._piece = memoryview(b"")
        self._end: int | None = 0  # offset where `_pieces` ends; None: at the end of the file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_END and self._size < 0:
            raise DataError(
                f"{self._storage.path(self._name)}: the server does not send its size, and it is read from the "
                "end; use a server that does, or copy it here"
            )
        at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        if at != self._at:
            self._stop()
        self._at = at
        return at

    def readinto(self, buffer: Any) -> int:
        if not self._piece:
            if self._end is not None and self._at >= self._end:
                self._start()
            self._piece = memoryview(next(self._pieces, b""))
        count = min(len(buffer), len(self._piece))
        buffer[:count] = self._piece[:count]
        self._piece = self._piece[count:]
        self._at += count
        return count

    def close(self) -> None:
        self._stop()
        super().close()

    def _start(self) -> None:
        if self._at >= self._size >= 0:
            return
        self._end = None if self._at == 0 or self._size < 0 else min(self._at + _WINDOW, self._size)
        self._pieces = self._storage.stream(self._name, self._at, self._end, self._seen)

    def _stop(self) -> None:
        if isinstance(self._pieces, Generator):
            self._pieces.close()
        self._pieces, self._piece, self._end = iter(()), memoryview(b""), 0


def input_digest(path: str) -> tuple[str, int]:
    """Return what detects a changed file: (xxh3 of its bytes, their number); if remote, (size and ETag, 0)."""
    if is_remote(path):
        with _named(path, "source.path"):
            system, inner = _filesystem(path)
            info = system.info(inner)
        return f"{info.get('size')}-{info.get('ETag', '')}", 0
    digest, size = xxhash.xxh3_128(), 0
    with open_input(path) as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
            size += len(chunk)
    return digest.hexdigest(), size


def must_exist(path: Path, field: str) -> None:
    """Raise DataError, naming the setting `field`, if there is no such file or folder."""
    with readable(str(path), field):
        there = path.exists()
    if not there:
        raise DataError(
            f"{path}: not found; {field} must be a file or folder on this machine, relative to {Path.cwd()}"
        )


@contextlib.contextmanager
def readable(path: str, field: str = "source.path") -> Iterator[None]:
    """Convert errors of the operating system and of decompression to a DataError with the file and the remedy."""
    try:
        yield
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: truncated or damaged ({error}); download it again") from None
    except OSError as error:
        raise DataError(
            f"{error.filename or path}: {error.strerror or error}; {field} must be readable; grant this user "
            "access or use another path"
        ) from None


def _filesystem(path: str) -> tuple[Any, str]:
    import fsspec

    system, inner = fsspec.core.url_to_fs(path)
    return system, inner


class _named:
    """Convert errors of a remote file system to a DataError (NotFound if missing) with the address and the setting."""

    def __init__(self, path: str, field: str) -> None:
        self._path, self._field = path, field

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, DataError):
            raise (NotFound if isinstance(error, FileNotFoundError) else DataError)(
                f"{self._path}: {type(error).__name__}: {error}; {self._field} must be readable from this machine"
            ) from None
