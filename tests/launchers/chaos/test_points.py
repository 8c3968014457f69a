"""The points of a run, told from the files of its checkpoints as a save changes them, step by step."""

import shutil
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from launchers.chaos.attempt import Attempt, Tail
from launchers.chaos.plan import Strike, When
from launchers.chaos.points import FolderPoints, moment, newest_save

WORLD = 2
NOBODY: Any = None
BEFORE, NOW = "step-00000004.attempt-0", "step-00000008.attempt-1"
SAVING = (
    "+r00000", "r00000.safetensors", "+r00001", "r00001.safetensors", "+r00001.part-00001", "-r00000", "-r00001",
    "r00001.part-00001.safetensors", "-r00001.part-00001", "index.json", "state.json", "MANIFEST.json",
)  # fmt: skip
"""What happens in a folder, one after the other; + and -: a file comes into a scratch folder, and goes."""


def happens(folder: Path, name: str) -> None:
    scratch = folder / ".tmp" / name[1:]
    if name[0] == "-":
        shutil.rmtree(scratch)
    elif name[0] == "+":
        scratch.mkdir(parents=True)
        (scratch / f"{name[1:]}.safetensors").write_text("")
    else:
        (folder / name).write_text("{}")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A whole save, and the next one not begun."""
    for name in SAVING:
        happens(tmp_path / BEFORE, name)
    return tmp_path


@pytest.mark.parametrize(
    ("point", "at"),
    [("shard", SAVING[:8]), ("commit", SAVING[8:11]), ("retention", SAVING[11:])],
)
def test_a_point_of_a_save_is_reached_when_its_files_say_so(point: When, at: tuple[str, ...], root: Path) -> None:
    points = FolderPoints(str(root), WORLD)
    points.expect(point, NOBODY)
    assert not points.reached()
    for name in SAVING:
        happens(root / NOW, name)
        assert points.reached() == (name in at), name


@pytest.mark.slow
def test_drafts_that_come_and_go_as_they_are_looked_for_are_no_error(root: Path) -> None:
    """A folder of a draft is gone as its file is whole, between two calls of whoever looks for it."""
    points = FolderPoints(str(root), WORLD)
    points.expect("shard", NOBODY)
    (root / NOW).mkdir()
    ended = threading.Event()

    def write() -> None:
        while not ended.is_set():
            happens(root / NOW, "+r00000")
            happens(root / NOW, "-r00000")

    writer = threading.Thread(target=write)
    writer.start()
    try:
        assert {points.reached() for _ in range(5000)} <= {True, False}
    finally:
        ended.set()
        writer.join(timeout=30)


def test_what_stands_of_the_newest_save_is_said(root: Path, tmp_path: Path) -> None:
    assert newest_save(str(tmp_path / "nothing")) == "no save"
    assert newest_save(str(root)) == "a complete save"
    happens(root / NOW, "+r00000")
    happens(root / NOW, "r00000.safetensors")
    assert newest_save(str(root)) == "a save of 1 shards, no manifest"
    happens(root / NOW, "index.json")
    assert newest_save(str(root)) == "a save of 1 shards and index.json, no manifest"
    happens(root / NOW, "MANIFEST.json")
    assert newest_save(str(root)) == "a complete save"


def test_lines_come_once_and_a_torn_one_is_left_to_who_cuts_it(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"old\nto")
    tail = Tail(path)
    path.write_bytes(b"old\n")  # who goes on with the file cuts what was half written
    with path.open("ab") as file:
        file.write(b"one\ntwo\nthr")
        file.flush()
        assert tail.lines() == [b"one", b"two"] and tail.lines() == []
        file.write(b"ee\n")
        file.flush()
        assert tail.lines() == [b"three"]


# --------------------------------------------------------------------------------- of a process that really runs

READER = """
import os, subprocess, sys
code = "import signal, sys; f = open(sys.argv[1]); signal.pause()"
subprocess.run([sys.executable, "-c", code, sys.argv[1]], env={**os.environ, "RANK": "0"})
"""


def test_loading_begins_when_a_rank_has_a_shard_open(root: Path, tmp_path: Path) -> None:
    points = FolderPoints(str(root), WORLD)
    attempt = Attempt([sys.executable, "-c", READER, str(root / BEFORE / "r00000.safetensors")], tmp_path / "run")
    try:
        assert moment(Strike("rank", 0, 1, "load", 0.0), attempt, points, every=4) and points.reached()
        rank = attempt.rank(0)
        assert rank is not None and rank.cmdline()[-1].endswith("r00000.safetensors")
    finally:
        for process in reversed(attempt.family()):
            process.kill()
        attempt.wait()


def test_an_attempt_that_ends_by_itself_is_not_struck(root: Path, tmp_path: Path) -> None:
    attempt = Attempt([sys.executable, "-c", "print('done')"], tmp_path / "run")
    assert not moment(Strike("rank", 0, 1, "commit", 0.0), attempt, FolderPoints(str(root), WORLD), every=4)
    assert attempt.wait() == 0
