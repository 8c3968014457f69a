"""A Slurm of several nodes on this machine, with or without accounting; a node of it can be lost, as by a power cut."""

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from launchers.local import FIRST_PORT, PORTS
from launchers.watch import start_ticks

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "bc")
ACCOUNTING = ("slurmdbd", "mariadbd", "mariadb-install-db", "sacct")
PACKAGES = "slurm-wlm slurmctld slurmd slurm-client munge slurm-wlm-basic-plugins bc slurmdbd mariadb-server"
PATIENCE_S = 180.0
POLL_S = 0.2
JOBS = 100
"""More than a site is ever asked to run."""
PATIENT = {
    "KillWait=3": "KillWait=60", "BatchStartTimeout=10": "BatchStartTimeout=60", "cred_expire=5": "cred_expire=10",
    "SlurmdTimeout=6": "SlurmdTimeout=15", "SECONDS+30": "SECONDS+120",
}  # fmt: skip
"""What a site on a machine that others use waits for: for saves after SIGTERM, daemons that stand still, its start."""


class Site:
    """A running Slurm; SLURM_CONF of this process points at it."""

    def __init__(self, folder: Path, nodes: int) -> None:
        self.folder = folder
        self.nodes = [f"node{number}" for number in range(1, nodes + 1)]

    @property
    def conf(self) -> Path:
        return self.folder / "etc" / "slurm.conf"

    def with_controller_at(self, port: int) -> Path:
        """The same site's configuration, but for the controller's port."""
        lines = self.conf.read_text().splitlines()
        path = self.conf.with_name("moved.conf")
        path.write_text(
            "\n".join(f"SlurmctldPort={port}" if "SlurmctldPort" in line else line for line in lines) + "\n"
        )
        return path

    @contextlib.contextmanager
    def frozen_controller(self) -> Iterator[None]:
        """Within it the controller is stopped when sbatch was called once; afterwards it goes on."""
        pid, tools = int((self.folder / "run" / "slurmctld.pid").read_text()), self.folder / "bin"
        tools.mkdir(exist_ok=True)
        script = f'#!/bin/bash\n{shutil.which("sbatch")} "$@"; code=$?; kill -STOP {pid}; exit "$code"\n'
        (tools / "sbatch").write_text(script)
        (tools / "sbatch").chmod(0o755)
        before = os.environ["PATH"]
        os.environ["PATH"] = f"{tools}:{before}"
        try:
            yield
        finally:
            os.environ["PATH"] = before
            os.kill(pid, signal.SIGCONT)
            wait_until(self._all_idle, "the nodes are not back")

    def _all_idle(self) -> bool:
        states = self.tool("sinfo", "--noheader", "--Node", "--format=%T").split()
        return states == ["idle"] * len(self.nodes)

    def without_accounting(self) -> Path:
        """The same site's configuration as it would be without slurmdbd: sacct then says so."""
        lines = self.conf.read_text().splitlines()
        kept = [line for line in lines if not line.startswith("AccountingStorage")]
        path = self.conf.with_name("plain.conf")
        path.write_text("\n".join([*kept, "AccountingStorageType=accounting_storage/none", ""]))
        return path

    def forget_soon(self) -> None:
        """From now on the controller forgets a job within seconds of its end, as it does after minutes elsewhere."""
        self.conf.write_text(self.conf.read_text().replace("MinJobAge=300", "MinJobAge=2"))
        self.tool("scontrol", "reconfigure")

    def tool(self, *argv: str) -> str:
        """What one of Slurm's tools prints."""
        return subprocess.run(argv, capture_output=True, text=True, timeout=60, check=True).stdout

    def job(self, job: str) -> dict[str, str]:
        """Fields of `scontrol show job`, of the first task of an array."""
        words = self.tool("scontrol", "show", "job", "--oneliner", job).splitlines()[0].split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def nodes_of(self, job: str) -> list[str]:
        """Where it runs, or ran last, in the order of its ranks."""
        return self.tool("scontrol", "show", "hostnames", self.job(job)["NodeList"]).split()

    def processes(self, job: str, node: str) -> list[int]:
        """The tasks of a job on a node, what they started, and the step daemons above them."""
        marks = {f"SLURM_JOB_ID={job}".encode(), f"SLURMD_NODENAME={node}".encode()}
        tasks = [pid for pid, words in _environments() if marks <= words]
        return tasks + [parent for pid in tasks if (parent := _parent(pid)) not in tasks and _is_stepd(parent)]

    def rank(self, job: str, rank: int) -> int:
        """The process that trains as `rank`."""
        marks = {f"SLURM_JOB_ID={job}".encode(), f"SLURM_PROCID={rank}".encode()}
        pids = [pid for pid, words in _environments() if marks <= words]
        return next(pid for pid in pids if b"launchers.cli" in _command(pid))

    def lose(self, node: str, job: str) -> None:
        """The node's daemon and all it runs die at once."""
        daemon = self.folder / "run" / f"slurmd-{node}.pid"
        for pid in (int(daemon.read_text()), *self.processes(job, node)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        daemon.unlink()

    def restore(self, node: str) -> None:
        """The node comes back."""
        subprocess.run(["slurmd", "-f", str(self.conf), "-N", node], check=True, timeout=30)


def wait_until(condition: Callable[[], Any], what: Callable[[], str] | str, seconds: float = PATIENCE_S) -> Any:
    """The first true value of `condition()`. Raises AssertionError where none comes."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"not within {seconds:.0f} s: {what if isinstance(what, str) else what()}"
        time.sleep(POLL_S)
    return found


@contextlib.contextmanager
def running_site(scripts: Path, folder: Path, nodes: int, accounting: bool) -> Iterator[Site]:
    """Start munged, slurmctld, a slurmd a node (and mariadb, slurmdbd); end them all by their ids."""
    for name in ("start.sh", "start_dbd.sh", "stop.sh"):
        shutil.copy(scripts / name, folder)
    # first the ports of jobs, which their numbers give them, then those of the daemons: PORT0 to PORT0 + 10 + nodes
    ports = port_block(JOBS + 11 + nodes)
    adapt(folder / "start.sh", {"ClusterName=": f"FirstJobId={ports - FIRST_PORT}\nClusterName="} | PATIENT)
    adapt(folder / "start_dbd.sh", {"seq 1 100": "seq 1 1000"})  # tenths of a second
    site, before, daemons = Site(folder, nodes), dict(os.environ), ports + JOBS
    environment = {**before, "N": str(nodes), "PORT0": str(daemons), "DBPORT": str(daemons + 1)}
    os.environ["SLURM_CONF"] = str(site.conf)
    try:
        if accounting:
            subprocess.run(["bash", str(folder / "start_dbd.sh")], env=environment, check=True, timeout=300)
            environment["ACCT"] = "1"
        subprocess.run(["bash", str(folder / "start.sh")], env=environment, check=True, timeout=300)
        yield site
    finally:
        subprocess.run(["bash", str(folder / "stop.sh")], timeout=120, check=False)
        os.environ.pop("SLURM_CONF")


def adapt(script: Path, changes: dict[str, str]) -> None:
    """Write some words of it anew."""
    text = script.read_text()
    for old, new in changes.items():
        assert old in text, f"{script}: no {old}"
        text = text.replace(old, new)
    script.write_text(text)


def port_block(count: int) -> int:
    """The first of `count` ports in a row, of those that jobs have, which nobody uses.

    Random, so that sites which start together differ; no connection that goes out takes one before its daemon does.
    """
    while True:
        first = random.SystemRandom().randrange(FIRST_PORT + 1, FIRST_PORT + PORTS - count)
        with contextlib.ExitStack() as probes, contextlib.suppress(OSError):
            for port in range(first, first + count):
                probes.enter_context(socket.socket()).bind(("", port))
            return first


def _environments() -> Iterator[tuple[int, set[bytes]]]:
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if start_ticks(int(folder.name)) is not None:
                yield int(folder.name), set((folder / "environ").read_bytes().split(b"\0"))


def _parent(pid: int) -> int:
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


def _is_stepd(pid: int) -> bool:
    return b"slurmstepd" in _command(pid)


def _command(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""
