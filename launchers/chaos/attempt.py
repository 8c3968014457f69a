"""One start of the launcher, its processes, its steps and what it says, as they are seen from outside."""

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from launchers.children import die_with
from pretrain.runtime.goodput import METRICS

PATIENCE_S = 600.0
"""How long an attempt may make no step before it is given up."""
LEFT_S = 15
"""How long after its launcher's end a process may still be there."""


class Attempt:
    """Its output goes to a log beside the run."""

    def __init__(self, command: Sequence[str], run: Path, environment: dict[str, str] | None = None) -> None:
        self.run = run
        self.log = run.with_suffix(".log")
        self._steps = Tail(run / METRICS)
        self._said = Tail(self.log)
        self._last, self._moved = 0, time.monotonic()
        with self.log.open("a", encoding="utf-8") as log:
            self.launcher = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | (environment or {}), process_group=0,
                preexec_fn=die_with(os.getpid()),
            )  # fmt: skip
        self.process = psutil.Process(self.launcher.pid)

    @property
    def done(self) -> bool:
        return self.launcher.poll() is not None

    @property
    def stuck(self) -> bool:
        """Has it made no step for so long that none will come?"""
        self.step()
        return not self.done and time.monotonic() - self._moved > PATIENCE_S

    def wait(self) -> int:
        """The exit code; an attempt that is stuck is killed."""
        while not self.stuck:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return self.launcher.wait(1)
        self.launcher.kill()
        return self.launcher.wait()

    def step(self) -> int:
        """The last step that this attempt made; 0 where it made none yet."""
        for line in self._steps.lines():
            self._last, self._moved = int(json.loads(line)["step"]), time.monotonic()
        return self._last

    def said(self) -> list[str]:
        """The lines of its log since this was last asked."""
        return [line.decode(errors="replace") for line in self._said.lines()]

    def family(self) -> list[psutil.Process]:
        """The launcher and all below it; the ranks are those right below it."""
        found = [self.process]
        for process in found:  # grows on the way
            for pid in children_of(process.pid):
                with contextlib.suppress(psutil.NoSuchProcess):
                    found.append(psutil.Process(pid))
        return found

    def rank(self, rank: int) -> psutil.Process | None:
        """The process of a rank, once it is there."""
        for pid in children_of(self.process.pid):
            with contextlib.suppress(psutil.Error):
                child = psutil.Process(pid)
                if child.environ().get("RANK") == str(rank):
                    return child
        return None


def children_of(pid: int) -> list[int]:
    """Processes that a process started. The kernel lists them; psutil would look at every process of the machine."""
    children: list[int] = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):
                children += map(int, (task / "children").read_text().split())
    return children


class Tail:
    """The whole lines that are added to a file from now on; the file may come later.

    A last line that is half written is not counted: who goes on with the file cuts it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._at = path.read_bytes().rfind(b"\n") + 1 if path.is_file() else 0

    def lines(self) -> list[bytes]:
        """What came since the last call."""
        if not self.path.is_file():
            return []
        with self.path.open("rb") as file:
            file.seek(self._at)
            whole, newline, _ = file.read().rpartition(b"\n")
        self._at += len(whole) + len(newline)
        return whole.split(b"\n") if newline else []


def left_over(family: list[psutil.Process]) -> tuple[int, ...]:
    """Who is still there seconds after the launcher's end; they are ended here."""
    _, alive = psutil.wait_procs(family, timeout=LEFT_S)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    return tuple(process.pid for process in alive)
