"""Runs that wait at a step for what strikes them: the steps that are left may take less than the look at them.

What is started runs HOLD first, which Python imports by itself where it is found under this name.
"""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.pretrain import commands

HOLD = """
import os, sys, time

def hold():
    log, stops = sys.modules["pretrain.tracking"].MetricsLog, sys.modules["pretrain.signals"].StopSignals
    write, note, noted = log.write, stops.note, []

    def may_go_on():
        try:
            with open(os.environ["GO_ON"]) as file:
                wanted = file.read()
        except FileNotFoundError:
            return False
        return wanted.isdigit() and len(noted) >= int(wanted)

    def write_and_wait(self, row):
        write(self, row)
        while "loss" in row and row["step"] >= int(os.environ["HELD_AT"]) and not may_go_on():
            time.sleep(0.01)

    def note_and_count(self, number):
        note(self, number)
        noted.append(number)

    log.write, stops.note = write_and_wait, note_and_count

def watch(event, of, seen=[]):
    if event == "open" and str(of[0]).endswith("/metrics.jsonl") and "pretrain.tracking" in sys.modules and not seen:
        seen.append(of)
        hold()

sys.addaudithook(watch)
"""


def interrupted(
    argv: list[str],
    run: Path,
    step: int,
    strike: Callable[[int], None],
    stops: int = 0,
    then: Callable[[], None] = lambda: None,
) -> tuple[int, str]:
    """`commands.interrupted` of a run whose rank 0 stands at the end of `step` until `strike` is done.

    stops: signals to stop that rank 0 waits for as well, which others may pass on. then: called when it may go on.
    """
    folder = run.with_name(f"{run.name}-held-at-{step}")
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(HOLD)

    def strike_and_let_go(launcher: int) -> None:
        strike(launcher)
        (folder / "go-on").write_text(str(stops))
        then()

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
        patch.setenv("HELD_AT", str(step))
        patch.setenv("GO_ON", str(folder / "go-on"))
        return commands.interrupted(argv, run, step, strike_and_let_go)
