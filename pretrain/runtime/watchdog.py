"""Detects a hung run, names the ranks to blame, writes the stacks of all ranks and ends the run with exit code 70.

Every rank publishes heartbeats (`Sign`) through the store; rank 0 watches all ranks, and they watch rank 0. A rank
hangs when it sends no heartbeat for `timeout_s` (stopped, swapped out, machine lost), or when its training thread has
been at the same instruction, waiting for its peers or for data, for as long. A long computation is not a hang while no
rank waits. Silent ranks are blamed first; else those that do not wait in a collective as the others do; else none, and
the network is suspected.

The thread that judges never uses the store, which lives in rank 0's process: that may be the one that hangs.
"""

import contextlib
import dataclasses
import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from data_pipeline.errors import NodeFault
from pretrain.runtime.faults import record_fault, stacks_of
from pretrain.runtime.goodput import PhaseClock
from pretrain.runtime.mesh import Mesh, read_all

DUMP_SIGNAL = signal.SIGUSR2
WAITS_FOR_PEERS = ("torch/distributed/distributed_c10d.py", "pretrain/runtime/mesh.py")
INTERVAL_S = (0.1, 5.0)
DUMP_BEGINS_S = 10.0
"""Time allowed for a stopped or swapped-out process to resume, even on a busy machine."""
DUMP_S = 0.5
STOP_S = 2.0


@dataclasses.dataclass(frozen=True)
class Sign:
    """A heartbeat: what a rank publishes about itself every few seconds."""

    count: int
    host: str
    pid: int
    phase: str
    stuck_s: float
    waits: bool
    at: str

    @property
    def where(self) -> str:
        return f"in phase {self.phase!r} at {self.at} for {self.stuck_s:.0f} s"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The ranks to blame, and the message that says why."""

    blamed: tuple[int, ...]
    why: str


def judge(signs: Mapping[int, Sign], silent_s: Mapping[int, float], timeout_s: float) -> Verdict | None:
    """Apply this module's rule to the ranks heard from. silent_s: seconds since each rank's last heartbeat."""
    waiting = [rank for rank in sorted(signs) if signs[rank].waits and signs[rank].stuck_s > timeout_s]
    # A rank stopped in the middle of a step fell silent only a moment after its peers began to wait for it.
    silent = tuple(rank for rank in sorted(signs) if silent_s[rank] > (timeout_s / 2 if waiting else timeout_s))
    if silent:
        return Verdict(silent, "; ".join(_silence(rank, signs[rank], silent_s[rank]) for rank in silent))
    if not waiting:
        return None
    elsewhere = tuple(rank for rank in sorted(signs) if not signs[rank].waits or signs[rank].phase == "wait")
    if elsewhere:
        words = "; ".join(f"{_name(rank, signs[rank])} is {signs[rank].where}" for rank in elsewhere)
        return Verdict(elsewhere, f"{words}; {len(signs) - len(elsewhere)} of {len(signs)} ranks wait in a collective")
    first = waiting[0]
    return Verdict((), f"all ranks wait in collectives, rank {first} {signs[first].where}; check the network")


def _name(rank: int, sign: Sign) -> str:
    return f"rank {rank} (host {sign.host}, process {sign.pid})"


def _silence(rank: int, sign: Sign, silent_s: float) -> str:
    state = process_state(sign.pid) if sign.host == socket.gethostname() else ""
    return f"{_name(rank, sign)} has sent no heartbeat for {silent_s:.0f} s{state and f', its state is {state}'}"


def process_state(pid: int) -> str:
    """Return the kernel's process state, such as "T (stopped)"; empty without such a process (or without /proc)."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("State:"):
                return line.split(maxsplit=1)[1].replace("\t", " ")
    return ""


