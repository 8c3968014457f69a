"""Who is blamed for a hang: the rule as a table. Whole runs that hang are in test_running.py."""

import signal
import socket
import subprocess
import sys
import threading
import time
from typing import Any

import pytest

from pretrain.runtime.goodput import PhaseClock
from pretrain.runtime.watchdog import Sign, Verdict, Watchdog, judge, process_state

TIMEOUT_S = 10.0


def sign(stuck_s: float = 0.0, waits: bool = False, phase: str = "step") -> Sign:
    return Sign(5, "elsewhere", 4711, phase, stuck_s, waits, "train.py:70 train")


WAITING = sign(11, waits=True)
SHORTLY = sign(9, waits=True)
COMPUTING = sign(500)
NO_DATA = sign(12, waits=True, phase="wait")


@pytest.mark.parametrize(
    ("signs", "silent_s", "blamed", "word"),
    [
        ([WAITING, sign()], [0, 11], (1,), "no heartbeat for 11 s"),
        ([sign(), sign()], [0, 9], None, ""),
        ([SHORTLY, SHORTLY], [0, 0], None, ""),
        ([WAITING, sign()], [0, 7], (1,), "no heartbeat"),  # stopped in mid-step, a moment after the other waits
        ([WAITING, COMPUTING], [0, 0], (1,), "1 of 2 ranks wait in a collective"),
        ([COMPUTING, COMPUTING], [0, 0], None, ""),  # slow is no hang
        ([COMPUTING], [0], None, ""),
        ([NO_DATA], [0], (0,), "phase 'wait'"),
        ([WAITING, NO_DATA, WAITING], [0, 0, 0], (1,), "2 of 3"),
        ([WAITING, WAITING], [0, 0], (), "check the network"),
        ([WAITING, sign(), sign()], [0, 40, 50], (1, 2), "rank 2"),
    ],
)
def test_the_blamed_rank(signs: list[Sign], silent_s: list[float], blamed: Any, word: str) -> None:
    verdict = judge(dict(enumerate(signs)), dict(enumerate(silent_s)), TIMEOUT_S)
    assert (verdict.blamed if verdict else None) == blamed
    assert word in (verdict.why if verdict else "")


def test_the_kernel_s_word_for_a_stopped_process() -> None:
    process = subprocess.Popen(["sleep", "60"])
    try:
        process.send_signal(signal.SIGSTOP)
        deadline = time.monotonic() + 10
        while "stopped" not in process_state(process.pid) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert process_state(process.pid) == "T (stopped)"
    finally:
        process.kill()
        process.wait()
    assert process_state(process.pid) == ""


class Alone:
    """Stands where the mesh does for a watchdog that is asked, not started."""

    rank, world = 0, 1


@pytest.mark.slow
def test_a_thread_that_stands_is_told_from_one_that_goes_round_and_round(tmp_path: Any) -> None:
    mesh: Any = Alone()
    dog = Watchdog(mesh, tmp_path, 0, PhaseClock(), TIMEOUT_S)
    go_on, moved, done = threading.Semaphore(0), threading.Semaphore(0), threading.Event()

    def trained() -> None:
        while not done.is_set():
            go_on.acquire(timeout=30)
            moved.release()
            go_on.acquire(timeout=30)
            moved.release()

    thread = threading.Thread(target=trained)
    thread.start()
    dog._main = thread.ident

    def stands() -> bool:
        dog._look()
        time.sleep(0.3)
        dog._look()
        return dog._sign().stuck_s >= 0.3

    deadline = time.monotonic() + 30
    while not stands():
        assert time.monotonic() < deadline
    assert not dog._sign().waits and dog._sign().at.startswith("threading.py")
    for _ in range(20):
        time.sleep(0.01)
        go_on.release()
        assert moved.acquire(timeout=30)
        before = time.monotonic()
        dog._look()
        assert dog._sign().stuck_s <= time.monotonic() - before
    done.set()
    go_on.release(2)
    thread.join(timeout=10)


SLOW_TO_GO_ON = """
import signal, sys, time
def dump(*_):
    time.sleep(2)
    open(sys.argv[1], "w").write("stacks")
signal.signal(signal.SIGUSR2, dump)
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.slow
def test_the_blamed_are_given_time_to_write_their_stacks_however_late_they_go_on(tmp_path: Any) -> None:
    mesh: Any = Alone()
    dog = Watchdog(mesh, tmp_path, 0, PhaseClock(), TIMEOUT_S)
    stacks = dog.stacks.with_name("attempt-00000.rank-00001.txt")
    stacks.parent.mkdir()
    blamed = subprocess.Popen([sys.executable, "-c", SLOW_TO_GO_ON, stacks], stdout=subprocess.PIPE, text=True)
    try:
        assert blamed.stdout is not None and blamed.stdout.readline() == "ready\n"
        blamed.send_signal(signal.SIGSTOP)
        dog._signs = {1: Sign(1, socket.gethostname(), blamed.pid, "step", 0.0, False, "")}
        dog._end_blamed(Verdict((1,), "stopped"))
        assert blamed.wait(timeout=20) == -signal.SIGKILL
    finally:
        blamed.kill()
    assert stacks.read_text() == "stacks"
