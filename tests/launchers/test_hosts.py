"""Runs over several hosts, network namespaces with addresses and names of their own, whose links are cut for real."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.hosts import Host, hosts, why_not
from tests.launchers.test_preflight import blamed
from tests.pretrain.commands import (
    ROOT,
    Material,
    command,
    electra,
    environment,
    held,
    loss_bits,
    recipe,
    rows_of,
    steps_of,
)
from tests.pretrain.test_running import faults_of
from tests.pretrain.test_training import assert_every_position_once, assert_same_state

pytestmark = [pytest.mark.slow, pytest.mark.real]
PORT = 29400
TIMEOUT_S = 200


@pytest.fixture
def made(request: pytest.FixtureRequest) -> Iterator[list[Host]]:
    """Two hosts, or as many as the test asks for."""
    if reason := why_not():
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)
    with hosts(getattr(request, "param", 2)) as started:
        yield started


@pytest.fixture(scope="module")
def undisturbed(material: Material, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a struck run is held against: the same by torchrun on two hosts that nothing happens to."""
    if reason := why_not():
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)
    folder = tmp_path_factory.mktemp("undisturbed")
    run = folder / "run"
    config = recipe(electra(material, run), folder / "run.yaml")
    with hosts(2) as two:
        processes = start(two, [by_torchrun(host, n, config) for n, host in enumerate(two)], run)
        assert finish(processes, run) == [0, 0], log_of(run, 0).read_text()[-3000:]
    return run


def start(made: list[Host], commands: list[list[str]], log: Path, hold_at: int = 0) -> "list[subprocess.Popen[bytes]]":
    """One command a host; each has its own log beside `log`. hold_at: the run `log` stands still at this step."""
    told = environment(**held(log, hold_at, go_on(log))) if hold_at else environment()
    return [
        host.start(argv, log_of(log, number), told, cwd=ROOT)
        for number, (host, argv) in enumerate(zip(made, commands, strict=True))
    ]


def go_on(run: Path) -> Path:
    """The file for which a run that stands still waits."""
    return run.with_suffix(".go-on")


def log_of(log: Path, number: int) -> Path:
    return log.with_suffix(f".{number}.log")


def finish(processes: "list[subprocess.Popen[bytes]]", log: Path) -> list[int]:
    """Exit codes; what does not end is a failure, with its last words."""
    deadline, codes = time.monotonic() + TIMEOUT_S, []
    for number, process in enumerate(processes):
        try:
            codes.append(process.wait(max(0.1, deadline - time.monotonic())))
        except subprocess.TimeoutExpired:
            raise AssertionError(f"no end: {log_of(log, number).read_text()[-3000:]}") from None
    return codes


def wait_for(condition: Callable[[], bool], log: Path, what: str) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        words = [log_of(log, number).read_text()[-2000:] for number in (0, 1) if log_of(log, number).exists()]
        assert time.monotonic() < deadline, f"{what}: {words}"
        time.sleep(0.02)


def by_torchrun(host: Host, node: int, config: Path) -> list[str]:
    """One process on the node, found through torchrun's rendezvous on the first host."""
    rendezvous = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "hosts"]
    place = ["--rdzv-endpoint", f"host-0:{PORT}", "--local-addr", host.address, "--max-restarts", "2"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", *rendezvous, *place]
    return [*torchrun, "-m", "launchers.cli", "train", str(config)]


def by_launcher(host: Host, node: int, config: Path) -> list[str]:
    """The same by `tessera launch local` on each host."""
    place = ["--nodes", "2", "--procs-per-node", "1", "--node-rank", str(node), "--restarts", "2"]
    return command("launch", "local", str(config), *place, "--master-addr", "host-0", "--master-port", str(PORT))


Starter = Callable[[Host, int, Path], list[str]]


def ranks(host: Host) -> list[int]:
    """The processes that train there, not who started them, nor their data workers."""
    found = []
    for pid in host.processes():
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
            if "train" in words and not {"torch.distributed.run", "launch"} & set(words):
                found.append(pid)
    return found


def cut_until_noticed(made: list[Host], log: Path) -> None:
    """The second host's link, and a new attempt of either host finds the other one behind it still."""
    trained = [set(ranks(host)) for host in made]
    made[1].cut()
    go_on(log).touch()
    gone = lambda: not any(before & set(ranks(host)) for before, host in zip(trained, made, strict=True))  # noqa: E731
    wait_for(gone, log, "the cut was not noticed")
    made[1].restore()


def kill_a_rank(made: list[Host], log: Path) -> None:
    """The second host's rank: its starter sees that before the other host does."""
    (rank,) = ranks(made[1])
    os.kill(rank, signal.SIGKILL)


def freeze_a_rank(made: list[Host], log: Path) -> None:
    """The second host's rank, alone there: nobody on its host sees that it hangs."""
    (rank,) = ranks(made[1])
    os.kill(rank, signal.SIGSTOP)


@pytest.mark.parametrize("starter", [by_launcher, by_torchrun])
@pytest.mark.parametrize("strike", [cut_until_noticed, kill_a_rank, freeze_a_rank])
def test_a_struck_run_starts_again_and_goes_on_bitwise(
    made: list[Host],
    undisturbed: Path,
    material: Material,
    tmp_path: Path,
    starter: Starter,
    strike: Callable[[list[Host], Path], None],
) -> None:
    run = tmp_path / "run"
    config = recipe(electra(material, run, collective_timeout_s=12), tmp_path / "run.yaml")
    struck = start(made, [starter(host, n, config) for n, host in enumerate(made)], run, hold_at=6)
    wait_for(lambda: max(steps_of(run), default=0) >= 6, run, "no step 6")
    struck_at = time.time()
    strike(made, run)
    go_on(run).touch()
    assert finish(struck, run) == [0, 0], log_of(run, 0).read_text()[-3000:]
    assert loss_bits(run) == loss_bits(undisturbed)
    assert_same_state(run, undisturbed)
    assert_every_position_once(run, 24, 16)
    assert len({row["attempt"] for row in rows_of(run)}) == 2
    for fault in faults_of(run):
        assert fault["cause"] == "node" and fault["time"] - struck_at < 3 * 12, fault


def test_a_stop_on_one_host_saves_on_both_and_neither_starts_again(
    made: list[Host], material: Material, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    config = recipe(electra(material, run, checkpoint_every_steps=1000), tmp_path / "run.yaml")
    processes = start(made, [by_launcher(host, n, config) for n, host in enumerate(made)], run, hold_at=3)
    wait_for(lambda: max(steps_of(run), default=0) >= 3, run, "no step 3")
    processes[1].terminate()
    assert finish(processes, run) == [75, 75], log_of(run, 0).read_text()[-3000:]


@pytest.mark.parametrize("made", [3], indirect=True)
def test_a_host_behind_a_slow_link_is_named_before_the_run(made: list[Host], tmp_path: Path) -> None:
    made[2].limit("100mbit")
    place = ["--nodes", "3", "--procs-per-node", "1", "--master-addr", "host-0", "--master-port", str(PORT)]
    argv = [command("preflight", "--json", *place, "--node-rank", str(n)) for n in range(3)]
    assert finish(start(made, argv, tmp_path / "preflight"), tmp_path / "preflight") == [70] * 3
    said = log_of(tmp_path / "preflight", 0).read_text()
    assert ("link", [2]) in blamed(said) and '"host": "host-2"' in said
    assert not [ranks for check, ranks in blamed(said) if check == "link" and ranks != [2]]