class Watchdog:
    """The watchdog of one rank; `clock` holds its training thread's current phase."""

    def __init__(self, mesh: Mesh, run: Path, attempt: int, clock: PhaseClock, timeout_s: float) -> None:
        self.mesh = mesh
        self.run = run
        self.clock = clock
        self.timeout_s = timeout_s
        self.interval_s = min(max(timeout_s / 20, INTERVAL_S[0]), INTERVAL_S[1])
        self.attempt = attempt
        self.stacks = self._stacks_of(mesh.rank)
        self._main = threading.main_thread().ident
        self._stand: tuple[Any, ...] = ()
        self._stands_since = self._looked = time.monotonic()
        self._count = 0
        self._signs: dict[int, Sign] = {}
        self._heard: dict[int, float] = {}
        self._told = ""
        self._ended = threading.Event()
        self._threads: list[threading.Thread] = []

    def _stacks_of(self, rank: int) -> Path:
        return stacks_of(self.run, self.attempt, rank)

    def start(self) -> None:
        """Start watching; the run folder must exist."""
        self.stacks.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.stacks.open("w", encoding="utf-8")
        # Works even if a thread holds the GIL and never releases it.
        faulthandler.register(DUMP_SIGNAL, file=self._file, all_threads=True)
        faulthandler.enable(file=self._file, all_threads=True)  # a crash is recorded with its stacks
        self.store = self.mesh.side_store()
        self._meet()
        for target in (self._exchange, self._watch):
            self._threads.append(threading.Thread(target=target, name=f"watchdog {target.__name__}", daemon=True))
            self._threads[-1].start()

    def stop(self) -> None:
        """Stop watching at a normal end of the run; remove the stacks file if it is empty."""
        self._ended.set()
        for thread in self._threads:
            thread.join(STOP_S)
        faulthandler.unregister(DUMP_SIGNAL)
        faulthandler.disable()
        if self._file.tell() == 0:
            with contextlib.suppress(OSError):
                self.stacks.unlink()
                self.stacks.parent.rmdir()

    # ------------------------------------------------------------------------------------ heartbeats

    def _watched(self) -> list[int]:
        """Return the ranks that this one watches: rank 0 watches all others, and they watch rank 0."""
        return list(range(1, self.mesh.world)) if self.mesh.rank == 0 else [0]

    def _meet(self) -> None:
        """Wait for the first heartbeat of every watched rank: one that hangs before it would never be noticed."""
        self.store.set(_key(self.mesh.rank), json.dumps(dataclasses.asdict(self._sign())))
        ranks = self._watched()
        texts = read_all(self.store, [_key(rank) for rank in ranks])
        self._signs = {rank: Sign(**json.loads(text)) for rank, text in zip(ranks, texts, strict=True)}
        self._heard = dict.fromkeys(ranks, time.monotonic())

    def _exchange(self) -> None:
        """Send and read heartbeats until the store is gone, which then shows as silence."""
        ranks = self._watched()
        with contextlib.suppress(RuntimeError):
            while not self._ended.wait(self.interval_s):
                self._count += 1
                self.store.set(_key(self.mesh.rank), json.dumps(dataclasses.asdict(self._sign())))
                texts = read_all(self.store, [_key(rank) for rank in ranks])
                for rank, text in zip(ranks, texts, strict=True):
                    sign = Sign(**json.loads(text))
                    if sign.count != self._signs[rank].count:
                        self._signs[rank], self._heard[rank] = sign, time.monotonic()
                if self.store.check([_key("verdict")]):
                    self._told = self.store.get(_key("verdict")).decode()
                    return

    def _sign(self) -> Sign:
        frame = sys._current_frames().get(self._main or 0)
        waits, at = self.clock.phase == "wait", ""
        while frame is not None:
            code = frame.f_code
            waits = waits or code.co_filename.endswith(WAITS_FOR_PEERS)
            at = at or f"{Path(code.co_filename).name}:{frame.f_lineno} {code.co_name}"
            frame = frame.f_back
        stuck = time.monotonic() - self._stands_since
        return Sign(self._count, socket.gethostname(), os.getpid(), self.clock.phase, stuck, waits, at)

    # --------------------------------------------------------------------------------------- verdict

    def _watch(self) -> None:
        while not self._ended.wait(self.interval_s):
            self._look()
            verdict = Verdict(**json.loads(self._told)) if self._told else self._verdict()
            if verdict is not None and not self._ended.is_set():
                self._end(verdict)

    def _look(self) -> None:
        """Record since when the training thread has been at its current instruction."""
        now, stand = time.monotonic(), _stack_of(sys._current_frames().get(self._main or 0))
        if now - self._looked > 3 * self.interval_s + 1:  # this process itself was stopped: reset the timers
            self._heard = dict.fromkeys(self._heard, now)
            self._stands_since = now
        if stand != self._stand:
            self._stand, self._stands_since = stand, now
        self._looked = now

    def _verdict(self) -> Verdict | None:
        now = time.monotonic()
        silent = {rank: now - heard for rank, heard in dict(self._heard).items()}
        signs = {rank: self._signs[rank] for rank in silent}
        if self.mesh.rank == 0:
            return judge(signs | {0: self._sign()}, silent | {0: 0.0}, self.timeout_s)
        # Rank 0 judges first; the others judge only its silence, with a longer timeout.
        return judge(signs, silent, self.timeout_s + 2 * self.interval_s)

    def _end(self, verdict: Verdict) -> None:
        """Publish the verdict, write the stacks and exit. The training thread cannot be interrupted inside a C call."""
        if self.mesh.rank == 0:
            threading.Thread(target=self._tell, args=(verdict,), daemon=True).start()
        print(f"rank {self.mesh.rank} of {self.mesh.world}: {verdict.why}", file=self._file, flush=True)
        faulthandler.dump_traceback(self._file, all_threads=True)
        known = [self._signs[rank] for rank in verdict.blamed if rank in self._signs]
        told = {"blamed": verdict.blamed, "processes": [(sign.host, sign.pid) for sign in known]}
        record_fault(self.run, "node", verdict.why, self.mesh.rank, **told, stacks=self.stacks.name)
        time.sleep(3 * self.interval_s)  # once this process is gone, a peer may end without writing stacks
        self._end_blamed(verdict)
        print(f"error: the run hangs: {verdict.why}. Stacks: {self.stacks.parent}", file=sys.stderr, flush=True)
        os._exit(NodeFault.exit_code)

    def _tell(self, verdict: Verdict) -> None:
        with contextlib.suppress(RuntimeError):
            self.store.set(_key("verdict"), json.dumps(dataclasses.asdict(verdict)))

    def _end_blamed(self, verdict: Verdict) -> None:
        """Make blamed processes on this host write their stacks, even if stopped or holding the GIL, then kill them.

        A process that was only stopped would otherwise go on training after the run was declared ended.
        """
        signs = {rank: self._signs[rank] for rank in verdict.blamed if rank in self._signs}
        here = {self._stacks_of(rank): sign.pid for rank, sign in signs.items() if sign.host == socket.gethostname()}
        before = {stacks: _size(stacks) for stacks in here}
        for number in (DUMP_SIGNAL, signal.SIGCONT, signal.SIGKILL):
            for pid in here.values():
                with contextlib.suppress(OSError):
                    os.kill(pid, number)
            if here and number == signal.SIGCONT:
                until = time.monotonic() + DUMP_BEGINS_S
                while time.monotonic() < until and any(
                    _size(stacks) == before[stacks] and process_state(pid) for stacks, pid in here.items()
                ):
                    time.sleep(DUMP_S / 10)
                time.sleep(DUMP_S)


def _key(what: int | str) -> str:
    return f"watchdog/{what}"


def _size(path: Path) -> int:
    with contextlib.suppress(OSError):
        return path.stat().st_size
    return 0


def _stack_of(frame: FrameType | None) -> tuple[Any, ...]:
    """Return a thread's stack down to the instruction; an equal stack means that the thread has not moved."""
    stand = []
    while frame is not None:
        stand.append((id(frame), frame.f_lasti))
        frame = frame.f_back
    return tuple(stand)
