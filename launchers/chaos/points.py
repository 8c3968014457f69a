"""Detect the points at which a run is struck from outside, by its checkpoint files or its storage requests."""

import contextlib
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from data_pipeline.errors import NodeFault
from data_pipeline.storage import open_storage
from launchers.chaos.attempt import PATIENCE_S, Attempt
from launchers.chaos.plan import Strike, When
from pretrain.checkpoint.catalog import FOLDER, MANIFEST, numbers

POLL_S = 0.005
CLOSE_S = 0.0003
"""Polling interval near a point: the work after a manifest takes about a millisecond."""
SHARD = re.compile(r"r(\d+)(\.part-\d+)?\.safetensors")
SPREAD_S = {"step": 0.2, "start": 4.0, "load": 3.0, "shard": 0.0, "staging": 0.0, "commit": 0.0, "retention": 0.002}
"""Longest delay of a strike after the start of its point."""


class Points(Protocol):
    """Detector of points in a run's loads and saves."""

    def expect(self, point: When, attempt: Attempt) -> None:
        """Start to watch for this point."""
        ...

    def reached(self) -> bool:
        """Return whether the run is at the expected point."""
        ...

    def go_on(self) -> None:
        """Release held requests, after the strike."""
        ...


def moment(strike: Strike, attempt: Attempt, points: Points, every: int) -> bool:
    """Wait until the strike is due. Returns False if the attempt ended by itself.

    every: steps between saves. A strike at "load" also becomes due at the first step, when loading is over.
    """
    if strike.when == "load":
        points.expect("load", attempt)
        _until(lambda: points.reached() or attempt.step() > 0, attempt, POLL_S)
    elif strike.when == "start":
        _until(lambda: attempt.rank(strike.rank) is not None, attempt, POLL_S)
    else:
        _until(lambda: attempt.step() >= strike.step, attempt, POLL_S)
    if strike.when == "staging":
        begun = attempt.step()
        _until(lambda: attempt.step() > begun and attempt.step() % every == 0, attempt, CLOSE_S)
    elif strike.when in ("shard", "commit", "retention"):
        points.expect(strike.when, attempt)
        _until(points.reached, attempt, CLOSE_S)
    time.sleep(SPREAD_S[strike.when] * strike.after)
    return not attempt.done


def _until(there: Callable[[], bool], attempt: Attempt, pause_s: float) -> None:
    """Wait until `there()` is true or the attempt ends. Raises NodeFault if the attempt is stuck."""
    while not there() and not attempt.done:
        if attempt.stuck:
            raise NodeFault(f"{attempt.run}: no step for {PATIENCE_S:g} s before the next strike, see {attempt.log}")
        time.sleep(pause_s)


class FolderPoints:
    """Detects points by the contents of a local checkpoint folder."""

    def __init__(self, root: str, world: int) -> None:
        self.root = Path(root)
        self.world = world
        self._point: When = "shard"
        self._before: set[str] = set()

    def expect(self, point: When, attempt: Attempt) -> None:
        self._point, self._attempt = point, attempt
        self._before = self._manifests()

    def reached(self) -> bool:
        if self._point == "load":
            return has_open(self._attempt, SHARD.pattern)
        if self._point == "retention":
            return bool(self._manifests() - self._before)
        under_way = (folder for folder in self._folders() if folder.name not in self._before)
        return any(self._stage(folder) == self._point for folder in under_way)

    def _stage(self, folder: Path) -> str:
        """Return a save's stage: "shard" while one is written, "commit" from all shards to the manifest, else empty."""
        names = _names(folder)
        if MANIFEST in names:
            return ""
        written = {match[1] for name in names if (match := SHARD.fullmatch(name))}
        drafts = (name for scratch in _names(folder / ".tmp") for name in _names(folder / ".tmp" / scratch))
        if any(SHARD.fullmatch(name) for name in drafts):
            return "shard"
        return "commit" if len(written) == self.world else ""

    def go_on(self) -> None:
        """Do nothing: a folder holds no requests."""

    def _folders(self) -> list[Path]:
        return sorted(path for path in self.root.glob("step-*") if FOLDER.fullmatch(path.name))

    def _manifests(self) -> set[str]:
        return {folder.name for folder in self._folders() if (folder / MANIFEST).exists()}


def has_open(attempt: Attempt, pattern: str) -> bool:
    """Return whether a process below the launcher has a file open whose name matches the pattern."""
    for process in attempt.family()[1:]:
        with contextlib.suppress(OSError):
            for link in Path(f"/proc/{process.pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    if re.fullmatch(pattern, os.path.basename(os.readlink(link))):
                        return True
    return False


def _names(folder: Path) -> set[str]:
    """List a folder; empty if it no longer exists, since scratch folders are short-lived."""
    try:
        return set(os.listdir(folder))
    except FileNotFoundError:
        return set()


def newest_save(root: str) -> str:
    """Describe the newest save for the report, by its parts and without its step."""
    folders = sorted((name for name in open_storage(root).folders() if FOLDER.fullmatch(name)), key=numbers)
    if not folders:
        return "no save"
    names = open_storage(f"{root}/{folders[-1]}").list()
    if MANIFEST in names:
        return "a complete save"
    shards = sum(SHARD.fullmatch(name) is not None for name in names)
    others = sorted(name for name in names if not SHARD.fullmatch(name))
    return f"a save of {shards} shards" + (f" and {', '.join(others)}" if others else "") + ", no manifest"
