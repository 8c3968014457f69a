"""Where a run's time went, attempt by attempt, out of its own attempts.jsonl and metrics.jsonl. Imports no torch.

An attempt's wall time runs from the end of the one before it (from its own start, if it is the first) to its last step:
down (nobody ran) + start (to the first step) + waiting for data + saves + steps + rest. Steps that a later attempt made
again are lost. Goodput is the share of all wall time that went into steps which were not.
"""

import contextlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Set
from pathlib import Path
from typing import Any

ATTEMPTS = "attempts.jsonl"
METRICS = "metrics.jsonl"


_COUNTS = ("step", "attempt", "time_ms", "rank")
_NUMBERS = ("step_s", "save_s", "waited_s", "saved_s", "started", "time")
_NEEDED = {METRICS: {"step", "attempt"}, ATTEMPTS: {"attempt"}}


class PhaseClock:
    """What the training thread is doing, since when, and how long it did each thing so far."""

    def __init__(self) -> None:
        self.phase = "start"
        self.since = time.monotonic()
        self.seconds: dict[str, float] = {}

    def enter(self, phase: str) -> None:
        """The phase before ends now."""
        now = time.monotonic()
        self.seconds[self.phase] = self.seconds.get(self.phase, 0.0) + now - self.since
        self.phase, self.since = phase, now

    def spent(self, phase: str) -> float:
        """Seconds in all visits of `phase` that have ended."""
        return self.seconds.get(phase, 0.0)


def goodput(run: Path) -> dict[str, Any]:
    """-> {"goodput": share, "attempts": [a row for each]}; nothing where no step was logged."""
    rows = [row for row in lines_of(run / METRICS) if "time_ms" in row]
    started = {line["attempt"]: line for line in lines_of(run / ATTEMPTS)}
    owner = {row["step"]: row["attempt"] for row in rows}
    table, end = [], None
    for attempt in sorted({row["attempt"] for row in rows}):
        mine = [row for row in rows if row["attempt"] == attempt]
        table.append(_attempt(attempt, mine, started.get(attempt, {}), owner, end))
        end = mine[-1]["time_ms"] / 1000
    wall = sum(row["wall_s"] for row in table)
    return {"goodput": sum(row["steps_s"] for row in table) / wall if wall else 0.0, "attempts": table}


def _attempt(
    attempt: int, rows: list[dict[str, Any]], line: dict[str, Any], owner: dict[int, int], end: float | None
) -> dict[str, Any]:
    """One row; `owner` says which attempt made each step last, `end` when the attempt before made its last."""
    first, last = rows[0]["time_ms"] / 1000 - rows[0].get("step_s", 0.0), rows[-1]["time_ms"] / 1000
    born = min(first, line.get("started", first))
    before = born if end is None else min(end, born)
    useful = sum(row.get("step_s", 0.0) for row in rows if owner[row["step"]] == attempt)
    seconds = {
        "wall_s": last - before,
        "down_s": born - before,
        "start_s": first - born,
        "steps_s": useful,
        "lost_s": sum(row.get("step_s", 0.0) for row in rows) - useful,
        "waited_s": rows[-1].get("waited_s", 0.0),
        "saved_s": rows[-1].get("saved_s", 0.0),
    }
    lost = sum(owner[row["step"]] != attempt for row in rows)
    steps = {"attempt": attempt, "from_step": rows[0]["step"] - 1, "to_step": rows[-1]["step"], "lost_steps": lost}
    return steps | {"end_ms": rows[-1]["time_ms"]} | {name: round(value, 3) for name, value in seconds.items()}


def lines_of(path: Path, last_bytes: int | None = None) -> Iterator[dict[str, Any]]:
    """The whole lines of a file of JSON lines, or those in its last bytes."""
    if path.is_file():
        with path.open("rb") as file:
            if last_bytes is not None and path.stat().st_size > last_bytes:
                file.seek(-last_bytes, os.SEEK_END)
                file.readline()
            yield from whole(file, _NEEDED.get(path.name, set()))


def whole(lines: Iterable[bytes], needed: Set[str] = frozenset()) -> Iterator[dict[str, Any]]:
    """What the lines say, but for torn ones: not written to their end yet, or by a process that was killed.

    A line that is no object, lacks a `needed` entry, or has something else where a number stands counts as torn.
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
    """Append one line, in one write: processes do not mix theirs. What a killed one left torn is ended first."""
    with path.open("ab+") as file:
        torn = False
        if file.tell():
            file.seek(-1, os.SEEK_END)
            torn = file.read() != b"\n"
        file.write(b"\n" * torn + json.dumps(row).encode() + b"\n")
