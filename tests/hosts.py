"""Hosts for the tests: network namespaces on a bridge, each with its own address and name, whose links can be cut.

Names hold this process's number, so that two test runs do not meet. A host ends with all processes in it.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

PACKAGES = "iproute2 util-linux"
ETC = Path("/etc/netns")
WAIT_S = 20


def why_not() -> str:
    """What is missing to make hosts here; empty when nothing is."""
    absent = [name for name in ("ip", "unshare") if shutil.which(name) is None]
    if absent:
        return f"{', '.join(absent)} missing; as root: apt-get install --no-install-recommends {PACKAGES}"
    name = f"tsr{os.getpid()}probe"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, timeout=WAIT_S)
    if made.returncode:
        return f"network namespaces need root ({made.stderr.strip()}): run the tests as root"
    _ip("netns", "del", name)
    return ""


class Host:
    """One of them. Programs started here see its name, its address and nobody else's loopback."""

    def __init__(self, name: str, space: str, link: str, address: str) -> None:
        self.name, self.space, self.link, self.address = name, space, link, address

    def start(
        self, command: Sequence[str], log: Path, environment: Mapping[str, str] = os.environ, **more: Any
    ) -> "subprocess.Popen[bytes]":
        """Run a program here; its output is appended to `log`. The process is the program's own."""
        named = ["sh", "-c", 'hostname "$0" && exec "$@"', self.name, *command]
        with log.open("ab") as output:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.space, "unshare", "--uts", *named],
                stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=dict(environment), **more,
            )  # fmt: skip

    def run(self, command: Sequence[str], log: Path, timeout: float, **more: Any) -> int:
        """Run a program to its end -> exit code."""
        process = self.start(command, log, **more)
        try:
            return process.wait(timeout)
        finally:
            process.kill()

    def cut(self) -> None:
        """Nothing comes through any more, and nobody is told."""
        _ip("link", "set", self.link, "down")

    def restore(self) -> None:
        _ip("link", "set", self.link, "up")

    def limit(self, rate: str) -> None:
        """Slow down what leaves and what comes, for example "8mbit"."""
        shape = ("root", "tbf", "rate", rate, "burst", "16kb", "latency", "400ms")
        _run("tc", "qdisc", "replace", "dev", self.link, *shape)
        _run("ip", "netns", "exec", self.space, "tc", "qdisc", "replace", "dev", "eth0", *shape)

    def processes(self) -> list[int]:
        """All that run here."""
        return [int(pid) for pid in _ip("netns", "pids", self.space).split()]

    def end(self) -> None:
        """SIGKILL to what runs here, by process id, until nothing does."""
        deadline = time.monotonic() + WAIT_S
        while (left := self.processes()) and time.monotonic() < deadline:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)


@contextlib.contextmanager
def hosts(count: int) -> Iterator[list[Host]]:
    """`count` hosts that know each other by name; ended and removed in the end, also after a failure."""
    tag, net = f"t{os.getpid()}", f"10.{200 + os.getpid() % 50}.{os.getpid() // 50 % 250}"
    bridge = f"{tag}br"
    made = [Host(f"host-{n}", f"{tag}-host-{n}", f"{tag}v{n}", f"{net}.{n + 1}") for n in range(count)]
    try:
        _ip("link", "add", bridge, "type", "bridge")
        _ip("link", "set", bridge, "up")
        table = "127.0.0.1 localhost\n" + "".join(f"{host.address} {host.name}\n" for host in made)
        for host in made:
            _connect(host, bridge, table)
        yield made
    finally:
        for host in made:
            with contextlib.suppress(subprocess.CalledProcessError):
                host.end()
            # at once: with its namespace it would go some time later, and be in the way of the next one of its name
            subprocess.run(["ip", "link", "del", host.link], capture_output=True, timeout=WAIT_S)
            subprocess.run(["ip", "netns", "del", host.space], capture_output=True, timeout=WAIT_S)
            shutil.rmtree(ETC / host.space, ignore_errors=True)
        subprocess.run(["ip", "link", "del", bridge], capture_output=True, timeout=WAIT_S)


def _connect(host: Host, bridge: str, table: str) -> None:
    (ETC / host.space).mkdir(parents=True)
    (ETC / host.space / "hosts").write_text(table)
    _ip("netns", "add", host.space)
    _ip("link", "add", host.link, "type", "veth", "peer", "name", "eth0", "netns", host.space)
    _ip("link", "set", host.link, "master", bridge, "up")
    _ip("-n", host.space, "addr", "add", f"{host.address}/24", "dev", "eth0")
    for device in ("eth0", "lo"):
        _ip("-n", host.space, "link", "set", device, "up")


def _ip(*arguments: str) -> str:
    return _run("ip", *arguments)


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=True).stdout
