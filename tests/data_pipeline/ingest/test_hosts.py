"""A build on a Ray of two hosts: the head works on nothing, so what is made was made on the other one."""

import contextlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.data_pipeline.ingest.campaign import REPOSITORY
from tests.hosts import Host, hosts, why_not

pytestmark = [pytest.mark.real, pytest.mark.slow]
RAY = str(Path(sys.executable).with_name("ray"))
PORT = 6379
START_S = 150
SCENES = {"source": {"kind": "scenes", "count": 120}, "shard_size": 30}
LOOK = f"import socket; socket.create_connection(('host-0', {PORT}), 2)"
NODES = f"import ray; ray.init('host-0:{PORT}'); raise SystemExit(sum(node['Alive'] for node in ray.nodes()) != 2)"


@pytest.fixture
def home() -> Iterator[Path]:
    """A user's folder with Ray's token in it, short: names of sockets below may have 107 characters."""
    folder = Path(tempfile.mkdtemp(prefix="tr"))
    (folder / ".ray").mkdir()
    (folder / ".ray/auth_token").write_text("0123456789abcdef" * 4)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def ray_of_two(home: Path, log: Path) -> Iterator[list[Host]]:
    """Head and worker. Without RAY_AUTH_MODE the head would ask for the token, and the worker not send it."""
    if reason := why_not():
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)
    small = ["--object-store-memory", str(80 * 1024**2), "--disable-usage-stats", "--block"]
    user = elsewhere() | {"HOME": str(home), "RAY_AUTH_MODE": "token", "RAY_worker_niceness": "0"}
    with hosts(2) as (first, second):
        head = [
            "--head",
            "--port",
            str(PORT),
            "--num-cpus",
            "0",
            "--include-dashboard",
            "false",
            "--temp-dir",
            f"{home}/r",
        ]
        first.start([RAY, "start", *head, "--node-ip-address", first.address, *small], log, user)
        reach(first, LOOK, log, user)
        join = ["--address", f"host-0:{PORT}", "--num-cpus", "2", "--node-ip-address", second.address]
        second.start([RAY, "start", *join, *small], log, user)
        reach(first, NODES, log, user)
        yield [first, second]


def elsewhere() -> dict[str, str]:
    """The environment of another machine: nothing of what tests told Ray on this one."""
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}


def reach(host: Host, program: str, log: Path, user: dict[str, str]) -> None:
    """Until the program ends well on the host."""
    end = time.monotonic() + START_S
    while host.run([sys.executable, "-c", program], log, START_S, environment=user):
        assert time.monotonic() < end, log.read_text()[-4000:]


def test_a_build_on_a_ray_of_two_hosts_is_the_local_one(home, build_here, tmp_path, tree_digests):
    log = tmp_path / "log"
    tree = [f"output={tmp_path}/out", f"ray_address=host-0:{PORT}", "workers=2"]
    (tmp_path / "build.yaml").write_text("source: {kind: scenes, count: 120}\nshard_size: 30\noutput: unset\n")
    argv = [sys.executable, "-m", "launchers.cli", "data", "build", str(tmp_path / "build.yaml"), *tree]
    user = elsewhere() | {"HOME": str(home)}
    with ray_of_two(home, log) as (first, second):
        code = first.run(argv, log, START_S, environment=user, cwd=REPOSITORY)
        assert code == 0, log.read_text()[-4000:]
        there = {Path(f"/proc/{pid}/cmdline").read_bytes() for pid in second.processes()}
        assert any(b"raylet" in command for command in there)
    build_here(**SCENES, output=f"{tmp_path}/whole")
    assert tree_digests(tmp_path / "out") == tree_digests(tmp_path / "whole")
