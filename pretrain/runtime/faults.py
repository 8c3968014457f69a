"""Records why a process ended: one line in RUN/faults.jsonl, from which the launcher decides about another attempt.

Causes: configuration, node, storage, preemption, user code. RUN/ended.json exists only after an end without a fault
(finished, or saved on request): other launchers, such as torchrun, may hide the exit codes of their processes. Imports
no torch.
"""

import contextlib
import errno
import json
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args

from data_pipeline.errors import (
    FILE_SYSTEM_ERRORS,
    ConfigError,
    DataError,
    NodeFault,
    Overtaken,
    Requeue,
    TesseraError,
    storage_error,
)
from pretrain.runtime.goodput import ATTEMPTS, append_line, lines_of, whole

FAULTS = "faults.jsonl"
ENDED = "ended.json"
STACKS = "faults"
DECODES = "data_pipeline/images.py"
Cause = Literal["configuration", "node", "storage", "preemption", "user code"]
CAUSES: tuple[tuple[type[TesseraError], Cause], ...] = (
    (ConfigError, "configuration"),
    (NodeFault, "node"),
    (DataError, "storage"),
    (Requeue, "preemption"),
)

DISK_ERRORS = FILE_SYSTEM_ERRORS - {errno.ENOENT}  # a file missing in user code is not a disk error


def cause_of(error: BaseException) -> Cause:
    """Return the cause of an error; types not in CAUSES, including numerical divergence, count as user code."""
    return next((cause for kind, cause in CAUSES if isinstance(error, kind)), "user code")


def record_fault(run: Path, cause: Cause, why: str, rank: int, **more: Any) -> None:
    """Append one line; write nothing when the run folder does not exist yet or cannot be written."""
    line = {"time": time.time(), "cause": cause, "rank": rank, "host": socket.gethostname(), "why": why} | more
    with contextlib.suppress(OSError):
        append_line(run / FAULTS, line)


def _note_end(run: Path, rank: int, exit_code: int, why: str) -> None:
    if rank == 0:
        draft = run / f".{ENDED}"
        with contextlib.suppress(OSError):
            draft.write_text(json.dumps({"exit_code": exit_code, "why": why, "time": time.time()}) + "\n")
            draft.replace(run / ENDED)


def read_faults(run: Path, start: int = 0) -> list[dict[str, Any]]:
    """Return the faults recorded from byte `start` on, oldest first."""
    path = run / FAULTS
    if not path.is_file():
        return []
    lines = path.read_bytes()[start:].splitlines(keepends=True)
    found = ({"time": 0.0, "why": ""} | line for line in whole(lines, {"cause", "rank"}))
    return [line for line in found if line["cause"] in get_args(Cause) and _blames_ranks(line)]


def _blames_ranks(line: dict[str, Any]) -> bool:
    blamed = line.get("blamed", [])
    return isinstance(blamed, list) and all(type(rank) is int and rank >= 0 for rank in blamed)


def faults_size(run: Path) -> int:
    """Return the byte offset at which the next line will start."""
    path = run / FAULTS
    return path.stat().st_size if path.is_file() else 0


def may_have_been_killed(run: Path) -> bool:
    """Return whether the newest attempt has neither ended by itself nor recorded a fault other than a node's."""
    newest = next(iter(deque(lines_of(run / ATTEMPTS), maxlen=1)), None)
    if newest is None or (run / ENDED).is_file():
        return False
    return all(fault["cause"] == "node" for fault in read_faults(run) if fault["time"] >= newest.get("time", 0.0))


def stacks_of(run: Path, attempt: int, rank: int) -> Path:
    """Return the file to which a rank's stacks are written when it crashes or hangs."""
    return run / STACKS / f"attempt-{attempt:05d}.rank-{rank:05d}.txt"


def crashed_while_decoding(run: Path, rank: int) -> bool:
    """Return whether this rank crashed while decoding an image in the newest attempt: its node is not at fault."""
    newest = next(iter(deque(lines_of(run / ATTEMPTS), maxlen=1)), {"attempt": 0})
    path = stacks_of(run, newest["attempt"], rank)
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    crashed = text.partition("Current thread")[2].partition("\n\n")[0]  # faulthandler's heading of the crashed thread
    return "Fatal Python error" in text and DECODES in crashed


@contextlib.contextmanager
def faults_noted(run: Path, rank: int, peer_lost: Callable[[BaseException], bool]) -> Iterator[None]:
    """Record how the block ends, and raise its error as the one to show to the user.

    A broken collective is raised as a NodeFault, a disk error as a storage error: the original exceptions do not tell.
    """
    if rank == 0:
        (run / ENDED).unlink(missing_ok=True)
    try:
        yield
        _note_end(run, rank, 0, "done")
    except Requeue as asked:
        _note_end(run, rank, asked.exit_code, str(asked))
        raise
    except Overtaken:
        raise  # the run folder belongs to the later attempt
    except Exception as error:
        told: Exception = error
        if not isinstance(error, TesseraError) and peer_lost(error):
            told = NodeFault(f"rank {rank} lost a peer: {str(error).splitlines()[0].partition('. ')[0]}")
        elif isinstance(error, OSError) and error.errno in DISK_ERRORS:
            told = storage_error(error, f"rank {rank}: {error.filename or 'storage'}")
        blamed = {"blamed": told.blamed} if isinstance(told, NodeFault) and told.blamed else {}
        record_fault(run, cause_of(told), f"{type(told).__name__}: {told}", rank, **blamed)
        if told is error:
            raise
        raise told from error
