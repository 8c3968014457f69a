"""One attempt of a run observed from outside: its launcher, processes, steps and log."""

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
"""Longest time without a step before an attempt counts as stuck."""
LEFT_S = 15
"""Time that a process may outlive its launcher."""


class Attempt:
    """A running attempt: starts the launcher, with its output in a log file beside the run's folder."""

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
        """True if it runs but has made no step for PATIENCE_S."""
        self.step()
        return not self.done and time.monotonic() - self._moved > PATIENCE_S

    def wait(self) -> int:
        """Wait for the end and return the exit code. A stuck attempt is killed."""
        while not self.stuck:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return self.launcher.wait(1)
        self.launcher.kill()
        return self.launcher.wait()

    def step(self) -> int:
        """Return the last step that this attempt made; 0 if none yet."""
        for line in self._steps.lines():
            self._last, self._moved = int(json.loads(line)["step"]), time.monotonic()
        return self._last

    def said(self) -> list[str]:
        """Return the log lines written since the last call."""
        return [line.decode(errors="replace") for line in self._said.lines()]

    def family(self) -> list[psutil.Process]:
        """Return the launcher and all its descendants; the ranks are its direct children."""
        found = [self.process]
        for process in found:  # grows during the loop
            for pid in children_of(process.pid):
                with contextlib.suppress(psutil.NoSuchProcess):
                    found.append(psutil.Process(pid))
        return found

    def rank(self, rank: int) -> psutil.Process | None:
        """Return the process of a rank; None if it does not exist yet."""
        for pid in children_of(self.process.pid):
            with contextlib.suppress(psutil.Error):
                child = psutil.Process(pid)
                if child.environ().get("RANK") == str(rank):
                    return child
        return None


def children_of(pid: int) -> list[int]:
    """Return a process's children, as listed by the kernel; psutil would scan every process on the machine."""
    children: list[int] = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):
                children += map(int, (task / "children").read_text().split())
    return children


class Tail:
    """Reader of the complete lines appended to a file from now on; the file need not exist yet.

    An incomplete last line is ignored: the next writer truncates it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._at = path.read_bytes().rfind(b"\n") + 1 if path.is_file() else 0

    def lines(self) -> list[bytes]:
        """Return the complete lines added since the last call."""
        if not self.path.is_file():
            return []
        with self.path.open("rb") as file:
            file.seek(self._at)
            whole, newline, _ = file.read().rpartition(b"\n")
        self._at += len(whole) + len(newline)
        return whole.split(b"\n") if newline else []


def left_over(family: list[psutil.Process]) -> tuple[int, ...]:
    """Return the pids of processes still alive LEFT_S after the launcher's end, and kill them."""
    _, alive = psutil.wait_procs(family, timeout=LEFT_S)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    return tuple(process.pid for process in alive)
