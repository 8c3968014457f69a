"""Start the processes of a run on this machine, stream their output, stop them with a save, leave no orphan.

Exit code: 0 when every process left with 0; else the most telling of theirs (64, 74, then 70, then 75). A process that
died by a signal or with a traceback is a node fault, 70.
"""

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

from data_pipeline.errors import ConfigError, DataError, NodeFault, Requeue
from launchers.spec import LocalCluster, RunSpec, describe, load_cluster
from launchers.watch import is_running, read_record, start_ticks, write_record

PR_SET_PDEATHSIG = 1
POLL_S = 0.05


@dataclass(frozen=True)
class Patience:
    """How long the launcher waits before it goes on to the next, rougher means."""

    stop_s: float = 300.0  # for the save, after a stop signal
    settle_s: float = 10.0  # for the others to notice a dead peer by themselves, before SIGTERM
    grace_s: float = 10.0  # from that SIGTERM to SIGKILL


@dataclass(frozen=True)
class Group:
    """The processes of one node. `command` is a whole argv, the same for each; the environment tells them apart."""

    command: tuple[str, ...]
    procs: int
    world_size: int
    first_rank: int = 0
    master_addr: str = "127.0.0.1"
    master_port: int = 0
    attempt: int = 0
    env: tuple[tuple[str, str], ...] = ()

    def environment(self, local_rank: int) -> dict[str, str]:
        """What process `local_rank` is told besides the inherited environment; the user's own entries win."""
        return {
            "RANK": str(self.first_rank + local_rank),
            "LOCAL_RANK": str(local_rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_WORLD_SIZE": str(self.procs),
            "MASTER_ADDR": self.master_addr,
            "MASTER_PORT": str(self.master_port),
            "TESSERA_ATTEMPT": str(self.attempt),
            "OMP_NUM_THREADS": str(threads_per_process(self.procs)),
            "PYTHONUNBUFFERED": "1",
            **dict(self.env),
        }


# ---------------------------------------------------------------------------------------- from recipe to processes


def launch_local(
    config_path: Path,
    overrides: Sequence[str] = (),
    cluster: LocalCluster | None = None,
    *,
    nodes: int | None = None,
    procs_per_node: int | None = None,
    node_rank: int = 0,
    master_addr: str = "127.0.0.1",
    master_port: int = 0,
    restarts: int | None = None,
    dry_run: bool = False,
) -> int:
    """Run the recipe on this machine's processes -> exit code. Raises ConfigError before anything is started."""
    cluster = cluster or load_cluster(LocalCluster, None)
    restarts = cluster.restarts if restarts is None else restarts
    spec = describe(config_path, overrides, cluster, nodes, procs_per_node)
    _check_node(spec, node_rank, master_addr, master_port, restarts)
    group = Group(
        command=(sys.executable, *spec.command),
        procs=spec.procs_per_node,
        world_size=spec.world_size,
        first_rank=node_rank * spec.procs_per_node,
        master_addr=master_addr,
        master_port=master_port,
        env=spec.env,
    )
    if dry_run:
        print(dry_run_text(group))
        return 0
    return _attempts(group, Path(spec.run_folder), node_rank, restarts, Patience(cluster.stop_timeout_s))


def _check_node(spec: RunSpec, node_rank: int, master_addr: str, master_port: int, restarts: int) -> None:
    if node_rank >= spec.nodes:
        raise ConfigError(f"--node-rank {node_rank} does not exist among {spec.nodes} nodes; they count from 0")
    if spec.nodes == 1:
        return
    if not master_port or master_addr.startswith("127."):
        raise ConfigError(f"{spec.nodes} nodes need the same --master-addr and --master-port of node 0 on each of them")
    if restarts:
        raise ConfigError(f"restarts={restarts} with {spec.nodes} nodes: what starts the nodes restarts them; use 0")


def _attempts(group: Group, run: Path, node_rank: int, restarts: int, patience: Patience) -> int:
    """Attempt after attempt while a node fault ends them and `restarts` lasts."""
    record = read_record(run) if node_rank == 0 else {}
    if is_running(record):
        raise ConfigError(f"{run}: process {record['pid']} is training this run; `tessera stop {run}` first")
    attempt = int(os.environ.get("TESSERA_ATTEMPT", record.get("attempt", -1) + 1))
    with StopSignals() as stops:
        while True:
            group = replace(group, attempt=attempt, master_port=group.master_port or free_port())
            if node_rank == 0:
                write_record(run, _record(group))
            code = run_group(group, stops, patience)
            if node_rank == 0:
                write_record(run, _record(group) | {"exit_code": code})
            if code != NodeFault.exit_code or restarts == 0 or stops.count:
                return code
            say(f"attempt {attempt} ended with a node fault, {restarts} new attempts left")
            attempt, restarts, group = attempt + 1, restarts - 1, replace(group, master_port=0)


def _record(group: Group) -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "start_ticks": start_ticks(os.getpid()),
        "host": socket.gethostname(),
        "attempt": group.attempt,
        "world_size": group.world_size,
        "command": list(group.command),
    }


def dry_run_text(group: Group) -> str:
    """One line of shell for each process."""
    lines = []
    for local_rank in range(group.procs):
        pairs = " ".join(f"{name}={value}" for name, value in group.environment(local_rank).items())
        lines.append(f"{pairs} {' '.join(group.command)}")
    return "\n".join(lines)


