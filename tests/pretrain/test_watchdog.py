"""Who is blamed for a hang: the rule as a table. Whole runs that hang are in test_running.py."""

import signal
import subprocess
import threading
import time
from typing import Any

import pytest

from pretrain.goodput import PhaseClock
from pretrain.watchdog import Sign, Watchdog, judge, process_state

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
        ([WAITING, sign()], [0, 11], (1,), "no sign of life for 11 s"),
        ([sign(), sign()], [0, 9], None, ""),
        ([SHORTLY, SHORTLY], [0, 0], None, ""),
        ([WAITING, sign()], [0, 7], (1,), "no sign of life"),  # stopped in mid-step, a moment after the other waits
        ([WAITING, COMPUTING], [0, 0], (1,), "1 of 2 ranks wait in a collective"),
        ([COMPUTING, COMPUTING], [0, 0], None, ""),  # slow is no hang
        ([COMPUTING], [0], None, ""),
        ([NO_DATA], [0], (0,), "phase 'wait'"),
        ([WAITING, NO_DATA, WAITING], [0, 0, 0], (1,), "2 of 3"),
        ([WAITING, WAITING], [0, 0], (), "is the network up"),
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


def test_a_thread_that_stands_is_told_from_one_that_goes_round_and_round(tmp_path: Any) -> None:
    mesh: Any = Alone()
    dog = Watchdog(mesh, tmp_path, 0, PhaseClock(), TIMEOUT_S)
    go_on = threading.Event()

    def trained() -> None:
        go_on.wait(30)
        while go_on.is_set():
            time.sleep(0.001)

    thread = threading.Thread(target=trained)
    thread.start()
    dog._main = thread.ident

    def stuck_after(seconds: float) -> float:
        dog._look()
        time.sleep(seconds)
        dog._look()
        return dog._sign().stuck_s

    time.sleep(0.2)
    stuck_after(0)
    assert stuck_after(0.3) >= 0.3
    assert not dog._sign().waits and dog._sign().at.startswith("threading.py")
    go_on.set()
    assert min(stuck_after(0.05) for _ in range(20)) < 0.05
    go_on.clear()
    thread.join(timeout=10)
