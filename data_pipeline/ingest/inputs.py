"""Input files by name: on this machine, on S3 or behind http(s), with {00..99} ranges, * patterns and `::` unions."""

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
_GZIP_MAGIC = b"\x1f\x8b"
_WINDOW = 8 << 20
_HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"


def without_query(path: str) -> str:
    """The path, of an http address without its query."""
    return path.partition("?")[0].partition("#")[0] if path.startswith(("http://", "https://")) else path


def beside(path: str, name: str) -> str:
    """`name` relative to the folder of `path`."""
    if is_remote(name) or not is_remote(path):
        return name if is_remote(name) else str(Path(path).parent / name)
    return path.rpartition("/")[0] + "/" + name.removeprefix("./")


def input_paths(pattern: str, suffixes: tuple[str, ...], field: str = "source.path") -> list[str]:
    """Files that a pattern names, in its order; of a folder those with one of `suffixes`, sorted, also in the folders
    `column=value` of a partitioned table below it. Hidden files, such as macOS's ._NAME, are passed over.

    Raises DataError for what is not there; `field` is the setting that is named then.
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
    """Does a part of the path begin with a dot where that of the pattern does not say so?"""
    return any(part.startswith(".") and part not in pattern.split("/") for part in path.split("/"))


def _parts_of(path: str) -> list[str]:
    """The names of folders and of the file in a path, without the scheme."""
    return [part for part in path.partition("://")[2 * is_remote(path)].split("/") if part not in ("", ".")]


def partition_of(pattern: str, path: str) -> dict[str, str | None]:
    """The columns that the folders `column=value` of a partitioned table say, from the folder or the first * of the
    pattern on; as Hive and Spark write them: percent-encoded, one name for null."""
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
    """A seekable stream of the file's bytes, unpacked where its name ends in .gz or a server sends it packed.

    Raises DataError, also while it is read: for one that is missing, cannot be read, or is cut off or damaged.
    Seeking in a .gz unpacks what lies before; many files are better than one large one there.
    """
    if is_remote(path):
        file, packed = _open_remote(path)
        return _checked(path, file, packed) if packed else file
    must_exist(Path(path), "source.path")
    with readable(path):
        return _checked(path, open(path, "rb", buffering=0), path.endswith(".gz"))  # noqa: SIM115


def read_input(path: str) -> bytes:
    """The whole file, of a .gz as it is packed.

    Raises OSError; FileNotFoundError too for what is not there on a server that answers.
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
    """-> (a stream of the file's bytes as they lie there, whether these are packed)."""
    if not path.startswith(("s3://", "http://", "https://")):
        with _named(path, "source.path"):
            system, inner = _filesystem(path)
            return cast(BinaryIO, io.BufferedReader(system.open(inner, "rb"), _BUFFER)), path.endswith(".gz")
    remote = RemoteFile(path)
    file = io.BufferedReader(remote, _BUFFER)
    packed = path.endswith(".gz")
    if not packed and (remote.packed or _named_gzip(path)):  # words of a server or a query: the bytes decide
        packed = file.peek(2)[:2] == _GZIP_MAGIC
    return cast(BinaryIO, file), packed


def _named_gzip(path: str) -> bool:
    """Does an http address have .gz before the end of its name, or of a value in its query?"""
    return path.startswith("http") and re.search(r"\.gz[?&#]", path) is not None


def _checked(path: str, file: Any, packed: bool) -> BinaryIO:
    return cast(BinaryIO, io.BufferedReader(_CheckedFile(path, file, packed), _BUFFER))


class _CheckedFile(io.RawIOBase):
    """An open file, or what it unpacks to where it is `packed` as gzip. Raises DataError for what cannot be read."""

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
    """A file on S3 or behind http(s): a GET that is cut, stalled or refused goes on where it stopped.

    From its beginning it comes by one GET, from any other place by ranges of _WINDOW bytes. Raises DataError.
    packed: the server says that these bytes are gzip's.
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
        self._end: int | None = 0  # of what `_pieces` gives

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_END and self._size < 0:
            raise DataError(
                f"{self._storage.path(self._name)}: the server does not say its size, and it is read from the "
                "end; serve it with one that does, or copy it here"
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
    """What tells a file from an edited one: (xxh3 of its bytes, their number), or, elsewhere, (size and tag, 0)."""
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
    """Raises DataError naming the setting where there is no such file or folder."""
    with readable(str(path), field):
        there = path.exists()
    if not there:
        raise DataError(f"{path}: not there; {field} names a file or folder of this machine, relative to {Path.cwd()}")


@contextlib.contextmanager
def readable(path: str, field: str = "source.path") -> Iterator[None]:
    """Turns what the operating system or an unpacker says into a DataError that names the file and the remedy."""
    try:
        yield
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cut off or damaged ({error}); fetch it again") from None
    except OSError as error:
        raise DataError(
            f"{error.filename or path}: {error.strerror or error}; {field} names what this user can read, give it the "
            "right to it or name another"
        ) from None


def _filesystem(path: str) -> tuple[Any, str]:
    import fsspec

    system, inner = fsspec.core.url_to_fs(path)
    return system, inner


class _named:
    """Turns what a remote file system raises into a DataError naming the address and the setting."""

    def __init__(self, path: str, field: str) -> None:
        self._path, self._field = path, field

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, DataError):
            raise (NotFound if isinstance(error, FileNotFoundError) else DataError)(
                f"{self._path}: {type(error).__name__}: {error}; {self._field} must name something that can be read "
                "from this machine"
            ) from None
