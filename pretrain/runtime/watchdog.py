"""Notices a run that hangs, says which rank hangs, writes everybody's stacks and ends the run with 70.

Every rank gives signs of life through the store; rank 0 watches all, the others watch it. A rank hangs when it gives
none for `timeout_s` (stopped, swapped out, its machine gone), or when its training thread has stood at the same line,
waiting for the others or for data, for as long. A long computation is no hang: nobody waits in it. Blamed are the
silent; else those that are not where the others wait; else nobody, and the network is suspected.

No store is asked by the thread that judges: the store lives in the process of rank 0, which may be the one that hangs.
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
"""A process that was stopped or swapped out may take this long to go on, on a machine however busy."""
DUMP_S = 0.5
STOP_S = 2.0


@dataclasses.dataclass(frozen=True)
class Sign:
    """What a rank tells the others about itself, every few seconds."""

    count: int
    host: str
    pid: int
    phase: str
    stuck_s: float
    waits: bool
    at: str

    @property
    def where(self) -> str:
        return f"in phase {self.phase!r} at {self.at} since {self.stuck_s:.0f} s"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Who is to blame, and the sentence that says so."""

    blamed: tuple[int, ...]
    why: str


def judge(signs: Mapping[int, Sign], silent_s: Mapping[int, float], timeout_s: float) -> Verdict | None:
    """The rule of this module, for the ranks that were heard of; `silent_s`: since their last sign."""
    waiting = [rank for rank in sorted(signs) if signs[rank].waits and signs[rank].stuck_s > timeout_s]
    # Who is waited for and stopped in the middle of a step began to be silent a moment after the others began to wait.
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
    return Verdict((), f"all ranks wait in collectives, rank {first} {signs[first].where}; is the network up?")


def _name(rank: int, sign: Sign) -> str:
    return f"rank {rank} (host {sign.host}, process {sign.pid})"


def _silence(rank: int, sign: Sign, silent_s: float) -> str:
    state = process_state(sign.pid) if sign.host == socket.gethostname() else ""
    return f"{_name(rank, sign)} has given no sign of life for {silent_s:.0f} s{state and f', its state is {state}'}"


def process_state(pid: int) -> str:
    """ "T (stopped)" and the like, as the kernel says it; nothing where there is no such process (or no /proc)."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("State:"):
                return line.split(maxsplit=1)[1].replace("\t", " ")
    return ""


class Watchdog:
    """The watch of one rank; `clock` says what its training thread is doing."""

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
        """Begin to watch; the run folder exists by now."""
        self.stacks.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.stacks.open("w", encoding="utf-8")
        # Works even where a thread holds the interpreter's lock and never gives it back.
        faulthandler.register(DUMP_SIGNAL, file=self._file, all_threads=True)
        faulthandler.enable(file=self._file, all_threads=True)  # what crashes the process is told by its stack
        self.store = self.mesh.side_store()
        self._meet()
        for target in (self._exchange, self._watch):
            self._threads.append(threading.Thread(target=target, name=f"watchdog {target.__name__}", daemon=True))
            self._threads[-1].start()

    def stop(self) -> None:
        """The run ends by itself: nobody watches any more."""
        self._ended.set()
        for thread in self._threads:
            thread.join(STOP_S)
        faulthandler.unregister(DUMP_SIGNAL)
        faulthandler.disable()
        if self._file.tell() == 0:
            with contextlib.suppress(OSError):
                self.stacks.unlink()
                self.stacks.parent.rmdir()

    # ------------------------------------------------------------------------- words with the others

    def _watched(self) -> list[int]:
        """Rank 0 hears all others, who hear rank 0."""
        return list(range(1, self.mesh.world)) if self.mesh.rank == 0 else [0]

    def _meet(self) -> None:
        """Wait for everybody's first sign: who falls silent before it gave one would never be missed."""
        self.store.set(_key(self.mesh.rank), json.dumps(dataclasses.asdict(self._sign())))
        ranks = self._watched()
        texts = read_all(self.store, [_key(rank) for rank in ranks])
        self._signs = {rank: Sign(**json.loads(text)) for rank, text in zip(ranks, texts, strict=True)}
        self._heard = dict.fromkeys(ranks, time.monotonic())

    def _exchange(self) -> None:
        """Give signs and hear others', until the store is gone: then silence says so."""
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

    # ------------------------------------------------------------------------------------- the judge

    def _watch(self) -> None:
        while not self._ended.wait(self.interval_s):
            self._look()
            verdict = Verdict(**json.loads(self._told)) if self._told else self._verdict()
            if verdict is not None and not self._ended.is_set():
                self._end(verdict)

    def _look(self) -> None:
        """Note since when the training thread stands where it stands."""
        now, stand = time.monotonic(), _stack_of(sys._current_frames().get(self._main or 0))
        if now - self._looked > 3 * self.interval_s + 1:  # this very process was stopped: its clocks tell nothing
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
        # Rank 0 judges; the others judge its silence, for which they give it time to judge first.
        return judge(signs, silent, self.timeout_s + 2 * self.interval_s)

    def _end(self, verdict: Verdict) -> None:
        """Tell the others, write the stacks, leave. The training thread is out of reach: it stands in a C call."""
        if self.mesh.rank == 0:
            threading.Thread(target=self._tell, args=(verdict,), daemon=True).start()
        print(f"rank {self.mesh.rank} of {self.mesh.world}: {verdict.why}", file=self._file, flush=True)
        faulthandler.dump_traceback(self._file, all_threads=True)
        known = [self._signs[rank] for rank in verdict.blamed if rank in self._signs]
        told = {"blamed": verdict.blamed, "processes": [(sign.host, sign.pid) for sign in known]}
        record_fault(self.run, "node", verdict.why, self.mesh.rank, **told, stacks=self.stacks.name)
        time.sleep(3 * self.interval_s)  # a peer that saw another process gone would not write its stacks
        self._end_blamed(verdict)
        print(f"error: the run hangs: {verdict.why}. Stacks: {self.stacks.parent}", file=sys.stderr, flush=True)
        os._exit(NodeFault.exit_code)

    def _tell(self, verdict: Verdict) -> None:
        with contextlib.suppress(RuntimeError):
            self.store.set(_key("verdict"), json.dumps(dataclasses.asdict(verdict)))

    def _end_blamed(self, verdict: Verdict) -> None:
        """Have the blamed on this machine write their stacks, be they stopped or stuck with Python's lock, and go.

        One that was only stopped would train on, and the run with it, after it was said to be at its end.
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
    """Where a thread stands, down to the instruction; the same twice means that it has not moved."""
    stand = []
    while frame is not None:
        stand.append((id(frame), frame.f_lasti))
        frame = frame.f_back
    return tuple(stand)
