"""What a checkpoint of other ranks costs in memory while it is read: the highest resident set during the restore, over
that before it.

    python tests/benchmarks/bench_reshard.py

A GPT of 100M parameters under ZeRO-3, saved by one number of processes and read by another. The engine, with its
masters and moments, is there before: what comes on top is the buffers through which the bytes go, and gathering the
working copies.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from pretrain.checkpoint.catalog import Retention  # noqa: E402
from pretrain.checkpoint.restore import restore  # noqa: E402
from pretrain.checkpoint.saver import Checkpoints  # noqa: E402
from pretrain.runtime.mesh import Mesh  # noqa: E402
from tests.benchmarks.bench_save import engine_of  # noqa: E402
from tests.pretrain import processes  # noqa: E402

WIDTH = 832  # of 12 layers: 100M parameters
WAYS = ((2, 1), (2, 2), (2, 4), (1, 4))


def resident(field: str) -> float:
    """MB of VmRSS, or of its highest value since it was last reset, VmHWM."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1000


def rank_main(folder: str, mode: str) -> None:
    """One process: save, or read what others saved."""
    torch.set_num_threads(1)
    mesh = Mesh.start(300)
    engine, parameters = engine_of(mesh, WIDTH)
    checkpoints = Checkpoints(folder, mesh, 0, Retention(1))
    shard = sum(view.nbytes for owned in engine.owned() for view in owned.tensors.values()) / 1e6
    told = {"parameters": parameters, "shard_mb": shard}
    if mode == "save":
        checkpoints.save(engine, 1, {"step": 1, "optimizer": engine.scalars()})
        checkpoints.finish()
    else:
        saved = checkpoints.newest()
        assert saved is not None
        Path("/proc/self/clear_refs").write_text("5")  # from here on VmHWM counts anew
        before, began = resident("VmRSS"), time.monotonic()
        restore(saved, engine)
        told |= {"before_mb": before, "more_mb": resident("VmHWM") - before, "seconds": time.monotonic() - began}
    mesh.sum(torch.zeros(1))
    mesh.stop()
    print(json.dumps(told))


def main() -> None:
    """Print a line for each way."""
    processes.TIMEOUT_S = 1800
    with tempfile.TemporaryDirectory() as folder:
        saved = 0
        for before, after in WAYS:
            if before != saved:
                processes.run_ranks(Path(__file__), ["rank", f"{folder}/{before}", "save"], before)
                saved = before
            ranks = processes.run_ranks(Path(__file__), ["rank", f"{folder}/{before}", "load"], after)
            most = max(ranks, key=lambda rank: rank["more_mb"])
            print(
                f"{before} -> {after} processes, {most['parameters']:,} parameters: a rank keeps "
                f"{most['shard_mb']:.0f} MB, had {most['before_mb']:.0f} MB resident, at most "
                f"{most['more_mb']:.0f} MB more during the restore, {most['seconds']:.2f} s",
                flush=True,
            )


if __name__ == "__main__":
    rank_main(*sys.argv[2:]) if sys.argv[1:2] == ["rank"] else main()
