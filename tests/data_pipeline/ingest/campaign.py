"""Seeded kills against real builds from a real web server: every file must be the undisturbed build's, byte for byte.

    python -m tests.data_pipeline.ingest.campaign --kills 50 --workers 1 2 4 --seed 7 [--gateway]

The victims are what builds: a worker that makes or looks at a shard, the actor that fetches, the process that decodes,
the driver with everything below it, or a node (Ray's raylet and all that runs under it). Every second build joins a
cluster of two nodes and a head, where a node that is lost is replaced; in the others Ray is embedded, and the driver
ends with its only node. A driver that ended is started again by the same command.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.errors import NodeFault
from data_pipeline.images import encode
from data_pipeline.remote import S3Storage
from data_pipeline.storage import open_storage
from tests.data_pipeline.ingest.cluster import Nodes, below, command_of, kill, nodes
from tests.data_pipeline.web import Web
from tests.gateway import CREDENTIALS, start_gateway

VICTIMS = {
    "worker": (b"ray::build_shard", b"ray::survey_shard"),
    "fetcher": (b"ray::ShardFetcher",),
    "decoder": (b"data_pipeline.sandbox",),
}
WEIGHTS = {"worker": 4, "fetcher": 2, "decoder": 3, "driver": 2, "node": 2}
BUILD_S = 1200  # far beyond what a build takes on a busy machine, too
REPOSITORY = Path(__file__).resolve().parents[3]
HEALTH = {"RAY_health_check_period_ms": "1000", "RAY_health_check_failure_threshold": "3"}  # soon noticed
HEALTH |= {"RAY_worker_niceness": "0"}  # in the cluster too: beside other work they would starve


def make_web(folder: Path, web: Web, rows: int) -> Path:
    """`rows` addresses, of photographs (each of them twice) and of what goes wrong, and how they are built."""
    random_state = np.random.default_rng(0)
    for number in range(rows // 2):
        coarse = random_state.integers(0, 256, (12, 16, 3), dtype=np.uint8).repeat(10, 0).repeat(10, 1)
        (web.folder / f"{number}.jpg").write_bytes(encode(coarse, "jpeg", 85 + number % 10))
    (web.folder / "page.jpg").write_bytes(b"<html>")
    ways = {11: "/file/gone.jpg", 17: "/file/page.jpg", 23: "/cut/1.jpg", 31: "/status/503/x"}
    lines = []
    for row in range(rows):
        path = next((way for every, way in ways.items() if row % every == every - 1), f"/file/{row // 2}.jpg")
        lines.append(json.dumps({"image": web.address + path, "caption": f"picture {row}"}))
    (folder / "rows.jsonl").write_text("\n".join(lines))
    tree = {
        "source": {"kind": "jsonl", "path": f"{folder}/rows.jsonl"},
        "output": "set by the command",
        "shard_size": 20,
        "images": {"mode": "center_crop", "size": 64, "format": "jpeg"},
        "fetch": {"allow_networks": ["127.0.0.0/8"], "timeout_s": 20, "attempts": 2},
        "dedup": {"exact": True},
    }
    (folder / "build.yaml").write_text(json.dumps(tree))
    return folder / "build.yaml"


# ------------------------------------------------------------------------------------------- one build


@dataclass
class Build:
    """A build in progress. cluster: the Ray that it joins, None where it has its own."""

    config: Path
    output: str
    workers: int
    cluster: Nodes | None = None

    def start(self) -> None:
        """The driver, leader of a process group."""
        settings = [f"output={self.output}", f"workers={self.workers}"]
        settings += [f"ray_address={self.cluster.address}"] if self.cluster else []
        with (self.config.parent / "driver.log").open("ab") as log:
            command = [sys.executable, "-m", "launchers.cli", "data", "build", str(self.config), *settings, "--json"]
            self.driver = subprocess.Popen(command, cwd=REPOSITORY, start_new_session=True, stdout=log, stderr=log)

    def wait(self) -> None:
        """Until it is done. Raises AssertionError where it fails."""
        assert self.driver.wait(timeout=BUILD_S) == 0, self._said()

    def is_running(self) -> bool:
        """False once the build is done; a driver that ended with its node is started again.

        Ray gives up a node that does not start or answer in time: on a starving machine a driver may end so unkilled.
        """
        ended = self.driver.poll()
        if ended == NodeFault.exit_code and (self._lost_its_node or self.given_up < 3):
            self.given_up += not self._lost_its_node
            self._lost_its_node = False
            self.start()
            return True
        assert ended in (None, 0), self._said()
        return ended is None

    given_up = 0
    _lost_its_node = False

    def processes(self) -> list[int]:
        """Everything that works for this build."""
        nodes = [self.cluster.processes(number) for number in range(self.cluster.count)] if self.cluster else []
        return below(self.driver.pid) + [pid for node in nodes for pid in node]

    def kill_one(self, kind: str, chance: random.Random) -> bool:
        """SIGKILL a victim of the kind -> was there one?"""
        processes = self.processes()
        if not any(_is(pid, "worker") for pid in processes):
            return False
        if kind in ("driver", "node"):
            self._kill_driver() if kind == "driver" else self._kill_node(chance)
            return True
        found = sorted(pid for pid in processes if _is(pid, kind))
        kill([chance.choice(found)] if found else [])
        return bool(found)

    def _kill_driver(self) -> None:
        own = below(self.driver.pid)  # Ray's, in groups of their own
        os.killpg(self.driver.pid, signal.SIGKILL)
        self.driver.wait(timeout=30)
        kill(own)
        self.start()

    def _kill_node(self, chance: random.Random) -> None:
        if self.cluster is not None:
            number = chance.randrange(self.cluster.count)
            self.cluster.lose(number)
            time.sleep(chance.uniform(0, 3))
            self.cluster.replace(number)
            return
        raylets = [pid for pid in below(self.driver.pid) if command_of(pid).split(b"\0")[0].endswith(b"/raylet")]
        kill(raylets + [pid for raylet in raylets for pid in below(raylet)])
        self._lost_its_node = bool(raylets)

    def _said(self) -> str:
        return f"left with {self.driver.returncode}\n" + (self.config.parent / "driver.log").read_text()[-3000:]


def _is(pid: int, kind: str) -> bool:
    return any(name in command_of(pid) for name in VICTIMS[kind])


def disturbed(build: Build, kills: int, chance: random.Random) -> Counter[str]:
    """The build loses `kills` victims, or as many as fit, and is finished -> how many of each kind."""
    done: Counter[str] = Counter()
    build.start()
    deadline = time.monotonic() + BUILD_S
    while build.is_running():
        time.sleep(chance.uniform(0.1, 1.5))
        assert time.monotonic() < deadline, f"the build hangs: {sorted(open_storage(build.output).list())}"
        (kind,) = chance.choices(list(WEIGHTS), list(WEIGHTS.values()))
        if done.total() < kills and build.driver.poll() is None and build.kill_one(kind, chance):
            done[kind] += 1
    return done


def digests(output: str) -> dict[str, str]:
    """Everything below the dataset, hidden or not, by its sha256."""
    storage = open_storage(output)
    if isinstance(storage, S3Storage):
        names = storage.names_below()
    else:
        names = [str(path.relative_to(output)) for path in Path(output).rglob("*") if path.is_file()]
    return {name: hashlib.sha256(storage.get(name)).hexdigest() for name in names}


# ---------------------------------------------------------------------------------------------- campaign


def run(folder: Path, kills: int, workers: list[int], seed: int, rows: int, each: int, where: str) -> Counter[str]:
    """Builds with each number of workers in turn until `kills` victims are dead -> how many of each kind."""
    chance, total, builds = random.Random(seed), Counter[str](), 0
    (folder / "files").mkdir()
    with Web(folder / "files") as web, nodes(2, 2) as cluster:
        config = make_web(folder, web, rows)
        whole = Build(config, f"{folder}/undisturbed", workers[0])
        whole.start()
        whole.wait()
        expected = digests(whole.output)
        while total.total() < kills:
            joined = cluster if builds % 2 else None
            build = Build(config, f"{where}/build{builds}", workers[builds % len(workers)], joined)
            began = time.monotonic()
            total += disturbed(build, min(each, kills - total.total()), chance)
            found = digests(build.output)
            differ = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
            assert not differ, f"{build.output}: not those of the undisturbed build: {differ}"
            builds += 1
            ray = "joined" if joined else "embedded"
            took = f"{build.workers} workers, {ray} Ray, {time.monotonic() - began:.0f} s"
            starved = f", given up by Ray without a kill {build.given_up} times" if build.given_up else ""
            print(f"build {builds}: {took}{starved}, identical; killed so far {dict(total)}", flush=True)
    return total


@contextlib.contextmanager
def gateway_bucket(folder: Path) -> Iterator[str]:
    """The address of a bucket of a gateway of our own, with its credentials in the environment."""
    gateway = start_gateway(folder)
    os.environ.update({**CREDENTIALS, "AWS_ENDPOINT_URL": gateway.endpoint})
    try:
        yield f"s3://{gateway.make_bucket()}"
    finally:
        gateway.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--rows", type=int, default=600)
    parser.add_argument("--each", type=int, default=6, help="kills of one build")
    parser.add_argument("--gateway", action="store_true", help="build onto a Ceph gateway of our own")
    options = parser.parse_args()
    os.environ.update(HEALTH)
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        where = stack.enter_context(gateway_bucket(Path(name) / "ceph")) if options.gateway else name
        total = run(Path(name), options.kills, options.workers, options.seed, options.rows, options.each, where)
        print(f"{total.total()} kills, every file as in the undisturbed build: {dict(total)}")


if __name__ == "__main__":
    main()
