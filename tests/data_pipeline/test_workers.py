"""The process that drives Ray, without Ray: however it ends, the command that started it knows."""

import io
import os
import re
import signal
import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest
from rich.console import Console

from data_pipeline import workers
from data_pipeline.errors import Conflict, DataError, NodeFault
from data_pipeline.workers import Counter, in_driver
from tests.data_pipeline.ingest.cluster import wait_for

PARENT = """
import time
from data_pipeline.workers import in_driver
in_driver(time.sleep, 600)
"""


def answer(what):
    if isinstance(what, BaseException):
        raise what
    return {"pid": os.getpid(), "what": what}


def end_by(signum):
    os.kill(os.getpid(), signum)


@pytest.mark.slow
def test_it_runs_elsewhere_and_its_result_comes_back():
    found = in_driver(answer, "图片")
    assert found["what"] == "图片" and found["pid"] != os.getpid()


@pytest.mark.slow
@pytest.mark.parametrize("error", [DataError("x: not found"), Conflict("y: there"), NodeFault("z")])
def test_an_error_for_the_user_is_raised_as_it_is(error):
    with pytest.raises(type(error), match=str(error)):
        in_driver(answer, error)


@pytest.mark.parametrize(
    ("end", "argument", "code"), [(os._exit, 1, 1), (os._exit, 0, 0), (end_by, signal.SIGKILL, -9), (sys.exit, 15, 15)]
)
def test_an_end_without_an_answer_is_a_node_fault(end, argument, code):
    with pytest.raises(NodeFault, match=rf"ended \({code}\).*run the same command again"):
        in_driver(end, argument)


@pytest.mark.slow
def test_an_unexpected_exception_shows_its_traceback_and_leaves_with_1(capfd):
    with pytest.raises(SystemExit) as leaving:
        in_driver(answer, ZeroDivisionError("by design"))
    assert leaving.value.code == 1
    shown = capfd.readouterr().err
    assert "Traceback" in shown and "in answer" in shown and "ZeroDivisionError: by design" in shown


def start_parent(repository) -> "tuple[subprocess.Popen[str], psutil.Process]":
    """A command that has its driver -> both."""
    command = [sys.executable, "-c", PARENT]
    parent = subprocess.Popen(command, cwd=repository, stderr=subprocess.PIPE, text=True, start_new_session=True)
    wait_for(lambda: drivers_of(parent), "a driver")
    return parent, drivers_of(parent)[0]


def drivers_of(parent):
    children = psutil.Process(parent.pid).children()
    return [child for child in children if "spawn_main" in " ".join(child.cmdline())]


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_it_ends_with_the_process_that_started_it(repository, signum):
    parent, driver = start_parent(repository)
    parent.send_signal(signum)
    parent.communicate(timeout=30)
    assert_ended(driver)


def assert_ended(driver):
    """A process without a parent stays a zombie until, or unless, the machine's first process collects it."""
    gone, _ = psutil.wait_procs([driver], timeout=30)
    assert gone or driver.status() == psutil.STATUS_ZOMBIE


def test_an_interrupt_is_an_interrupt_and_nothing_stays(repository):
    parent, driver = start_parent(repository)
    os.killpg(parent.pid, signal.SIGINT)
    _, said = parent.communicate(timeout=60)
    assert parent.returncode == -signal.SIGINT and "KeyboardInterrupt" in said
    assert_ended(driver)


# ------------------------------------------------------------------------------------- nodes that come and go


class Cluster:
    """A Ray in which each wait takes a minute: `events` says what it finds, a task's end or a lack of nodes."""

    exceptions = SimpleNamespace(RayError=RuntimeError)

    def __init__(self, events: str) -> None:
        self.events, self.now = list(events), 0.0

    def wait(self, running, num_returns, timeout):
        self.now += 60
        return (running[:1], running[1:]) if self.events[0] == "." else ([], running)

    def get(self, reference):
        self.events.pop(0)
        return reference

    def nodes(self):
        self.events.pop(0)
        return [{"Alive": True, "Resources": {}}]


def run_on(cluster, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", cluster)
    monkeypatch.setattr(workers, "_check_raylet", lambda: None)
    monkeypatch.setattr(workers.time, "monotonic", lambda: cluster.now)
    return list(workers.run_tasks(lambda item: item, range(cluster.events.count(".")), 1))


@pytest.mark.parametrize("events", ["----.", "----.----.", ".-----.-----.-----."])
def test_each_lack_of_nodes_has_its_own_patience(events, monkeypatch):
    assert len(run_on(Cluster(events), monkeypatch)) == events.count(".")


@pytest.mark.parametrize("events", ["-------.", ".-------."])
def test_a_long_lack_of_nodes_ends_the_build(events, monkeypatch):
    with pytest.raises(NodeFault, match="none of the 1 live nodes"):
        run_on(Cluster(events), monkeypatch)


# ---------------------------------------------------------------------------------------------- progress


def test_progress_shows_rate_time_left_and_rejects_of_this_run(monkeypatch):
    clock, screen = [0.0], io.StringIO()
    console = Console(file=screen, force_terminal=True, width=150, get_time=lambda: clock[0])
    monkeypatch.setattr("rich.progress.get_console", lambda: console)
    with Counter("build", 1000, True, before=400) as counter:
        for number in range(1, 4):
            clock[0] = 10.0 * number
            counter.add(100, {"http_404": 3 * number, "empty_file": 1})
    (last,) = [
        line for line in re.sub("\x1b[^A-Za-z]*[A-Za-z]", "\n", screen.getvalue()).split("\n\n") if "700" in line
    ][-1:]
    assert re.sub(r"\s+", " ", last).split("700/1000 ")[1].strip() == "10/s 0:00:30 empty_file=1 http_404=9"


def test_a_counter_that_is_not_shown_prints_nothing(capfd):
    with Counter("build", 10, False) as counter:
        counter.add(10, {"empty_file": 1})
    assert capfd.readouterr() == ("", "")
