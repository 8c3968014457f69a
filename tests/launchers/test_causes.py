"""Why attempts end: a table of what the launcher sees, and children that end in each of these ways."""

from pathlib import Path
from typing import Any

import pytest

from launchers.causes import Diagnosis, Failure, diagnose, pause_s, worth_another_attempt
from launchers.watch import read_record
from tests.launchers.test_local import start_launcher


def fault(cause: str, rank: int, time: float, why: str = "") -> dict[str, Any]:
    return {"cause": cause, "rank": rank, "time": time, "why": why or f"{cause} of {rank}"}


@pytest.mark.parametrize(
    ("failures", "faults", "code", "cause", "why"),
    [
        ([(1, -9)], [fault("node", 0, 5.0, "lost a peer")], 70, "node", "rank 1 was killed by SIGKILL"),
        ([(0, 70), (1, -11)], [], 70, "node", "rank 1 was killed by SIGSEGV"),
        ([(0, 1)], [fault("node", 1, 5.1), fault("user code", 0, 5.0)], 70, "user code", "user code of 0"),
        ([(0, 1)], [], 70, "user code", "rank 0 exited with code 1"),
        ([(1, 70)], [fault("node", 1, 5.0, "rank 0 hangs")], 70, "node", "rank 0 hangs"),
        ([(1, 70)], [fault("user code", 1, 5.0, "loss nan")], 70, "user code", "loss nan"),
        ([(1, -9)], [fault("node", 0, 5.0, "rank 1 is silent") | {"blamed": [1]}], 70, "node", "rank 1 is silent"),
        ([(0, 64)], [], 64, "configuration", "configuration"),
        ([(0, 1), (1, 74)], [fault("user code", 0, 4.0), fault("storage", 1, 5.0, "disk full")], 74, "storage", "disk"),
        ([], [], 75, "preemption", "preemption"),
    ],
)
def test_the_first_failure_is_the_cause(
    failures: list[tuple[int, int]], faults: list[dict[str, Any]], code: int, cause: str, why: str
) -> None:
    told = diagnose([Failure(*failure) for failure in failures], faults, code)
    assert told.cause == cause
    assert why in told.why


@pytest.mark.parametrize(
    ("cause", "after_steps", "at_the_start"),
    [
        ("node", True, True),
        ("preemption", True, True),
        ("storage", True, False),
        ("configuration", False, False),
        ("user code", False, False),
    ],
)
def test_only_what_may_pass_is_tried_again(cause: Any, after_steps: bool, at_the_start: bool) -> None:
    diagnosis = Diagnosis(cause, "")
    assert worth_another_attempt(diagnosis, made_steps=True) == after_steps
    assert worth_another_attempt(diagnosis, made_steps=False) == at_the_start


def test_storage_is_given_time_to_come_back() -> None:
    assert [pause_s(Diagnosis("storage", ""), earlier) for earlier in (0, 1, 2, 9)] == [1, 2, 4, 60]
    assert pause_s(Diagnosis("node", ""), 3) == 0


STEP = "pathlib.Path(os.environ['OUT'], 'run', 'metrics.jsonl').open('a').write('{}\\n')\n"
HEAD = "import os, pathlib, signal, sys\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("end", "attempts", "code", "cause"),
    [
        ("sys.exit(64)", 1, 64, "configuration"),
        ("raise ValueError('a bug')", 1, 70, "user code"),
        ("sys.exit(74)", 1, 74, "storage"),
        (STEP + "sys.exit(74)", 3, 74, "storage"),
        ("os.kill(os.getpid(), signal.SIGKILL)", 3, 70, "node"),
        ("sys.exit(75)", 3, 75, "preemption"),
        ("sys.exit(0)", 1, 0, None),
    ],
)
def test_the_launcher_starts_again_where_that_may_help(
    end: str, attempts: int, code: int, cause: str | None, tmp_path: Path
) -> None:
    count = "pathlib.Path(os.environ['OUT'], 'run', 'seen-' + os.environ['TESSERA_ATTEMPT']).touch()\n"
    launcher = start_launcher(tmp_path, HEAD + count + end, restarts=2)
    assert launcher.wait(timeout=60) == code
    assert len(list((tmp_path / "run").glob("seen-*"))) == attempts
    record = read_record(tmp_path / "run")
    assert (record["attempt"], record.get("cause")) == (attempts - 1, cause)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("end", "code"),
    [
        ("sys.exit(64)", 64),
        ("raise ValueError('a bug')", 1),
        ("sys.exit(74)", 74),
        ("os.kill(os.getpid(), signal.SIGKILL)", 70),
        ("sys.exit(75)", 75),
    ],
)
def test_a_schedulers_job_can_tell_user_code_from_a_node_fault(
    end: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TESSERA_ATTEMPT", "0")
    assert start_launcher(tmp_path, HEAD + end).wait(timeout=60) == code
