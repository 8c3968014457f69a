"""Write the output of commands: atomically, without overwriting other files, with the permissions of the umask."""

import contextlib
import filecmp
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from data_pipeline.errors import ConfigError, DataError, storage_errors

ASIDE = ".part"
"""Suffix of what is being written; a killed command may leave it behind, but a folder with only these counts as new."""


def refuse_used(folder: str | Path) -> None:
    """Raise ConfigError for a folder that is not empty, DataError for a path that is a file or lies below one."""
    path = Path(folder)
    with storage_errors(path):
        _refuse_files(path)
        entries = [entry.name for entry in os.scandir(path)] if path.is_dir() else []
    used = sorted(name for name in entries if not name.endswith(ASIDE))
    if used:
        raise ConfigError(f"{path} is not empty, it holds {used[0]}; nothing was written, use a new folder")


def _refuse_files(path: Path) -> None:
    """Raise DataError when `path` or a parent of it is a file."""
    there = next(above for above in (path, *path.absolute().parents) if os.path.lexists(above))
    if not there.is_dir():
        raise DataError(f"{there} is not a folder; nothing was written, use a new folder")


@contextlib.contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """Yield a folder to fill, which is renamed to `folder` when the block succeeds; after an error it is removed.

    An existing empty folder is kept and filled. Raises as `refuse_used` does, and DataError when the file system fails.
    """
    path = Path(folder)
    refuse_used(path)
    with storage_errors(path):
        home = path if path.is_dir() else path.parent
        home.mkdir(parents=True, exist_ok=True)
        aside = home / f".{uuid.uuid4().hex}{ASIDE}"
        aside.mkdir()
        try:
            yield aside
            _finish(aside)
            refuse_used(path)  # another command may have filled it meanwhile
            if home == path:
                for entry in sorted(aside.iterdir(), reverse=True):  # config.json last: with it the folder is complete
                    entry.rename(path / entry.name)
            else:
                aside.rename(path)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def holds_same(folder: str | Path, write: Callable[[Path], object]) -> bool:
    """Return whether `folder` holds, byte for byte, every file that `write` puts into a new folder."""
    path = Path(folder)
    if not path.is_dir():
        return False
    with storage_errors(path), tempfile.TemporaryDirectory(prefix=".", suffix=ASIDE, dir=path.parent) as aside:
        write(Path(aside))
        files = [file.relative_to(aside) for file in Path(aside).rglob("*") if file.is_file()]
        return all((path / file).is_file() and filecmp.cmp(path / file, aside / file, shallow=False) for file in files)


def write_whole(file: str | Path, data: bytes) -> None:
    """Create or replace the file, atomically. Raises DataError when it cannot be written."""
    path = Path(file)
    with storage_errors(path):
        aside = path.parent / f".{uuid.uuid4().hex}{ASIDE}"
        try:
            with aside.open("wb") as opened:
                opened.write(data)
                opened.flush()
                os.fsync(opened.fileno())
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)


def _finish(folder: Path) -> None:
    """Give every file the permissions of the umask (libraries create theirs as 0600), and sync it."""
    for file in (path for path in folder.rglob("*") if path.is_file()):
        file.chmod(file.parent.stat().st_mode & 0o666)
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
