"""What a command writes for its user: whole or not at all, over nothing it did not make, under the umask."""

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
"""Ending of what is being written; a killed command may leave it behind, and it does not make a folder a used one."""


def refuse_used(folder: str | Path) -> None:
    """Raises ConfigError for a folder that holds something, DataError for what is no folder or lies below a file."""
    path = Path(folder)
    with storage_errors(path):
        _refuse_files(path)
        entries = [entry.name for entry in os.scandir(path)] if path.is_dir() else []
    used = sorted(name for name in entries if not name.endswith(ASIDE))
    if used:
        raise ConfigError(f"{path} is used already, it holds {used[0]}; nothing was written, name a new folder")


def _refuse_files(path: Path) -> None:
    """Raises DataError where a file stands in place of the folder `path` or of one above it."""
    there = next(above for above in (path, *path.absolute().parents) if os.path.lexists(above))
    if not there.is_dir():
        raise DataError(f"{there} is not a folder; nothing was written, name a new folder elsewhere")


@contextlib.contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """A folder to fill, which gets the name `folder` when the block ends well; after an error nothing of it stays.

    An empty folder that is there already is kept and filled. Raises as `refuse_used` does, and DataError where the file
    system does not take it.
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
    """Does `folder` hold, byte for byte, every file that `write` puts into a new folder?"""
    path = Path(folder)
    if not path.is_dir():
        return False
    with storage_errors(path), tempfile.TemporaryDirectory(prefix=".", suffix=ASIDE, dir=path.parent) as aside:
        write(Path(aside))
        files = [file.relative_to(aside) for file in Path(aside).rglob("*") if file.is_file()]
        return all((path / file).is_file() and filecmp.cmp(path / file, aside / file, shallow=False) for file in files)


def write_whole(file: str | Path, data: bytes) -> None:
    """Create the file, or replace the one of this name, at once. Raises DataError where it cannot be written."""
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
    """Give every file the rights that the umask leaves (libraries create theirs as 0600), and sync it."""
    for file in (path for path in folder.rglob("*") if path.is_file()):
        file.chmod(file.parent.stat().st_mode & 0o666)
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
