"""Being asked to stop: a table of signals, and processes that are really sent them."""

import os
import signal
import subprocess
import sys
import time

import pytest

from pretrain.runtime.signals import INSISTED_EXIT, StopSignals
from tests.pretrain.processes import ROOT

TERM, INT, HUP, USR1 = signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1


@pytest.mark.parametrize(
    ("signals", "count"),
    [
        ([], 0),
        ([TERM], 1),
        ([INT], 1),
        ([USR1], 1),
        ([TERM, TERM], 2),
        ([INT, INT], 2),
        ([TERM, INT], 2),
        ([USR1, USR1], 1),
        ([USR1, TERM], 1),
        ([USR1, USR1, TERM], 1),
        ([USR1, TERM, TERM], 2),
        ([USR1, INT], 2),
        ([TERM, USR1], 1),
        ([TERM, USR1, TERM], 2),
        ([HUP], 1),
        ([HUP, HUP, HUP], 1),  # of one closed terminal: from the shell and from the kernel
        ([HUP, TERM], 1),
        ([TERM, HUP], 1),  # systemd's SendSIGHUP sends both
        ([USR1, HUP, TERM], 1),
        ([HUP, TERM, TERM], 2),
        ([HUP, INT], 2),
    ],
)
def test_what_is_asked_for_after_a_sequence_of_signals(signals: list[int], count: int) -> None:
    left = []
    stops = StopSignals(lambda: left.append(True))
    for number in signals:
        stops.note(number)
    assert stops.count == count
    assert bool(left) == (count == 2)


STUCK = """
import ctypes, threading, time
from pretrain.runtime.signals import StopSignals, leave_at_once
def say(stops):
    while not stops.count:
        time.sleep(0.01)
    print("noted", flush=True)
with StopSignals(leave_at_once) as stops:
    threading.Thread(target=say, args=(stops,), daemon=True).start()
    print("ready", flush=True)
    mutex = ctypes.create_string_buffer(64)
    for _ in range(2):  # the second never returns, and no handler of Python's runs: as in a collective that hangs
        ctypes.CDLL(None).pthread_mutex_lock(mutex)
"""


def start(program: str) -> "subprocess.Popen[str]":
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def test_the_second_signal_ends_a_process_that_stands_in_a_c_call() -> None:
    process = start(STUCK)
    began = time.monotonic()
    process.send_signal(TERM)
    assert process.stdout is not None and process.stdout.readline() == "noted\n"  # two at once would be one
    assert process.poll() is None
    process.send_signal(TERM)
    assert process.wait(timeout=20) == INSISTED_EXIT
    assert time.monotonic() - began < 15


WORKER = """
import os, signal, sys, time
from pretrain.runtime.signals import ignore_stop_signals
ignore_stop_signals()
print("ready", flush=True)
time.sleep(1)
sys.exit(7)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [TERM, INT, HUP, USR1])
def test_a_worker_process_works_on_whatever_is_asked_of_the_run(number: int) -> None:
    process = start(WORKER)
    process.send_signal(number)
    assert process.wait(timeout=20) == 7


def test_handlers_are_given_back() -> None:
    before = [signal.getsignal(number) for number in (TERM, INT, HUP, USR1)]
    with StopSignals() as stops:
        os.kill(os.getpid(), USR1)
        deadline = time.monotonic() + 10
        while not stops.count and time.monotonic() < deadline:
            time.sleep(0.01)
        assert stops.count == 1
    assert [signal.getsignal(number) for number in (TERM, INT, HUP, USR1)] == before


def test_a_closed_terminal_says_nothing_to_a_process_under_nohup() -> None:
    before = signal.signal(HUP, signal.SIG_IGN)
    try:
        with StopSignals() as stops:
            assert signal.getsignal(HUP) == signal.SIG_IGN
            os.kill(os.getpid(), HUP)
            os.kill(os.getpid(), USR1)
            deadline = time.monotonic() + 10
            while not stops.count and time.monotonic() < deadline:
                time.sleep(0.01)
            assert stops.received == [USR1]
    finally:
        signal.signal(HUP, before)
