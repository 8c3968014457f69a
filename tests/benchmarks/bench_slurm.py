"""What `tessera launch slurm` adds to a batch script of four lines, and how long a stop and a requeue take.

python -m tests.benchmarks.bench_slurm [ROUNDS]  a Slurm of two nodes on this machine, alternating rounds

Both train the same tiny ELECTRA on two nodes. Submit to first step: from the start of `tessera launch slurm` or
`sbatch` to the end of step 1. Stop to saved: from scancel --signal=USR1 to the manifest. Saved to first step: from
there, through the queue, to the end of the next attempt's first step, with Slurm's own wait (cred_expire, 5 s here).
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.launchers.site import Site, running_site, wait_until
from tests.pretrain.commands import Material, command, electra, recipe, rows_of

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT.parent / "shared" / "components" / "slurm"
PLACE: dict[str, Any] = {
    "kind": "slurm", "nodes": 2, "cpus_per_proc": 1, "memory": "100", "time_limit": "30", "signal_lead_s": 100,
    "master_addr": "node_addr", "python": sys.executable, "env": {"GLOO_SOCKET_IFNAME": "lo"},
}  # fmt: skip
PLAIN = """#!/bin/bash
#SBATCH --nodes=2 --ntasks-per-node=1 --cpus-per-task=1 --mem=100 --time=30 --requeue --open-mode=append
#SBATCH --output={output}
export MASTER_ADDR=127.0.0.1 MASTER_PORT=$((20000 + SLURM_JOB_ID % 12000)) OMP_NUM_THREADS=1 GLOO_SOCKET_IFNAME=lo
srun {python} -m launchers.cli train {config} || scontrol requeue $SLURM_JOB_ID
"""


def material(folder: Path) -> Material:
    """200 scenes and a vocabulary over their captions."""
    scenes = {"source": {"kind": "scenes", "count": 200}, "output": str(folder / "scenes"), "shard_size": 50}
    words = {"dataset": str(folder / "scenes"), "output": str(folder / "vocab"), "size": 200, "kind": "bpe"}
    words["character_coverage"] = 1.0
    eager = os.environ | {"RAY_worker_niceness": "0"}  # on a busy machine Ray's default of 15 waits for ever
    quiet = {"check": True, "cwd": ROOT, "stdout": subprocess.DEVNULL, "timeout": 300, "env": eager}
    subprocess.run(command("data", "build", recipe(scenes, folder / "scenes.yaml"), "--json"), **quiet)  # type: ignore[call-overload]
    subprocess.run(command("vocab", "train", recipe(words, folder / "vocab.yaml")), **quiet)  # type: ignore[call-overload]
    return Material(folder / "scenes", folder / "vocab" / "vocab.model")


def submit_ours(config: Path, folder: Path) -> str:
    place = recipe(PLACE | {"output": f"{folder}/%j.out"}, folder / "place.yaml")
    argv = command("launch", "slurm", config, "--cluster", place, "--json")
    return str(json.loads(subprocess.check_output(argv, cwd=ROOT, timeout=300))["job"])


def submit_plain(config: Path, folder: Path) -> str:
    script = folder / "plain.sbatch"
    script.write_text(PLAIN.format(output=f"{folder}/%j.out", python=sys.executable, config=config))
    return subprocess.check_output(["sbatch", "--parsable", script], cwd=ROOT, text=True, timeout=300).strip()


def one_round(site: Site, pairs: Material, folder: Path, submit: Callable[[Path, Path], str]) -> dict[str, float]:
    """Submit, first step, preemption, save, first step again, end -> seconds."""
    folder.mkdir()
    run = folder / "run"
    config = recipe(electra(pairs, run, steps=100_000, checkpoint_every_steps=10_000), folder / "run.yaml")
    began = time.time()
    job = submit(config, folder)
    submitted = time.time()
    first = first_step(run, 0)
    asked = time.time()
    site.tool("scancel", "--signal=USR1", job)
    manifests = (run / "checkpoints").glob
    wait_until(lambda: list(manifests("*/MANIFEST.json")), "no checkpoint")
    saved = next(manifests("*/MANIFEST.json")).stat().st_mtime
    again = first_step(run, 1)
    site.tool("scancel", job)
    wait_until(lambda: site.job(job)["JobState"] == "CANCELLED", "not cancelled")
    return {
        "submit": submitted - began,
        "submit_to_first_step": first - began,
        "stop_to_saved": saved - asked,
        "saved_to_first_step": again - saved,
    }


def first_step(run: Path, attempt: int) -> float:
    """When the attempt's first step ended."""

    def rows() -> list[dict[str, Any]]:
        return [row for row in rows_of(run) if row["attempt"] == attempt]

    return float(wait_until(rows, f"attempt {attempt} makes no step", 400)[0]["time_ms"]) / 1000


def main(rounds: int) -> None:
    """Alternate, print medians and ranges."""
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory(prefix="bench-slurm-") as name:
        folder = Path(name)
        (folder / "site").mkdir()
        pairs = material(folder)
        ways = {"tessera launch slurm": submit_ours, "plain sbatch and srun": submit_plain}
        times: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
        with running_site(SCRIPTS, folder / "site", nodes=2, accounting=False) as site:
            for number in range(rounds):
                for way, submit in ways.items():
                    times[way].append(one_round(site, pairs, folder / f"{number}-{way.split()[0]}", submit))
        for figure in times["tessera launch slurm"][0]:
            for way, rows in times.items():
                values = sorted(row[figure] for row in rows)
                print(f"{figure:22} {way:22} {statistics.median(values):6.2f} s  ({values[0]:.2f} to {values[-1]:.2f})")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
