"""One small interface over a local folder and an S3 prefix: read, list, create; only `replace` overwrites."""

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
        """Is there an object of this name?"""
        ...

    def stat(self, name: str) -> tuple[int, str]:
        """-> (bytes, etag; empty for local files). Raises DataError where it is missing."""
        ...

    def folders(self) -> list[str]:
        """Names of the prefixes directly under the root that hold objects, sorted; hidden ones left out."""
        ...

    def list(self) -> list[str]:
        """Names of the objects directly under the root, sorted."""
        ...

    def remove(self, name: str) -> None:
        """Remove one object; nothing happens where it is missing."""
        ...

    def remove_all(self) -> None:
        """Remove the root with everything under it; what another process adds meanwhile may stay."""
        ...

    def get(self, name: str) -> bytes:
        """The whole object. Raises DataError where it is missing."""
        ...

    def get_range(self, name: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop). Raises DataError when there are fewer."""
        ...

    def stream(self, name: str) -> Iterator[bytes]:
        """The whole object in pieces. Raises DataError where it is missing."""
        ...

    def put_if_absent(self, name: str, data: bytes) -> bool:
        """Create the object at once and whole; False, and nothing changed, where the name is taken."""
        ...

    def put_file_if_absent(self, name: str, path: Path) -> bool:
        """The same from a file, which should lie in `scratch()`."""
        ...

    def replace(self, name: str, data: bytes) -> None:
        """Create the object or put another in its place, at once and whole: for what points at the newest version."""
        ...

    def scratch(self) -> contextlib.AbstractContextManager[Path]:
        """A private folder for files on their way to `put_file_if_absent`; removed afterwards."""
        ...

    def clean(self) -> None:
        """Remove what killed writers left behind."""
        ...


def open_storage(root: str | Path) -> Storage:
    """s3://bucket/prefix, http(s)://host/folder (for reading) or a local folder -> Storage."""
    from data_pipeline.remote import HttpStorage, S3Storage

    text = str(root)
    if text.startswith(("http://", "https://")):
        return HttpStorage(text)
    return S3Storage(text) if text.startswith("s3://") else LocalStorage(text)


class LocalStorage:
    """A folder. New files are written aside, synced and linked to their name, so a name is never seen half-written."""

    def __init__(self, root: str) -> None:
        self.root = root
        self._files: OrderedDict[str, FileIO] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self.root, "_files": OrderedDict()}

    def path(self, name: str) -> Path:
        """The file of an object."""
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
        """What lies directly under the root: nothing, where it is no folder, or none any more as it is read."""
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
            file = self._open(name)  # held until it is read: another thread may put another in its place
            data = os.pread(file.fileno(), stop - start, start)
        except OSError:
            with _named(self.root, name):
                raise
        except (MemoryError, OverflowError):
            data = b""  # more than any file holds
        if len(data) != stop - start:
            raise DataError(f"{self.path(name)}: bytes {start}..{stop} asked for, {len(data)} there; it was cut off")
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
        """One of the files kept open; it is closed once no thread reads it any more."""
        file = self._files.get(name)
        if file is None:
            file = self._files[name] = FileIO(self.path(name))
            while len(self._files) > _OPEN_FILES:
                self._files.popitem(last=False)
        return file


@contextlib.contextmanager
def _named(root: str, name: str) -> Iterator[None]:
    """Raise what the operating system says of an object that is read or removed as a DataError with the remedy."""
    where = f"{root}/{name}"
    try:
        yield
    except FileExistsError:
        raise
    except FileNotFoundError:
        raise DataError(f"{where}: not there; check the path, or build the dataset first") from None
    except PermissionError as error:
        raise DataError(f"{where}: permission denied ({error}); give this user the right to it") from None
    except OSError as error:
        raise storage_error(error, where) from None


@contextlib.contextmanager
def _writing(root: str, name: str) -> Iterator[None]:
    """The same of an object that is written, of which nothing needs to be there."""
    try:
        yield
    except FileExistsError:
        raise
    except OSError as error:
        raise storage_error(error, f"{root}/{name}") from None


def _unless_shared(_: object, __: str, raised: tuple[Any, Any, Any]) -> None:
    """While a tree is removed: another process removes it too, or adds to it. Anything else is raised."""
    error = raised[1]
    if not isinstance(error, FileNotFoundError) and getattr(error, "errno", None) != errno.ENOTEMPTY:
        raise error


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
