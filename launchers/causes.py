"""Diagnose why an attempt ended, and whether another one would help.

Only the first failure counts: ranks that lose a peer fail as a consequence. Ranks write their faults to
RUN/faults.jsonl; a rank that was killed is known by its exit code alone.
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
"""Python's exit code for an uncaught exception; a scheduler's job exits with it instead of a node fault."""
DECODING = "; it crashed while decoding an image, which the next attempt searches for"
LONGEST_PAUSE_S = 60.0


@dataclass(frozen=True)
class Failure:
    """A process that exited before any was told to, with its exit code (negative: killed by that signal)."""

    rank: int
    code: int

    @property
    def how(self) -> str:
        return f"was killed by {signal.Signals(-self.code).name}" if self.code < 0 else f"exited with code {self.code}"


@dataclass(frozen=True)
class Diagnosis:
    """The cause, and a message for people."""

    cause: Cause
    why: str


def diagnose(failures: Sequence[Failure], faults: Sequence[dict[str, Any]], code: int) -> Diagnosis:
    """Diagnose the end of an attempt.

    failures: in the order in which they were seen; faults: the attempt's lines of faults.jsonl; code: the group's exit
    code.
    """
    telling = next((cause for known, cause in BY_EXIT_CODE.items() if known == code and cause != "node"), None)
    if telling is not None:
        return Diagnosis(telling, next((fault["why"] for fault in faults if fault["cause"] == telling), telling))
    blamed = next((fault for fault in faults if "blamed" in fault), None)
    killed = next((failure for failure in failures if failure.code < 0), None)
    if blamed is not None:  # then the watchdog sent the kill
        return Diagnosis(blamed["cause"], blamed["why"])
    if killed is not None:
        return Diagnosis("node", f"rank {killed.rank} {killed.how}")
    if faults:
        first = min(faults, key=lambda fault: (float(fault["time"]), int(fault["rank"])))
        return Diagnosis(first["cause"], first["why"])
    first_failure = next(iter(failures), None)
    if first_failure is None:
        return Diagnosis("node", "no process reported why it ended")
    return Diagnosis(
        BY_EXIT_CODE.get(first_failure.code, "user code"), f"rank {first_failure.rank} {first_failure.how}"
    )


def exit_code_for(diagnosis: Diagnosis, code: int) -> int:
    """Return the launcher's exit code: 1 for user code, which is no node fault, else the processes' `code`."""
    return USER_CODE_EXIT if diagnosis.cause == "user code" else code


def worth_another_attempt(diagnosis: Diagnosis, made_steps: bool) -> bool:
    """Return whether to retry: yes after a node fault or preemption, no for configuration or user code.

    After a storage fault, only if the attempt made steps, so that storage has worked before.
    """
    return diagnosis.cause in ("node", "preemption") or (diagnosis.cause == "storage" and made_steps)


def pause_s(diagnosis: Diagnosis, earlier: int) -> float:
    """Return the seconds to wait before the next attempt: exponential backoff after a storage fault, else 0."""
    return min(2.0**earlier, LONGEST_PAUSE_S) if diagnosis.cause == "storage" else 0.0
