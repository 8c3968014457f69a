"""What the commit of a checkpoint costs rank 0 as ranks grow: their reports, the index, the manifest, reading it back.

    python tests/benchmarks/bench_checkpoint.py

10, 100 and 1,000 simulated ranks with 300 parameters each, whose files are taken to be written.
"""

import json
import os
import tempfile
import time
from pathlib import Path

import torch

from pretrain.checkpoint.catalog import Retention, Saved
from pretrain.checkpoint.layout import Slices
from pretrain.checkpoint.saver import Checkpoints, Save
from pretrain.mesh import Mesh, Place

PARAMETERS = 300
SIDE = 768


def commits(folder: Path, world: int) -> dict[str, float]:
    """Rank 0's part of a commit of `world` ranks: seconds, index MiB, seconds to read it."""
    store = torch.distributed.HashStore()
    mesh = Mesh(Place(0, 0, world, "", 0), torch.device("cpu"), store)
    names = [f"model.encoder.blocks.{i}.attention.qkv.weight" for i in range(PARAMETERS)]
    part = -(-(SIDE * SIDE) // world)
    save = Save(Checkpoints(folder / str(world), mesh, 0, Retention(1)), 1, 1, None, {"step": 1}, 0.0)
    for rank in range(world):
        slices = [
            [name, [SIDE, SIDE], rank * part, (rank + 1) * part, i * part * 12, 3] for i, name in enumerate(names)
        ]
        entry = {"name": f"r{rank:05d}.safetensors", "bytes": 0, "sha256": "0" * 64, "slices": slices, "buffers": {}}
        store.set(f"{save.key}/{rank}", json.dumps({"result": [entry]}))
    began = time.monotonic()
    save._commit(store)
    seconds, saved = time.monotonic() - began, Saved(save.folder)
    began = time.monotonic()
    Slices(saved.folder)
    size = (Path(saved.folder) / "index.json").stat().st_size
    return {"commit_s": seconds, "index_mib": size / 2**20, "read_s": time.monotonic() - began}


def main() -> None:
    """Print a line for each number of ranks."""
    with tempfile.TemporaryDirectory() as folder:
        for world in (10, 100, 1000):
            cost = commits(Path(folder), world)
            print(
                f"{world:>4} ranks: commit {cost['commit_s']:.3f} s, index {cost['index_mib']:.2f} MiB, "
                f"read in {cost['read_s']:.3f} s; load {os.getloadavg()[0]:.1f}"
            )


if __name__ == "__main__":
    main()
