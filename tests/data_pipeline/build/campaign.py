"""Seeded kills against a real build over a real web server: every digest must be the undisturbed build's.

    python -m tests.data_pipeline.build.campaign --kills 50 --workers 1 2 4 --seed 7

The victims are processes of the build: a worker that makes or looks at a shard, the actor that fetches, the process
that decodes, or the driver with everything below it, which is then started again by the same command.
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
from pathlib import Path

import numpy as np

from data_pipeline.build.images import encode
from tests.data_pipeline.web import Web

DRIVER = """
import sys
from data_pipeline.build.run import build
from data_pipeline.config import BuildConfig
from data_pipeline.settings import load_settings
build(load_settings(BuildConfig, sys.argv[1], sys.argv[2:]), progress=False)
"""
VICTIMS = {
    "worker": (b"ray::build_shard", b"ray::survey_shard"),
    "fetcher": (b"ray::ShardFetcher",),
    "decoder": (b"data_pipeline.build.sandbox",),
}
REPOSITORY = Path(__file__).resolve().parents[3]


def make_web(folder: Path, web: Web, rows: int) -> Path:
    """`rows` addresses of 40 photographs and of what goes wrong, and the configuration that builds them."""
    random_state = np.random.default_rng(0)
    for number in range(40):
        coarse = random_state.integers(0, 256, (12, 16, 3), dtype=np.uint8).repeat(40, 0).repeat(40, 1)
        (web.folder / f"{number}.jpg").write_bytes(encode(coarse, "jpeg", 85 + number % 10))
    (web.folder / "page.jpg").write_bytes(b"<html>")
    ways = {11: "/file/gone.jpg", 17: "/file/page.jpg", 23: "/cut/1.jpg", 31: "/status/503/x"}
    lines = []
    for row in range(rows):
        path = next((way for every, way in ways.items() if row % every == every - 1), f"/file/{row % 40}.jpg")
        lines.append(json.dumps({"image": web.address + path, "caption": f"picture {row}"}))
    (folder / "rows.jsonl").write_text("\n".join(lines))
    tree = {
        "source": {"kind": "jsonl", "path": f"{folder}/rows.jsonl"},
        "output": "set by the command",
        "shard_size": 25,
        "images": {"mode": "center_crop", "size": 64, "format": "jpeg"},
        "fetch": {"allow_networks": ["127.0.0.0/8"], "timeout_s": 10, "attempts": 2},
    }
    (folder / "build.yaml").write_text(json.dumps(tree))
    return folder / "build.yaml"


def start(config: Path, output: str, workers: int) -> "subprocess.Popen[bytes]":
    """The driver of a build, leader of a process group."""
    command = [sys.executable, "-c", DRIVER, str(config), f"output={output}", f"workers={workers}"]
    with (config.parent / "driver.log").open("ab") as log:
        return subprocess.Popen(command, cwd=REPOSITORY, start_new_session=True, stdout=log, stderr=log)


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


def kill_one(driver: "subprocess.Popen[bytes]", kind: str, chance: random.Random) -> bool:
    """SIGKILL one process of the kind, or the driver's all -> was there one?"""
    processes = below(driver.pid)
    working = [pid for pid in processes if any(name in command_of(pid) for name in VICTIMS["worker"])]
    if kind == "driver" and working:
        os.killpg(driver.pid, signal.SIGKILL)
        driver.wait(timeout=30)
        for pid in processes:  # Ray's own, in groups of their own
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return True
    names = VICTIMS.get(kind, ())
    found = sorted(pid for pid in processes if any(name in command_of(pid) for name in names))
    if not found:
        return False
    with contextlib.suppress(ProcessLookupError):
        os.kill(chance.choice(found), signal.SIGKILL)
    return True


def disturbed(config: Path, output: str, workers: int, kills: int, chance: random.Random) -> Counter[str]:
    """One build that loses `kills` processes, or as many as fit, and is finished -> how many of each kind."""
    done: Counter[str] = Counter()
    driver = start(config, output, workers)
    deadline = time.monotonic() + 280
    while driver.poll() is None:
        time.sleep(chance.uniform(0.1, 1.5))
        assert time.monotonic() < deadline, "the build hangs"
        kind = chance.choices(["worker", "fetcher", "decoder", "driver"], [4, 2, 3, 1])[0]
        if done.total() < kills and below(driver.pid) and kill_one(driver, kind, chance):
            done[kind] += 1
            if kind == "driver":
                driver = start(config, output, workers)
    assert driver.returncode == 0, (config.parent / "driver.log").read_text()[-3000:]
    return done


def digests(output: str) -> dict[str, str]:
    """Every object of the dataset by its sha256."""
    from data_pipeline.storage import open_storage

    storage = open_storage(output)
    return {name: hashlib.sha256(storage.get(name)).hexdigest() for name in storage.list()}


def run(folder: Path, kills: int, workers: list[int], seed: int, rows: int, each: int, where: str) -> Counter[str]:
    """Builds with each number of workers in turn until `kills` processes are dead -> how many of each kind."""
    chance, total, builds = random.Random(seed), Counter[str](), 0
    (folder / "files").mkdir()
    with Web(folder / "files") as web:
        config = make_web(folder, web, rows)
        assert start(config, f"{where}/undisturbed", workers[0]).wait(timeout=280) == 0
        expected = digests(f"{where}/undisturbed")
        while total.total() < kills:
            output, count = f"{where}/build{builds}", workers[builds % len(workers)]
            total += disturbed(config, output, count, min(each, kills - total.total()), chance)
            found = digests(output)
            assert found == expected, sorted(
                name for name in {*found, *expected} if found.get(name) != expected.get(name)
            )
            builds += 1
            print(f"build {builds}: {count} workers, identical; killed so far {dict(total)}", flush=True)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--rows", type=int, default=1500)
    parser.add_argument("--each", type=int, default=8, help="kills of one build")
    parser.add_argument("--output", help="s3:// prefix; a folder of its own unless given")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        arguments = (options.kills, options.workers, options.seed, options.rows, options.each)
        print(dict(run(Path(name), *arguments, options.output or name)))


if __name__ == "__main__":
    main()
