"""Start the processes of a run on this machine, stream their output, stop them with a save, leave no orphan.

Exit code: 0 if every process exits with 0, else the most informative of theirs (64, 74, then 70, then 75). A process
that a signal or an uncaught exception ends counts as a node fault, 70. causes.py decides whether to make another
attempt. In a scheduler's job, which makes the attempts, user code exits with 1, which like 64 prevents another one.
"""

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.errors import ConfigError, DataError, NodeFault, Requeue
from launchers.causes import DECODING, USER_CODE_EXIT, Failure, diagnose, pause_s, worth_another_attempt
from launchers.children import die_with
from launchers.output import print_program
from launchers.quoting import command_line
from launchers.watch import JOB, metrics_size, read_record, refuse_second_launch, start_ticks, write_record
from pretrain.runtime.deadline import LEAD_VARIABLE, lead_s
from pretrain.runtime.faults import crashed_while_decoding, faults_size, read_faults
from pretrain.runtime.mlflow_feed import FAILED, KILLED, end_run
from pretrain.runtime.signals import StopSignals

if TYPE_CHECKING:
    from launchers.spec import RunSpec

POLL_S = 0.05
LOOK_S = 1.0  # between checks for faults written by other hosts; each is a call to a shared file system
FIRST_PORT, PORTS = 20_000, 12_000
"""Range of rendezvous ports: below 32768, where Linux's ports for outgoing connections begin."""


@dataclass(frozen=True)
class ExitPatience:
    """Seconds that the launcher waits before each escalation."""

    stop_s: float = 300.0  # for the save, after a stop signal
    settle_s: float = 10.0  # for the others to notice a dead peer by themselves, before SIGTERM
    grace_s: float = 10.0  # from that SIGTERM to SIGKILL


@dataclass(frozen=True)
class Group:
    """The processes of one node. `command` is the full argv, the same for each; only their environments differ."""

    command: tuple[str, ...]
    procs: int
    world_size: int
    first_rank: int = 0
    master_addr: str = "127.0.0.1"
    master_port: int = 0
    attempt: int = 0
    env: tuple[tuple[str, str], ...] = ()

    def environment(self, local_rank: int) -> dict[str, str]:
        """Return the variables of process `local_rank`, added to the inherited ones; the user's entries win."""
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
    spec: "RunSpec",
    *,
    node_rank: int = 0,
    master_addr: str = "127.0.0.1",
    master_port: int = 0,
    restarts: int | None = None,
    dry_run: bool = False,
) -> int:
    """Run this machine's processes and return the exit code. Raise ConfigError before anything is started."""
    restarts = spec.retries if restarts is None else restarts
    spec = replace(spec, lead_s=int(min(spec.lead_s, lead_s())))  # the parent process may allow less time
    if spec.on_ray and spec.nodes > 1:
        raise ConfigError(f"a {spec.task} on {spec.nodes} nodes needs slurm, kubernetes or a `ray_address`")
    check_rendezvous(spec.nodes, node_rank, master_addr, master_port)
    group = Group(
        command=(sys.executable, *spec.command),
        procs=spec.procs_per_node,
        world_size=spec.world_size,
        first_rank=node_rank * spec.procs_per_node,
        master_addr=master_addr,
        master_port=master_port,
        env=tuple(spec.environment.items()),
    )
    if dry_run:
        print_program(dry_run_text(group) + "\n")
        return 0
    return _attempts(group, Path(spec.run_folder), node_rank, restarts, ExitPatience(spec.lead_s))


def check_rendezvous(nodes: int, node_rank: int, master_addr: str, master_port: int) -> None:
    """Raise ConfigError for an invalid node rank or address, and for nodes that could not find each other."""
    if node_rank >= nodes:
        raise ConfigError(f"--node-rank {node_rank} is outside of 0..{nodes - 1} for {nodes} nodes")
    if not master_addr.isprintable() or len(master_addr.split()) != 1 or master_addr != master_addr.strip():
        raise ConfigError(
            f"--master-addr {master_addr!r} is not a host name or address; use one such as node-0 or 10.0.0.1"
        )
    if nodes > 1 and (not master_port or master_addr.startswith("127.")):
        raise ConfigError(f"{nodes} nodes need the same --master-addr and --master-port of node 0 on each of them")


