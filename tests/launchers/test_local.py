"""The local launcher with children that are ten lines of Python: what starts, stops, dies and is left over."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from launchers.local import (
    ExitPatience,
    Group,
    StopSignals,
    attend,
    dry_run_text,
    exit_code_of,
    free_port,
    run_group,
    threads_per_process,
)
from launchers.watch import is_running, read_record, start_ticks, stop_run, write_record
from pretrain.runtime.faults import record_fault

QUICK = ExitPatience(stop_s=100, settle_s=0.3, grace_s=0.5)
WAIT_S = 60  # what guards against hanging; no program ends by itself before
READY = "import os, pathlib; pathlib.Path(os.environ['OUT'], os.environ['RANK']).write_text(str(os.getpid()))\n"
SLEEP = "import time; time.sleep(300); os._exit(3)\n"
BOTH_READY = (
    "import time\n"
    "other = pathlib.Path(os.environ['OUT'], str(1 - int(os.environ['RANK'])))\n"
    "while not other.exists() or not other.stat().st_size: time.sleep(0.01)\n"
)
SAVE_ON_TERM = (
    "import signal, sys, time\n"
    "def save(*_):\n    pathlib.Path(os.environ['OUT'], 'saved-' + os.environ['RANK']).touch(); sys.exit(75)\n"
    "signal.signal(signal.SIGTERM, save)\n"
)
IGNORE_TERM = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"


def group(program: str, out: Path, procs: int = 2) -> Group:
    return Group((sys.executable, "-c", program), procs, procs, master_port=free_port(), env=(("OUT", str(out)),))


def wait_for(condition: Callable[[], bool], seconds: float = WAIT_S) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def alive(path: Path) -> bool:
    return start_ticks(int(path.read_text())) is not None


def run_and_signal(program: str, out: Path, *counts: int) -> int:
    """Run two children, raise `count` stop signals once both are ready -> exit code."""
    with StopSignals() as stops:

        def press() -> None:
            wait_for(lambda: (out / "1").exists() and (out / "0").exists())
            for count in counts:
                stops.count = count
                time.sleep(0.2)

        threading.Thread(target=press).start()
        return run_group(group(program, out), stops, QUICK)


@pytest.mark.parametrize(
    ("codes", "stopped", "expected"),
    [
        ([0, 0], False, 0),
        ([75, 75], True, 75),
        ([75, 0], False, 75),
        ([64, 64], False, 64),
        ([-9, 70], False, 70),
        ([70, 74], False, 74),
        ([74, 64], False, 64),
        ([1, 0], False, 70),
        ([-15, 75], True, 75),
        ([-15, 75], False, 70),
        ([-9, 75], True, 70),
    ],
)
def test_exit_code_of_a_group_is_the_most_telling_of_its_processes(
    codes: list[int], stopped: bool, expected: int
) -> None:
    assert exit_code_of(codes, stopped) == expected


@pytest.mark.parametrize("code", [0, 64, 70, 74, 75])
def test_exit_code_of_a_child_comes_through(code: int, tmp_path: Path) -> None:
    with StopSignals() as stops:
        assert run_group(group(f"import sys; sys.exit({code})", tmp_path), stops, QUICK) == code


def test_every_process_knows_its_rank_and_the_rendezvous(tmp_path: Path) -> None:
    names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TESSERA_ATTEMPT"]
    one = Group(("true",), procs=2, world_size=6, first_rank=4, master_addr="10.0.0.1", master_port=123, attempt=7)
    assert [one.environment(1)[name] for name in names] == ["5", "1", "6", "2", "10.0.0.1", "123", "7"]


TELLS = """
import json, os, pathlib, sys
told = [sys.argv[1], *(os.environ[name] for name in ("NOTE", "MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE"))]
pathlib.Path(os.environ["OUT"], os.environ["RANK"]).write_text(json.dumps(told))
"""


def test_a_dry_run_prints_what_a_shell_runs_as_it_is(tmp_path: Path) -> None:
    words = (sys.executable, "-c", TELLS, 'name=it\'s "mine" $HOME')
    note = "a b; $(false) 'c'"
    text = dry_run_text(Group(words, procs=2, world_size=2, env=(("OUT", str(tmp_path)), ("NOTE", note))))
    subprocess.run(["bash", "-eu"], input=text, text=True, check=True, timeout=30)
    first, second = (json.loads((tmp_path / rank).read_text()) for rank in "01")
    assert first == second and first[:3] == [words[3], note, "127.0.0.1"] and first[4] == "2"
    assert 1024 < int(first[3]) < 65536


def test_a_dry_run_keeps_the_port_that_was_named(tmp_path: Path) -> None:
    assert " MASTER_PORT=29400 " in dry_run_text(Group(("true",), procs=1, world_size=4, master_port=29400))


def test_a_free_port_is_none_that_a_connection_to_somewhere_may_be_given_before_it_is_used() -> None:
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    if first < 32_000:
        pytest.skip(f"connections of this machine begin at port {first}")
    assert all(1024 < free_port() < first for _ in range(100))


def test_threads_are_shared_and_a_smaller_wish_is_kept() -> None:
    cores = len(os.sched_getaffinity(0))
    assert threads_per_process(1, {}) == cores
    assert threads_per_process(10_000, {}) == 1
    assert threads_per_process(1, {"OMP_NUM_THREADS": "1"}) == 1


def test_output_of_the_other_ranks_is_prefixed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with StopSignals() as stops:
        run_group(group("import os; print('hello from', os.environ['RANK'])", tmp_path), stops, QUICK)
    out, err = capfd.readouterr()
    assert out == "hello from 0\n"
    assert "[rank 1] hello from 1\n" in err


@pytest.mark.slow
def test_when_one_rank_dies_the_others_are_ended(tmp_path: Path) -> None:
    dies = "import signal\nif os.environ['RANK'] == '1': os.kill(os.getpid(), signal.SIGKILL)\n"
    program = READY + BOTH_READY + dies + SLEEP
    began = time.monotonic()
    with StopSignals() as stops:
        assert run_group(group(program, tmp_path), stops, QUICK) == 70
    assert time.monotonic() - began < WAIT_S
    assert not alive(tmp_path / "0")


@pytest.mark.slow
def test_a_rank_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    program = IGNORE_TERM + READY + BOTH_READY + "if os.environ['RANK'] == '1': raise SystemExit(74)\n" + SLEEP
    began = time.monotonic()
    with StopSignals() as stops:
        assert run_group(group(program, tmp_path), stops, QUICK) == 74
    assert time.monotonic() - began < WAIT_S
    assert not alive(tmp_path / "0")


def test_stop_signal_lets_every_rank_save(tmp_path: Path) -> None:
    assert run_and_signal(SAVE_ON_TERM.replace("import", "import os, pathlib,", 1) + READY + SLEEP, tmp_path, 1) == 75
    assert sorted(path.name for path in tmp_path.glob("saved-*")) == ["saved-0", "saved-1"]


def test_second_stop_signal_kills_at_once(tmp_path: Path) -> None:
    began = time.monotonic()
    assert run_and_signal(IGNORE_TERM + READY + SLEEP, tmp_path, 1, 2) == 70
    assert time.monotonic() - began < WAIT_S


@pytest.mark.slow
def test_a_rank_that_other_hosts_gave_up_is_ended_and_no_other_one(tmp_path: Path) -> None:
    """Stopped, and alone on its host. Blamed before it: processes of its number elsewhere, and in earlier attempts."""
    run, survived = tmp_path / "run", []

    def blame(host: str, pid: int) -> None:
        record_fault(run, "node", "hangs", 0, blamed=[3], processes=[(host, pid)])

    def others() -> None:
        wait_for(lambda: (tmp_path / "3").exists() and (tmp_path / "3").read_text() != "")
        one = int((tmp_path / "3").read_text())
        os.kill(one, signal.SIGSTOP)
        blame("elsewhere", one)
        blame(socket.gethostname(), os.getpid())
        time.sleep(2.5)
        survived.append(start_ticks(one) is not None)
        blame(socket.gethostname(), one)

    run.mkdir()
    blame(socket.gethostname(), os.getpid())
    told = threading.Thread(target=others)
    told.start()
    with StopSignals() as stops:
        alone = replace(group(READY + SLEEP, tmp_path, 1), world_size=4, first_rank=3)
        end = attend(alone, stops, QUICK, run)
    told.join(timeout=WAIT_S)
    assert survived == [True]
    assert end.exit_code == 70 and [(failure.rank, failure.code) for failure in end.failures] == [(3, -signal.SIGKILL)]


def test_what_a_child_leaves_in_its_group_is_ended_too(tmp_path: Path) -> None:
    program = (
        "import os, pathlib, subprocess\n"
        "helper = subprocess.Popen(['sleep', '300'])\n"
        "pathlib.Path(os.environ['OUT'], os.environ['RANK']).write_text(str(helper.pid))\n"
    )
    with StopSignals() as stops:
        assert run_group(group(program, tmp_path), stops, QUICK) == 0
    wait_for(lambda: not alive(tmp_path / "0") and not alive(tmp_path / "1"))


LAUNCHER = """
import sys
from pathlib import Path
from launchers.local import Group, ExitPatience, _attempts
out, program, restarts = sys.argv[1:]
group = Group((sys.executable, "-c", program), 2, 2, env=(("OUT", out),))
sys.exit(_attempts(group, Path(out, "run"), 0, int(restarts), ExitPatience(100, 0.3, 0.5)))
"""


def start_launcher(out: Path, program: str, restarts: int = 0) -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, "-c", LAUNCHER, str(out), program, str(restarts)])


def test_a_killed_launcher_leaves_no_orphan(tmp_path: Path) -> None:
    launcher = start_launcher(tmp_path, READY + SLEEP)
    wait_for(lambda: all((tmp_path / rank).exists() and (tmp_path / rank).read_text() for rank in "01"))
    launcher.kill()
    launcher.wait(timeout=WAIT_S)
    wait_for(lambda: not alive(tmp_path / "0") and not alive(tmp_path / "1"))
    assert not is_running(read_record(tmp_path / "run"))


def test_stop_command_waits_for_the_save(tmp_path: Path) -> None:
    save = SAVE_ON_TERM.replace("import", "import os, pathlib,", 1)
    launcher = start_launcher(tmp_path, save + READY + SLEEP)
    wait_for(lambda: all((tmp_path / rank).exists() for rank in "01"))
    reaper = threading.Thread(target=launcher.wait)
    reaper.start()
    assert stop_run(tmp_path / "run", timeout_s=WAIT_S)["state"] == "stopped"
    reaper.join(timeout=WAIT_S)
    assert launcher.returncode == 75
    assert (tmp_path / "saved-0").exists() and (tmp_path / "saved-1").exists()


def test_a_node_fault_is_tried_again_under_the_next_attempt_number(tmp_path: Path) -> None:
    program = "import os, sys; sys.exit(70 if os.environ['TESSERA_ATTEMPT'] == '0' else 0)"
    launcher = start_launcher(tmp_path, program, restarts=1)
    assert launcher.wait(timeout=WAIT_S) == 0
    record = json.loads((tmp_path / "run" / "launcher.json").read_text())
    assert (record["attempt"], record["exit_code"]) == (1, 0)


def test_a_run_is_not_launched_twice_at_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    me = {"pid": os.getpid(), "start_ticks": start_ticks(os.getpid()), "host": socket.gethostname()}
    write_record(tmp_path / "run", me)
    assert start_launcher(tmp_path, "pass").wait(timeout=WAIT_S) != 0
    assert "tessera stop" in capfd.readouterr().err


def test_interrupt_reaches_the_launcher_alone_and_ends_in_a_save(tmp_path: Path) -> None:
    save = SAVE_ON_TERM.replace("import", "import os, pathlib,", 1)
    launcher = start_launcher(tmp_path, save + READY + SLEEP)
    wait_for(lambda: all((tmp_path / rank).exists() for rank in "01"))
    launcher.send_signal(signal.SIGINT)
    assert launcher.wait(timeout=WAIT_S) == 75
