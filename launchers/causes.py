"""Why an attempt ended, and whether another one would help.

The first failure counts, what it tore down with it does not: a rank that loses a peer fails too. Ranks say what
happened in RUN/faults.jsonl; of a rank that was killed its exit code tells.
"""

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from data_pipeline.errors import ConfigError, DataError, NodeFault, Requeue
from pretrain.runtime.faults import Cause

BY_EXIT_CODE: dict[int, Cause] = {
    ConfigError.exit_code: "configuration",
    NodeFault.exit_code: "node",
    DataError.exit_code: "storage",
    Requeue.exit_code: "preemption",
}
USER_CODE_EXIT = 1
"""Python's own for an exception that nobody caught: what a scheduler's job leaves with, no node fault."""
DECODING = "; it crashed while decoding an image, which the next attempt searches for"
LONGEST_PAUSE_S = 60.0


@dataclass(frozen=True)
class Failure:
    """One process that left before the others were told to, with its exit code (negative: killed by that signal)."""

    rank: int
    code: int

    @property
    def how(self) -> str:
        return f"was killed by {signal.Signals(-self.code).name}" if self.code < 0 else f"left with code {self.code}"


@dataclass(frozen=True)
class Diagnosis:
    """The cause, and the sentence for people."""

    cause: Cause
    why: str


def diagnose(failures: Sequence[Failure], faults: Sequence[dict[str, Any]], code: int) -> Diagnosis:
    """failures: in the order in which they were seen; faults: the attempt's lines; code: the group's exit code."""
    telling = next((cause for known, cause in BY_EXIT_CODE.items() if known == code and cause != "node"), None)
    if telling is not None:
        return Diagnosis(telling, next((fault["why"] for fault in faults if fault["cause"] == telling), telling))
    blamed = next((fault for fault in faults if "blamed" in fault), None)
    killed = next((failure for failure in failures if failure.code < 0), None)
    if blamed is not None:  # it is the watchdog that killed then
        return Diagnosis(blamed["cause"], blamed["why"])
    if killed is not None:
        return Diagnosis("node", f"rank {killed.rank} {killed.how}")
    if faults:
        first = min(faults, key=lambda fault: (float(fault["time"]), int(fault["rank"])))
        return Diagnosis(first["cause"], first["why"])
    first_failure = next(iter(failures), None)
    if first_failure is None:
        return Diagnosis("node", "no process said why it ended")
    return Diagnosis(
        BY_EXIT_CODE.get(first_failure.code, "user code"), f"rank {first_failure.rank} {first_failure.how}"
    )


def exit_code_for(diagnosis: Diagnosis, code: int) -> int:
    """What the launcher leaves with: user code is no fault of a node, whatever `code` the processes agree on."""
    return USER_CODE_EXIT if diagnosis.cause == "user code" else code


def worth_another_attempt(diagnosis: Diagnosis, made_steps: bool) -> bool:
    """Nodes die and are taken away: yes. Storage: only if it once worked. Wrong settings and code stay wrong: no."""
    return diagnosis.cause in ("node", "preemption") or (diagnosis.cause == "storage" and made_steps)


def pause_s(diagnosis: Diagnosis, earlier: int) -> float:
    """How long to wait before the next attempt: storage is given time to come back, twice as long each time."""
    return min(2.0**earlier, LONGEST_PAUSE_S) if diagnosis.cause == "storage" else 0.0