# -------------------------------------------------------------------------------------------- one group's life


class StopSignals:
    """Counts SIGINT and SIGTERM between enter and exit: once means save and leave, twice means leave."""

    def __init__(self) -> None:
        self.count = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.count += 1


def run_group(group: Group, stops: StopSignals, patience: Patience = Patience()) -> int:
    """Start the group, wait for its end -> exit code. Nothing of it is left running on return."""
    children = [_start(group, local_rank) for local_rank in range(group.procs)]
    pumps = [_pump(child, group.first_rank + i) for i, child in enumerate(children) if child.stdout is not None]
    try:
        _wait(children, group.first_rank, stops, patience)
    finally:
        for child in children:
            _kill_tree(child)
        for pump in pumps:
            pump.join(timeout=5)
    return exit_code_of([child.returncode for child in children], stopped=stops.count > 0)


def _wait(children: list["subprocess.Popen[str]"], first_rank: int, stops: StopSignals, patience: Patience) -> None:
    """Returns when all have left or a deadline says that the rest must be killed."""
    terminate_at, kill_at = float("inf"), float("inf")
    stopping = failing = False
    while None in [child.poll() for child in children]:  # a list: every one is asked, not only the first alive
        now = time.monotonic()
        if stops.count and not stopping:
            stopping, kill_at = True, min(kill_at, now + patience.stop_s)
            say(f"stopping: waiting up to {patience.stop_s:g} s for the save; a second signal stops at once")
            _terminate(children)
        failed = next((i for i, child in enumerate(children) if _failed(child)), None)
        if failed is not None and not failing:
            failing, terminate_at = True, now + patience.settle_s
            kill_at = min(kill_at, terminate_at + patience.grace_s)
            say(f"rank {first_rank + failed} {_how(children[failed])}; the others have {patience.settle_s:g} s")
        if now >= terminate_at:
            terminate_at = float("inf")
            _terminate(children)
        if stops.count > 1 or now >= kill_at:
            say("killing what is left")
            return
        time.sleep(POLL_S)


def _failed(child: subprocess.Popen[str]) -> bool:
    """Left in a way that the others will not: 0 and 75 are ends that all reach together."""
    return child.returncode not in (None, 0, Requeue.exit_code)


def exit_code_of(codes: Sequence[int], stopped: bool) -> int:
    """The group's exit code from its processes' (negative: killed by that signal)."""
    if all(code == 0 for code in codes):
        return 0
    for telling in (ConfigError.exit_code, DataError.exit_code):
        if telling in codes:
            return telling
    # A process that SIGTERM met before it could catch it had nothing to save.
    harmless = {0, Requeue.exit_code} | ({-signal.SIGTERM} if stopped else set())
    return Requeue.exit_code if set(codes) <= harmless else NodeFault.exit_code


def _start(group: Group, local_rank: int) -> "subprocess.Popen[str]":
    """Rank 0 keeps this terminal, so that its progress bars work; the others are piped and prefixed."""
    pipe = None if group.first_rank + local_rank == 0 else subprocess.PIPE
    return subprocess.Popen(
        group.command,
        env={**os.environ, **group.environment(local_rank)},
        stdin=subprocess.DEVNULL,
        stdout=pipe,
        stderr=None if pipe is None else subprocess.STDOUT,
        text=True,
        errors="replace",
        process_group=0,  # Ctrl-C reaches the launcher alone, which asks for a save
        preexec_fn=_die_with(os.getpid()),  # runs before any thread of ours exists
    )


def _die_with(parent: int) -> Any:
    """What a child runs before its program: SIGKILL for it as soon as the launcher is gone (Linux)."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)

    def arm() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it was gone before the line above
            os._exit(NodeFault.exit_code)

    return arm


def _pump(child: "subprocess.Popen[str]", rank: int) -> threading.Thread:
    def copy() -> None:
        assert child.stdout is not None
        for line in child.stdout:
            sys.stderr.write(f"[rank {rank}] {line}")
            sys.stderr.flush()

    thread = threading.Thread(target=copy, name=f"output of rank {rank}", daemon=True)
    thread.start()
    return thread


def _terminate(children: Sequence["subprocess.Popen[str]"]) -> None:
    for child in children:
        child.terminate()  # does nothing to one that has left


def _kill_tree(child: "subprocess.Popen[str]") -> None:
    """SIGKILL to the child's process group: itself if it still runs, and what it may have left behind."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _how(child: "subprocess.Popen[str]") -> str:
    code = int(child.returncode)
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"left with exit code {code}"


# ------------------------------------------------------------------------------------------------- small parts


def threads_per_process(procs: int, env: Mapping[str, str] = os.environ) -> int:
    """Cores for each process; a smaller OMP_NUM_THREADS of the user's is kept."""
    share = max(1, len(os.sched_getaffinity(0)) // procs)
    asked = env.get("OMP_NUM_THREADS", "")
    return min(share, int(asked)) if asked.isdigit() and int(asked) else share


def free_port() -> int:
    """A TCP port of this machine that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def say(text: str) -> None:
    """A line of the launcher's own, beside the output of the run."""
    print(f"launcher: {text}", file=sys.stderr, flush=True)
