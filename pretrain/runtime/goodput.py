"""Breakdown of a run's wall time by attempt, from its attempts.jsonl and metrics.jsonl. Imports no torch.

An attempt's wall time runs from the end of the previous attempt (for the first, from its own start) to its last step:
down (nothing ran) + start (to the first step) + waiting for data + saves + evaluations + steps + rest. Steps after the
one from which a later attempt resumed are lost. Goodput is the share of all wall time spent in steps that were not
lost.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Set
from pathlib import Path
from typing import Any

ATTEMPTS = "attempts.jsonl"
METRICS = "metrics.jsonl"
BLOCK = 1 << 16
"""Bytes read at once when a file is read backwards."""


_COUNTS = ("step", "attempt", "time_ms", "rank", "metrics_at")
_NUMBERS = ("step_s", "stepped_s", "save_s", "waited_s", "saved_s", "evaluate_s", "evaluated_s", "started", "time")
_NEEDED = {METRICS: {"step", "attempt"}, ATTEMPTS: {"attempt"}}


class PhaseClock:
    """The training thread's current phase, when it began, and the total seconds of each phase so far."""

    def __init__(self) -> None:
        self.phase = "start"
        self.since = time.monotonic()
        self.seconds: dict[str, float] = {}

    def enter(self, phase: str) -> None:
        """End the current phase and begin another."""
        now = time.monotonic()
        self.seconds[self.phase] = self.seconds.get(self.phase, 0.0) + now - self.since
        self.phase, self.since = phase, now

    def spent(self, phase: str) -> float:
        """Return the total seconds of `phase`, excluding a visit still in progress."""
        return self.seconds.get(phase, 0.0)


def goodput(run: Path) -> dict[str, Any]:
    """Return {"goodput": share, "attempts": [one row per attempt that made a step]}.

    Reads only the first and last lines of each attempt and its lost steps, however long metrics.jsonl is. Attempts of
    earlier versions, which did not record where their lines begin (`metrics_at` in attempts.jsonl), are not counted.
    """
    spans = _spans(run)
    table: list[dict[str, Any]] = []
    for at, span in enumerate(spans):
        resumed = min((later.first["step"] - 1 for later in spans[at + 1 :]), default=span.last["step"])
        table.append(_attempt(span, resumed, spans[at - 1].last["time_ms"] / 1000 if at else None))
    wall = sum(row["wall_s"] for row in table)
    return {"goodput": sum(row["steps_s"] for row in table) / wall if wall else 0.0, "attempts": table}


@dataclasses.dataclass(frozen=True)
class Span:
    """One attempt that made a step: its line in attempts.jsonl; byte range, first and last line in metrics.jsonl."""

    line: dict[str, Any]
    path: Path
    end: int
    first: dict[str, Any]
    last: dict[str, Any]

    def last_before(self, step: int) -> dict[str, Any]:
        """Return the attempt's newest line up to `step`; empty if there is none."""
        lines = lines_back(self.path, self.line["metrics_at"], self.end)
        return next((row for row in lines if row["attempt"] == self.line["attempt"] and row["step"] <= step), {})


def _spans(run: Path) -> list[Span]:
    path, found = run / METRICS, []
    lines = [line for line in lines_of(run / ATTEMPTS) if "metrics_at" in line]
    ends = [line["metrics_at"] for line in lines[1:]] + [path.stat().st_size if path.is_file() else 0]
    for line, end in zip(lines, ends, strict=False):  # without lines there is still one end
        own = {"attempt": line["attempt"]}.items()
        back, ahead = lines_back(path, line["metrics_at"], end), lines_of(path, line["metrics_at"])
        if last := next((row for row in back if own <= row.items() and "time_ms" in row), None):
            steps = (row for row in ahead if own <= row.items() and "time_ms" in row and is_step(row))
            if first := next(steps, None):
                found.append(Span(line, path, end, first, last))
    return found


