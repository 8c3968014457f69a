"""A Ray cluster of several nodes on this machine; a node can be lost, as when its power is cut."""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ray._private import ray_constants
from ray.cluster_utils import Cluster

LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # set to 0, Ray stays on 127.0.0.1, here and in what it starts
COMMON = {"object_store_memory": 80 * 1024**2, "node_ip_address": "127.0.0.1"}


def below(pid: int) -> list[int]:
    """Processes started by `pid` and by those."""
    children: list[int] = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").glob("*/children"):
            children += [int(child) for child in task.read_text().split()]
    return children + [grandchild for child in children for grandchild in below(child)]


def command_of(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def kill(pids: list[int]) -> None:
    """SIGKILL to all of them."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


class Nodes:
    """A head that runs no tasks, so that the driver's node stays, and `count` nodes of `cpus` each.

    Nodes inherit the environment of this process: credentials of S3 among them.
    """

    def __init__(self, count: int, cpus: int) -> None:
        self._cpus = cpus
        os.environ[LOOPBACK], ray_constants.ENABLE_RAY_CLUSTER = "0", False  # for as long as this process lives
        head = {"num_cpus": 0, "include_dashboard": False, **COMMON}
        self._cluster = Cluster(initialize_head=False, shutdown_at_exit=True)
        self._start(**head)
        self._nodes = [self._add() for _ in range(count)]

    @property
    def count(self) -> int:
        """Nodes beside the head."""
        return len(self._nodes)

    @property
    def address(self) -> str:
        """What `ray_address` of a build is set to."""
        return str(self._cluster.address)

    def processes(self, number: int) -> list[int]:
        """The raylet of a node and all that it started: workers, and what these started."""
        raylets = [info.process.pid for info in self._nodes[number].all_processes["raylet"]]
        return raylets + [pid for raylet in raylets for pid in below(raylet)]

    def lose(self, number: int) -> None:
        """Every process of a node dies at once."""
        kill(self.processes(number))
        self._cluster.remove_node(self._nodes[number], allow_graceful=False)

    def lose_own(self) -> None:
        """The node on the head dies, which is that of a driver that joins."""
        kill([info.process.pid for info in self._cluster.head_node.all_processes["raylet"]])

    def replace(self, number: int) -> None:
        """A new node in the place of the lost one."""
        self._nodes[number] = self._add()

    def stop(self) -> None:
        self._cluster.shutdown()

    def _add(self) -> Any:
        return self._start(num_cpus=self._cpus, **COMMON)

    def _start(self, **how: Any) -> Any:
        """Ray waits 30 s for a node to start, on a machine however busy: a second and a third may start in time."""
        for left in (2, 1, 0):
            try:
                return self._cluster.add_node(**how)
            except Exception as error:
                if not left or "timed out" not in str(error):
                    raise
        raise AssertionError


@contextlib.contextmanager
def nodes(count: int, cpus: int) -> Iterator[Nodes]:
    """A running cluster, stopped at the end."""
    started = Nodes(count, cpus)
    try:
        yield started
    finally:
        started.stop()


def wait_for(condition: Any, what: str, seconds: float = 120.0) -> None:
    """Raises AssertionError where `condition()` stays false."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.02)
