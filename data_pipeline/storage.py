"""One interface over a local folder and an S3 prefix: read, list, create; only `replace` overwrites."""

import contextlib
import errno
import os
import shutil
import uuid
from collections import OrderedDict
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import Any, Protocol

from data_pipeline.errors import DataError, storage_error

_OPEN_FILES = 512
_PIECE = 1 << 20


class Storage(Protocol):
    """Objects under one root, named by relative paths with `/`."""

    root: str

    def exists(self, name: str) -> bool:
        """Return whether an object of this name exists."""
        ...

    def stat(self, name: str) -> tuple[int, str]:
        """Return (bytes, etag; empty for local files). Raises DataError when the object is missing."""
        ...

    def folders(self) -> list[str]:
        """Return the names of the prefixes directly under the root that hold objects, sorted, without hidden ones."""
        ...

    def list(self) -> list[str]:
        """Return the names of the objects directly under the root, sorted."""
        ...

    def remove(self, name: str) -> None:
        """Remove one object; do nothing when it is missing."""
        ...

    def remove_all(self) -> None:
        """Remove the root with everything under it; objects that another process adds meanwhile may remain."""
        ...

    def get(self, name: str) -> bytes:
        """Return the whole object. Raises DataError when it is missing."""
        ...

    def get_range(self, name: str, start: int, stop: int) -> bytes:
        """Return bytes [start, stop). Raises DataError when there are fewer."""
        ...

    def stream(self, name: str) -> Iterator[bytes]:
        """Yield the whole object in pieces. Raises DataError when it is missing."""
        ...

    def put_if_absent(self, name: str, data: bytes) -> bool:
        """Create the object atomically -> True; return False and change nothing when the name is taken."""
        ...

    def put_file_if_absent(self, name: str, path: Path) -> bool:
        """Create the object from a file, which should be in `scratch()`, as `put_if_absent` does."""
        ...

    def replace(self, name: str, data: bytes) -> None:
        """Create or overwrite the object, atomically: for objects that point at the newest version."""
        ...

    def scratch(self) -> contextlib.AbstractContextManager[Path]:
        """Return a private folder for files to pass to `put_file_if_absent`; it is removed afterwards."""
        ...

    def clean(self) -> None:
        """Remove what killed writers left behind."""
        ...


def open_storage(root: str | Path) -> Storage:
    """Open s3://bucket/prefix, http(s)://host/folder (read only) or a local folder."""
    from data_pipeline.remote import HttpStorage, S3Storage

    text = str(root)
    if text.startswith(("http://", "https://")):
        return HttpStorage(text)
    return S3Storage(text) if text.startswith("s3://") else LocalStorage(text)


class LocalStorage:
    """A folder. New files are written aside, synced and linked to their name, so no reader sees a partial file."""

    def __init__(self, root: str) -> None:
        self.root = root
        self._files: OrderedDict[str, FileIO] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self.root, "_files": OrderedDict()}

    def path(self, name: str) -> Path:
        """Return the file of an object."""
        return Path(self.root) / name

    def exists(self, name: str) -> bool:
        return self.path(name).exists()

    def stat(self, name: str) -> tuple[int, str]:
        with _named(self.root, name):
            return self.path(name).stat().st_size, ""

    def folders(self) -> list[str]:
        found = sorted(entry.name for entry in self._entries() if entry.is_dir())
        return [name for name in found if not name.startswith(".")]

    def list(self) -> list[str]:
        return sorted(entry.name for entry in self._entries() if entry.is_file())

    def _entries(self) -> "tuple[os.DirEntry[str], ...]":
        """List what is directly under the root; nothing if it is not a folder, or is removed while it is read."""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(self.root) as entries:
            return tuple(entries)
        return ()

    def remove(self, name: str) -> None:
        with _named(self.root, name):
            self.path(name).unlink(missing_ok=True)

    def remove_all(self) -> None:
        with _named(self.root, ""):
            shutil.rmtree(self.root, onerror=_unless_shared)

    def get(self, name: str) -> bytes:
        with _named(self.root, name):
            return self.path(name).read_bytes()

    def get_range(self, name: str, start: int, stop: int) -> bytes:
        try:
            file = self._open(name)  # keeps it open until it is read: another thread may evict it
            data = os.pread(file.fileno(), stop - start, start)
        except OSError:
            with _named(self.root, name):
                raise
        except (MemoryError, OverflowError):
            data = b""  # more than any file holds
        if len(data) != stop - start:
            raise DataError(f"{self.path(name)}: requested bytes {start}..{stop}, got {len(data)}; it was truncated")
        return data

    def stream(self, name: str) -> Iterator[bytes]:
        with _named(self.root, name), self.path(name).open("rb", buffering=0) as file:
            while piece := file.read(_PIECE):
                yield piece

    def put_if_absent(self, name: str, data: bytes) -> bool:
        if self.exists(name):
            return False
        with self.scratch() as folder:
            temporary = folder / "object"
            with _writing(self.root, name):
                temporary.write_bytes(data)
            return self.put_file_if_absent(name, temporary)

    def put_file_if_absent(self, name: str, path: Path) -> bool:
        with _writing(self.root, name):
            with path.open("rb") as file:
                os.fsync(file.fileno())
            try:
                os.link(path, self.path(name))
            except FileExistsError:
                return False
            _sync_folder(self.path(name).parent)
        return True

    def replace(self, name: str, data: bytes) -> None:
        with self.scratch() as folder, _writing(self.root, name):
            with (folder / "object").open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(folder / "object", self.path(name))
            _sync_folder(self.path(name).parent)

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        folder = Path(self.root) / ".tmp" / uuid.uuid4().hex
        with _writing(self.root, ".tmp"):
            folder.mkdir(parents=True)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def clean(self) -> None:
        shutil.rmtree(Path(self.root) / ".tmp", ignore_errors=True)

    def _open(self, name: str) -> FileIO:
        """Return a file of the pool of open files; an evicted one is closed once no thread reads it."""
        file = self._files.get(name)
        if file is None:
            file = self._files[name] = FileIO(self.path(name))
            while len(self._files) > _OPEN_FILES:
                self._files.popitem(last=False)
        return file


@contextlib.contextmanager
def _named(root: str, name: str) -> Iterator[None]:
    """Turn an OSError about an object that is read or removed into a DataError with the remedy."""
    where = f"{root}/{name}"
    try:
        yield
    except FileExistsError:
        raise
    except FileNotFoundError:
        raise DataError(f"{where}: not found; check the path, or build the dataset first") from None
    except PermissionError as error:
        raise DataError(f"{where}: permission denied ({error}); grant this user access") from None
    except OSError as error:
        raise storage_error(error, where) from None


@contextlib.contextmanager
def _writing(root: str, name: str) -> Iterator[None]:
    """Turn an OSError about an object that is written into a DataError; the object need not exist."""
    try:
        yield
    except FileExistsError:
        raise
    except OSError as error:
        raise storage_error(error, f"{root}/{name}") from None


def _unless_shared(_: object, __: str, raised: tuple[Any, Any, Any]) -> None:
    """Ignore errors caused by another process that removes the same tree or adds to it; raise all others."""
    error = raised[1]
    if not isinstance(error, FileNotFoundError) and getattr(error, "errno", None) != errno.ENOTEMPTY:
        raise error


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