def _attempts(group: Group, run: Path, node_rank: int, restarts: int, patience: ExitPatience) -> int:
    """Make attempts while the cause of the last end justifies another and `restarts` allows it; return the exit code.

    With several nodes, each restarts its own processes, which wait for each other at node 0's port. Stopping one node
    stops all.
    """
    in_a_job = "TESSERA_ATTEMPT" in os.environ  # a scheduler's job started us and counts the attempts
    several = group.world_size > group.procs
    if node_rank == 0 and not in_a_job:
        refuse_second_launch(run)
        (run / JOB).unlink(missing_ok=True)
    record = read_record(run) if node_rank == 0 else {}
    attempt = int(os.environ.get("TESSERA_ATTEMPT", record.get("attempt", -1) + 1))
    failed = 0
    with StopSignals() as stops:
        while True:
            group = replace(group, attempt=attempt, master_port=group.master_port or free_port())
            if node_rank == 0:
                write_record(run, _record(group))
            faults, steps = faults_size(run), metrics_size(run)
            end = attend(group, stops, patience, run)
            diagnosis = diagnose(end.failures, read_faults(run, faults), end.exit_code) if end.exit_code else None
            if diagnosis and any(crashed_while_decoding(run, failure.rank) for failure in end.failures):
                diagnosis = replace(diagnosis, why=diagnosis.why + DECODING)
            if node_rank == 0 and _owns(run):
                told = {"cause": diagnosis.cause, "why": diagnosis.why} if diagnosis else {}
                write_record(run, _record(group) | {"exit_code": end.exit_code} | told)
                end_run(run, KILLED if stops.count else FAILED)
            if diagnosis is None or stops.count or (several and end.exit_code == Requeue.exit_code):
                return end.exit_code
            another = restarts > failed and worth_another_attempt(diagnosis, metrics_size(run) > steps)
            say(f"attempt {attempt} ended, cause {diagnosis.cause}: {diagnosis.why}")
            if not another:
                return USER_CODE_EXIT if in_a_job and diagnosis.cause == "user code" else end.exit_code
            say(f"restarting, {restarts - failed - 1} restarts left after this one")
            _pause(pause_s(diagnosis, failed), stops)
            attempt, failed = attempt + 1, failed + 1
            group = group if several else replace(group, master_port=0)


def _owns(run: Path) -> bool:
    """Return whether RUN/launcher.json is still this launcher's: a later attempt may have started elsewhere."""
    try:
        record = read_record(run)
    except DataError:  # damaged, so that overwriting it loses nothing
        return True
    return (record.get("host"), record.get("pid")) == (socket.gethostname(), os.getpid())


def _pause(seconds: float, stops: StopSignals) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until and not stops.count:
        time.sleep(POLL_S)


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
    """Return a shell script that starts the processes as `attend` would, one per line, and waits for them."""
    group = replace(group, master_port=group.master_port or free_port())
    lines = []
    for local_rank in range(group.procs):
        pairs = [f"{name}={value}" for name, value in group.environment(local_rank).items()]
        lines.append(command_line(["env", *pairs, *group.command]))
    return " &\n".join(lines) + (" &\nwait" if len(lines) > 1 else "")


# ----------------------------------------------------------------------------------------- running one group


@dataclass(frozen=True)
class End:
    """How a group ended. `failures`: processes that exited without being told to, in the order seen."""

    exit_code: int
    failures: tuple[Failure, ...]


def run_group(group: Group, stops: StopSignals, patience: ExitPatience = ExitPatience()) -> int:
    """Run `attend` and return the exit code alone."""
    return attend(group, stops, patience).exit_code


def attend(group: Group, stops: StopSignals, patience: ExitPatience = ExitPatience(), run: Path | None = None) -> End:
    """Start the group and wait for its end. Nothing of it is left running on return.

    run: folder in which ranks of other hosts report that a process here hangs, which may not show on this host.
    """
    group = replace(group, env=((LEAD_VARIABLE, f"{patience.stop_s:g}"), *group.env))
    children = [_start(group, local_rank) for local_rank in range(group.procs)]
    pumps = [_pump(child, group.first_rank + i) for i, child in enumerate(children) if child.stdout is not None]
    failures: list[Failure] = []
    try:
        given_up = GivenUp(run) if run else None
        _wait(children, group.first_rank, stops, patience, failures, given_up)
    finally:
        for child in children:
            _kill_tree(child)
        for pump in pumps:
            pump.join(timeout=5)
    code = exit_code_of([child.returncode for child in children], stopped=stops.count > 0)
    return End(code, tuple(failures))