def _attempt(span: Span, resumed: int, end: float | None) -> dict[str, Any]:
    """Return one row. resumed: the lowest step that later attempts resumed from; end: when the previous one ended."""
    first, last, kept = span.first, span.last, span.last_before(resumed)
    began, ended = first["time_ms"] / 1000 - first.get("step_s", 0.0), last["time_ms"] / 1000
    born = min(began, span.line.get("started", began))
    before = born if end is None else min(end, born)
    useful = kept.get("stepped_s", 0.0)
    seconds = {
        "wall_s": ended - before,
        "down_s": born - before,
        "start_s": began - born,
        "steps_s": useful,
        "lost_s": last.get("stepped_s", 0.0) - useful,
        "waited_s": last.get("waited_s", 0.0),
        "saved_s": last.get("saved_s", 0.0),
    }
    if "evaluated_s" in last:
        seconds["evaluated_s"] = last["evaluated_s"]
    from_step = first["step"] - 1
    lost = last["step"] - kept.get("step", from_step)
    steps = {"attempt": first["attempt"], "from_step": from_step, "to_step": last["step"], "lost_steps": lost}
    return steps | {"end_ms": last["time_ms"]} | {name: round(value, 3) for name, value in seconds.items()}


def is_step(row: Mapping[str, Any]) -> bool:
    """Return whether a row of metrics.jsonl is of a step; the others are of an evaluation in training."""
    return "evaluate_s" not in row


def steps_of(run: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of metrics.jsonl that are of steps."""
    return filter(is_step, lines_of(run / METRICS))


def evaluations_of(run: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of metrics.jsonl that are of evaluations in training."""
    return itertools.filterfalse(is_step, lines_of(run / METRICS))


def lines_of(path: Path, start: int = 0) -> Iterator[dict[str, Any]]:
    """Yield the complete records of a JSON-lines file from byte `start` on."""
    if path.is_file():
        with path.open("rb") as file:
            file.seek(start)
            yield from whole(file, _NEEDED.get(path.name, set()))


def lines_back(path: Path, start: int = 0, end: int | None = None) -> Iterator[dict[str, Any]]:
    """Yield the complete records between two byte offsets of a JSON-lines file, last one first."""
    yield from whole(raw_lines_back(path, start, end), _NEEDED.get(path.name, set()))


def raw_lines_back(path: Path, start: int = 0, end: int | None = None) -> Iterator[bytes]:
    """Yield lines with their line ends, last one first. Reads at most one block more than what is consumed.

    The blocks of a line longer than one block are joined only once its beginning is found.
    """
    if not path.is_file():
        return
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        at, rest = size if end is None else min(end, size), [b""]
        while at > start:
            size = min(BLOCK, at - start)
            at -= size
            file.seek(at)
            rest.insert(0, file.read(size))
            if b"\n" in rest[0] or b"\r" in rest[0]:
                first, *lines = b"".join(rest).splitlines(keepends=True)
                yield from reversed(lines)
                rest = [first]
        yield from reversed(b"".join(rest).splitlines(keepends=True))


def whole(lines: Iterable[bytes], needed: Set[str] = frozenset()) -> Iterator[dict[str, Any]]:
    """Parse the lines and skip torn ones: those still being written, or cut off when their process was killed.

    A line that is not an object, lacks a `needed` key, or has a wrong type in a numeric field counts as torn.
    """
    for line in lines:
        if line.endswith(b"\n"):
            with contextlib.suppress(ValueError, RecursionError):
                row = json.loads(line)
                if isinstance(row, dict) and needed <= row.keys() and _has_numbers(row):
                    yield row


def _has_numbers(row: dict[str, Any]) -> bool:
    counts = (row[name] for name in _COUNTS if name in row)
    numbers = (row[name] for name in _NUMBERS if name in row)
    return all(type(count) is int and count >= 0 for count in counts) and all(type(n) in (int, float) for n in numbers)


def append_line(path: Path, row: Mapping[str, Any]) -> None:
    """Append one line in one write, so that processes do not mix theirs. A torn last line is terminated first."""
    with path.open("ab+") as file:
        torn = False
        if file.tell():
            file.seek(-1, os.SEEK_END)
            torn = file.read() != b"\n"
        file.write(b"\n" * torn + json.dumps(row).encode() + b"\n")
