"""Folders and files of a command: whole or not at all, over nothing that was there, under the user's umask."""

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipeline.errors import ConfigError, DataError, storage_error
from data_pipeline.outputs import new_folder, write_whole
from data_pipeline.storage import open_storage
from launchers.watch import write_record
from tests.disks import make_read_only, mounted


def fill(output: Path, size: int = 10) -> None:
    with new_folder(output) as folder:
        (folder / "part").mkdir()
        (folder / "part" / "model.safetensors").write_bytes(bytes(size))
        (folder / "part" / "model.safetensors").chmod(0o600)
        (folder / "config.json").write_text("{}")


def everything(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


WHOLE = ["config.json", "part", "part/model.safetensors"]


@pytest.mark.parametrize("there", [False, True], ids=["new", "empty"])
def test_a_folder_that_is_new_or_empty_is_filled(there: bool, tmp_path: Path) -> None:
    if there:
        (tmp_path / "out").mkdir()
    fill(tmp_path / "out")
    assert everything(tmp_path / "out") == WHOLE and everything(tmp_path)[0] == "out"


def test_a_link_to_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "there")
    fill(tmp_path / "out")
    assert everything(tmp_path / "there") == WHOLE


def test_a_file_system_s_own_folder_is_filled_or_left_empty(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", 64) as disk:
        with pytest.raises(DataError, match="disk: No space left on device"):
            fill(disk, 100_000)
        assert everything(disk) == []
        fill(disk)
        assert everything(disk) == WHOLE


@pytest.mark.parametrize("what", ["file", "hidden file", "folder", "link to nothing"])
def test_what_is_used_is_refused_and_stays_as_it_is(what: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if what == "file":
        out.write_text("mine")
    elif what == "link to nothing":
        out.symlink_to(tmp_path / "nowhere")
    else:
        (out / "inner").mkdir(parents=True)
        (out / ("inner" if what == "folder" else ".hidden") / "").parent.mkdir(exist_ok=True)
    before = everything(tmp_path)
    with pytest.raises((ConfigError, DataError), match="nothing was written, use a new folder"):
        fill(out)
    assert everything(tmp_path) == before


def test_a_folder_that_another_command_fills_meanwhile_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not empty"), new_folder(tmp_path / "out") as folder:
        (folder / "mine").write_text("mine")
        fill(tmp_path / "out")
    assert everything(tmp_path / "out") == WHOLE


def test_the_remains_of_a_killed_command_are_not_in_the_way(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    killed = new_folder(out)
    (killed.__enter__() / "half").write_text("")
    fill(out)
    assert set(WHOLE) < set(everything(out)) and not (out / "half").exists()


@pytest.mark.parametrize("there", [False, True], ids=["new", "empty"])
def test_after_an_error_nothing_is_left(there: bool, tmp_path: Path) -> None:
    if there:
        (tmp_path / "out").mkdir()
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "out") as folder:
        (folder / "config.json").write_text("{}")
        raise ZeroDivisionError
    assert everything(tmp_path) == (["out"] if there else [])


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_files_follow_the_umask_whoever_made_them(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        fill(tmp_path / "out")
        write_whole(tmp_path / "file", b"x")
    finally:
        os.umask(before)
    rights = {path: stat.S_IMODE(path.stat().st_mode) for path in [tmp_path / "file", *(tmp_path / "out").rglob("*")]}
    assert all(mode == (0o777 if path.is_dir() else 0o666) & ~umask for path, mode in rights.items())


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", 64) as disk:
        write_whole(disk / "file", b"first")
        with pytest.raises(DataError, match=r"disk/file: No space left on device; free space"):
            write_whole(disk / "file", bytes(100_000))
        assert everything(disk) == ["file"] and (disk / "file").read_bytes() == b"first"


def test_a_full_disk_takes_no_folder_and_what_lies_there_stays(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", 64) as disk:
        fill(disk / "first")
        before = everything(disk)
        for again in (disk / "second", disk / "first"):
            with pytest.raises((DataError, ConfigError)):
                fill(again, 100_000)
        with pytest.raises(DataError, match=r"disk/deep/second: No space left on device"):
            fill(disk / "deep" / "second", 100_000)
        assert everything(disk) == sorted([*before, "deep"])


def test_a_read_only_disk_and_a_file_on_the_way_are_named(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", 64) as disk:
        make_read_only(disk)
        with pytest.raises(DataError, match="disk/out: Read-only file system"):
            fill(disk / "out")
        with pytest.raises(DataError, match="disk/file: Read-only file system"):
            write_whole(disk / "file", b"")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(DataError, match="file is not a folder"):
        fill(tmp_path / "file" / "out")
    with pytest.raises(DataError, match="file/out: Not a directory"):
        write_whole(tmp_path / "file" / "out", b"")


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "free space there"),
        (errno.EDQUOT, "free space there"),
        (errno.EACCES, "grant this user access"),
        (errno.EPERM, "grant this user access"),
        (errno.EROFS, "use a writable location"),
        (errno.ENOENT, "use another path"),
        (errno.ENOTDIR, "use another path"),
        (errno.ENAMETOOLONG, "use another path"),
        (errno.EIO, "check the storage"),
        (errno.ESTALE, "check the storage"),
    ],
)
def test_the_remedy_is_that_of_what_the_file_system_said(number: int, remedy: str) -> None:
    told = str(storage_error(OSError(number, os.strerror(number)), "there"))
    assert told.startswith(f"there: {os.strerror(number)}; {remedy}") and told.endswith("run it again")
    remedies = ("free space there", "grant this user", "use another path", "check the storage", "use a writable")
    assert [other for other in remedies if other in told] == [other for other in remedies if remedy.startswith(other)]


WRITES: dict[str, Callable[[str], object]] = {
    "new folder": fill,
    "file": lambda path: write_whole(path, b""),
    "record": lambda path: write_record(Path(path), {}),
    "put": lambda path: open_storage(path).put_if_absent("a", b""),
    "replace": lambda path: open_storage(path).replace("a", b""),
    "scratch": lambda path: open_storage(path).scratch().__enter__(),
}


@pytest.mark.parametrize("below", ["/proc", "/sys", "/dev/null", "/dev/full"])
@pytest.mark.parametrize("write", WRITES)
def test_an_output_that_cannot_be_made_is_told_as_a_wrong_path(below: str, write: str) -> None:
    with pytest.raises(DataError) as told:
        WRITES[write](f"{below}/x/y")
    assert below in str(told.value) and "free space" not in str(told.value), told.value
    assert (
        "use another path" in str(told.value)
        or "grant this user" in str(told.value)
        or "is not a folder" in str(told.value)
    )
    assert "build the dataset" not in str(told.value)