def _wait(
    children: list["subprocess.Popen[str]"],
    first_rank: int,
    stops: StopSignals,
    patience: ExitPatience,
    failures: list[Failure],
    given_up: "GivenUp | None" = None,
) -> None:
    """Wait until all have exited or a deadline requires that the rest be killed; fill `failures`."""
    terminate_at, kill_at, stopping = float("inf"), float("inf"), False
    while True:
        codes = [child.poll() for child in children]
        now = time.monotonic()
        if not failures and any(map(_failed, codes)):
            failures += [Failure(first_rank + i, code) for i, code in enumerate(codes) if code and _failed(code)]
            terminate_at = now + patience.settle_s
            kill_at = min(kill_at, terminate_at + patience.grace_s)
            say(f"rank {failures[0].rank} {failures[0].how}; the other ranks have {patience.settle_s:g} s to exit")
        if None not in codes:
            return
        if stops.count and not stopping:
            stopping, kill_at = True, min(kill_at, now + patience.stop_s)
            say(f"stopping: waiting up to {patience.stop_s:g} s for the save; a second signal stops at once")
            _terminate(children)
        if now >= terminate_at:
            terminate_at = float("inf")
            _terminate(children)
        if given_up:
            given_up.end(children)
        if stops.count > 1 or now >= kill_at:
            say("killing the remaining processes")
            return
        time.sleep(POLL_S)


class GivenUp:
    """Kills this host's processes once ranks of other hosts report them as hanging and start a new attempt."""

    def __init__(self, run: Path) -> None:
        self.run, self.start, self.looked = run, faults_size(run), time.monotonic()

    def end(self, children: Sequence["subprocess.Popen[str]"]) -> None:
        """Kill blamed processes; checks every LOOK_S. Blame names host and pid, so it never hits a later attempt."""
        if time.monotonic() - self.looked < LOOK_S:
            return
        self.looked, host = time.monotonic(), socket.gethostname()
        if faults_size(self.run) == self.start:
            return
        blamed = {tuple(one) for fault in read_faults(self.run, self.start) for one in fault.get("processes", ())}
        if any((host, child.pid) not in blamed for child in children):
            return  # the watchdog of a rank that is not blamed makes them write their stacks and ends them
        for child in (child for child in children if child.poll() is None):
            say(f"process {child.pid} hangs, as ranks on other hosts report; killing it")
            child.kill()


def _failed(code: int | None) -> bool:
    """Return whether a process failed on its own; all processes reach exit codes 0 and 75 together."""
    return code not in (None, 0, Requeue.exit_code)


def exit_code_of(codes: Sequence[int], stopped: bool) -> int:
    """Return the group's exit code for its processes' codes (negative: killed by that signal)."""
    if all(code == 0 for code in codes):
        return 0
    for telling in (ConfigError.exit_code, DataError.exit_code):
        if telling in codes:
            return telling
    # A process that SIGTERM killed before it had a handler had nothing to save.
    harmless = {0, Requeue.exit_code} | ({-signal.SIGTERM} if stopped else set())
    return Requeue.exit_code if set(codes) <= harmless else NodeFault.exit_code


def _start(group: Group, local_rank: int) -> "subprocess.Popen[str]":
    """Start one process. Rank 0 keeps the terminal, for its progress bars; the others are piped and prefixed."""
    pipe = None if group.first_rank + local_rank == 0 else subprocess.PIPE
    return subprocess.Popen(
        group.command,
        env={**os.environ, **group.environment(local_rank)},
        stdin=subprocess.DEVNULL,
        stdout=pipe,
        stderr=None if pipe is None else subprocess.STDOUT,
        text=True,
        errors="replace",
        process_group=0,  # Ctrl-C reaches only the launcher, which asks for a save
        preexec_fn=die_with(os.getpid()),  # one system call: safe beside the signal thread
    )


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
        child.terminate()  # no effect on one that has exited


def _kill_tree(child: "subprocess.Popen[str]") -> None:
    """Send SIGKILL to the child's process group: itself if it still runs, and processes that it left behind."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


# ------------------------------------------------------------------------------------------------- small parts


def threads_per_process(procs: int, env: Mapping[str, str] = os.environ) -> int:
    """Return the number of cores per process; a smaller OMP_NUM_THREADS of the user is kept."""
    share = max(1, len(os.sched_getaffinity(0)) // procs)
    asked = env.get("OMP_NUM_THREADS", "")
    return min(share, int(asked)) if asked.isdigit() and int(asked) else share


def free_port() -> int:
    """Return a TCP port of this machine that nobody listens on now. Raise NodeFault if none is found.

    Random, so that runs started together differ; no outgoing connection can take it before rank 0 listens there.
    """
    ports = random.SystemRandom().sample(range(FIRST_PORT, FIRST_PORT + PORTS), 100)
    for port in ports:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise NodeFault(f"none of {len(ports)} ports from {FIRST_PORT} on is free on this machine")


def say(text: str) -> None:
    """Print a line of the launcher to stderr, beside the output of the run."""
    print(f"launcher: {text}", file=sys.stderr, flush=True)
