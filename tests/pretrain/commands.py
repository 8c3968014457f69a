"""The public command line in processes of its own, over small data: what the tests of whole runs share."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.families import FAMILIES
from tests.families import Material as Material
from tests.pretrain.processes import ROOT

TIMEOUT_S = 500
TRACEBACK = "Traceback (most recent call last)"


electra, vqgan, clip = (FAMILIES[name].run for name in ("electra", "vqgan", "clip"))


def recipe(tree: dict[str, Any], path: Path) -> Path:
    """Write the run description (JSON is YAML)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tree, indent=1), encoding="utf-8")
    return path


# ---------------------------------------------------------------------------------------------- processes


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "launchers.cli", *map(str, arguments)]


def environment(**extra: str) -> dict[str, str]:
    path = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path} | extra


def finish(argv: list[str], **extra: str) -> "subprocess.CompletedProcess[str]":
    """Run to the end; stderr goes with stdout."""
    return subprocess.run(
        argv, env=environment(**extra), cwd=ROOT, text=True, timeout=TIMEOUT_S,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def tessera(*arguments: str | Path, **extra: str) -> "subprocess.CompletedProcess[str]":
    return finish(command(*arguments), **extra)


def two_ranks(config: Path, *overrides: str) -> list[str]:
    return command("launch", "local", config, "--procs-per-node", "2", *overrides)


def held(run: Path, step: int, go_on: Path) -> dict[str, str]:
    """Variables of processes that are to stand still at `step`, its row written, what was saved before it committed.

    They go on when the file `go_on` is there, or when one of them is asked to stop. However long whoever strikes is
    kept from it, the run has not ended by then.
    """
    told = {"run": str(run.resolve()), "step": step, "go_on": str(go_on)}
    path = f"{ROOT / 'tests' / 'pretrain' / 'held'}{os.pathsep}{environment()['PYTHONPATH']}"
    return {"TESSERA_TEST_HELD": json.dumps(told), "PYTHONPATH": path}


def interrupted(
    argv: list[str], run: Path, step: int, strike: Callable[[int], None], hold: bool = True
) -> tuple[int, str]:
    """Start a launcher, call `strike(its pid)` once metrics.jsonl holds `step` -> exit code and output.

    hold: the run stands still from then on until the blow fell, or, after `ask_to_stop`, until it is heard.
    """
    log, go_on = run.with_suffix(".log"), run.with_suffix(f".go-on-{step}")
    told = environment(**held(run, step, go_on)) if hold else environment()
    with log.open("w") as output:
        launcher = subprocess.Popen(argv, env=told, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + TIMEOUT_S
        try:
            while launcher.poll() is None and max(steps_of(run), default=0) < step:
                assert time.monotonic() < deadline, log.read_text()[-3000:]
                time.sleep(0.005)
            strike(launcher.pid)
            if strike is not ask_to_stop:
                go_on.touch()
            code = launcher.wait(TIMEOUT_S)
        finally:
            launcher.kill()
    return code, log.read_text()


def ask_to_stop(launcher: int) -> None:
    """SIGTERM to the launcher, which asks its processes for a save."""
    os.kill(launcher, signal.SIGTERM)


def kill_rank_1(launcher: int) -> None:
    """SIGKILL to the process that the launcher started as rank 1."""
    os.kill(child_of_rank(launcher, 1), signal.SIGKILL)


def child_of_rank(launcher: int, rank: int) -> int:
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            variables = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if parent == launcher and f"RANK={rank}".encode() in variables:
            return int(folder.name)
    raise AssertionError(f"process {launcher} has no child of rank {rank}")


# ---------------------------------------------------------------------------------------- what a run wrote


def rows_of(run: Path) -> list[dict[str, Any]]:
    """The complete lines of metrics.jsonl."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def steps_of(run: Path) -> dict[int, dict[str, Any]]:
    """The last row of each step."""
    return {row["step"]: row for row in rows_of(run)}


def loss_bits(run: Path) -> dict[int, str]:
    return {step: row["loss_hex"] for step, row in steps_of(run).items()}
