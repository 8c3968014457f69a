"""What grows with the number of ranks, without the ranks: time and memory of each step at 1,024 and 16,384 of them.

python -m tests.benchmarks.bench_scale [--ranks 1024,16384] [--parameters 300]

One process plays all ranks, one after another, so a step's time is that of rank 0 (or of the rank named), not of the
run. Checkpoints are real files of a tiny model; the index is that of one with `--parameters` tensors. The model's
collectives (and the full mesh of connections that gloo makes) are the transport's own and not here.
"""

import argparse
import contextlib
import json
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from data_pipeline.settings import load_settings
from data_pipeline.storage import open_storage
from data_pipeline.stream.order import lanes_of, order, share
from launchers import findings, slurm
from launchers.kubernetes import submit as kubernetes
from launchers.plan.clusters import cluster_of
from launchers.plan.make import advise, as_json, make_plan
from launchers.spec import KubernetesCluster, RunSpec, SlurmCluster
from pretrain.checkpoint.catalog import MANIFEST, Retention, Saved, committed, folder_name
from pretrain.checkpoint.layout import Even, RankShard, Share, Slices, even_part, index_of, told_of, write_shard
from pretrain.checkpoint.saver import Checkpoints, Save, _gather
from pretrain.config import RunConfig
from pretrain.runtime.mesh import Mesh, RankPlace, _meet, read_all
from pretrain.runtime.watchdog import Sign, judge

KINDS = ("param", "exp_avg", "exp_avg_sq")
GPUS = 8
SAMPLES = 4
TENSORS = {"embedding": 200_003, "weight": 70_001, "bias": 301}
OTHER_WORLD = 1024
CONFIG = Path(__file__).parents[2] / "configs/clip/vit-b-32.yaml"
Step = tuple[str, Callable[[], Any]]


def mesh_of(rank: int, world: int, store: Any) -> Mesh:
    return Mesh(RankPlace(rank, rank % GPUS, world, "127.0.0.1", 0), torch.device("cpu"), store)


def spec(world: int) -> RunSpec:
    return RunSpec("big", "train", ("train", str(CONFIG)), "0" * 16, "runs/big", world // GPUS, GPUS, ())


def shard(rank: int, world: int) -> RankShard:
    """What a rank keeps of TENSORS in an even split."""
    parts = {name: even_part(size, rank, world) for name, size in TENSORS.items()}
    shares = [
        Share(name, (TENSORS[name],), lo, hi, {kind: torch.full((hi - lo,), float(rank)) for kind in KINDS})
        for name, (lo, hi) in parts.items()
        if lo < hi
    ]
    return RankShard(rank, f"r{rank:05d}.safetensors", shares, {})


class Simulated:
    """A run of `world` ranks: a real store, a real folder, and one process in the place of them all."""

    def __init__(self, world: int, parameters: int, folder: Path) -> None:
        self.world, self.parameters, self.folder = world, parameters, folder
        self.server = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
        self.store = dist.PrefixStore("tessera", self.server)
        self.meshes = mesh_of(0, world, self.store), mesh_of(world - 1, world, self.store)
        self.checkpoints = Checkpoints(folder, self.meshes[0], 0, Retention(2))
        self.reports: list[list[dict[str, Any]]] = []
        self.split = Even([1 << 20] * parameters, [3] * parameters, [f"r{r:05d}" for r in range(world)], [4096] * world)

    def steps(self) -> Iterator[Step]:
        """In the order in which a run makes them."""
        yield f"tessera plan, {SAMPLES} samples a rank", self.plan_run
        yield "render a Slurm job", lambda: slurm.render(spec(self.world), SlurmCluster(gpus_per_node=GPUS))
        yield "render a JobSet", lambda: kubernetes.render(spec(self.world), KubernetesCluster(image="a/b:1"))
        yield "join: rank 0 hears of all", self.join_first
        yield "join: the last rank", lambda: _meet(self.store, self.meshes[1].place, 10)
        yield "preflight: rank 0 gathers and judges", self.preflight
        yield f"a rank's share of a step, {SAMPLES} samples a rank", self.share
        yield "watchdog: one look of rank 0", self.watch
        yield "save: all files (tiny ones), by one process", self.write
        yield "save: rank 0 hears all reports", self.hear
        yield "save: rank 0 makes index, manifest, commit", self.commit
        yield "  index of many parameters, even split", self.index
        yield "load: list, choose", lambda: committed(self.folder)
        yield "load: a rank reads the manifest, checks its file", self.verify
        yield "load: rank 0 hears that all are whole", self.hear_whole
        yield "load: a rank opens the index", lambda: Slices(self.saved.folder)
        yield f"load: a rank of {OTHER_WORLD} plans what to read", self.plan
        yield f"load: a rank of {OTHER_WORLD} reads (tiny tensors)", self.read
        yield "gc: remove one checkpoint", lambda: self.saved.storage.remove_all()

    @property
    def saved(self) -> Saved:
        return Saved(f"{self.folder}/{folder_name(1, 0)}")

    def plan_run(self) -> None:
        config = load_settings(RunConfig, CONFIG, [f"train.global_batch={SAMPLES * self.world}"])
        cluster = cluster_of("h100", self.world // GPUS, GPUS, None)
        told = as_json(make_plan(config, cluster), advise(config, cluster))
        assert told["memory_bytes"]["used"] > 0 and told["step_s"]["usual"] > 0

    def join_first(self) -> None:
        for rank in range(1, self.world):
            self.store.set(f"here/{rank}", "")
        _meet(self.store, self.meshes[0].place, 10)

    def preflight(self) -> None:
        checks = {name: {"seconds": 0.1, "gb_s": 40.0} for name in ("matmul", *findings.COLLECTIVES, "link")}
        values = checks | {"program": {name: "1.2.3" for name in "abcdefgh"}, "clock": {"offset_s": 0.01}}
        text = json.dumps({"host": "node", "values": values, "errors": {}})
        keys = [f"report/{rank}" for rank in range(self.world)]
        for key in keys:
            self.store.set(key, text)
        self.store.wait(keys, timedelta(seconds=30))
        reports = {rank: json.loads(word) for rank, word in enumerate(read_all(self.store, keys))}
        assert findings.judge(reports, self.world) == []

    def share(self) -> None:
        positions = np.arange(10**9, 10**9 + SAMPLES * self.world, dtype=np.int64)
        mine = share(positions, lanes_of(positions, 10**9), (self.world - 1, self.world))
        order(mine, 10**9, 0)

    def watch(self) -> None:
        keys = [f"watchdog/{rank}" for rank in range(self.world)]
        sign = json.dumps(asdict(Sign(1, "node", 1, "step", 0.1, False, "train.py:1 train")))
        for key in keys:
            self.store.set(key, sign)
        began = time.monotonic()
        signs = {rank: Sign(**json.loads(text)) for rank, text in enumerate(read_all(self.store, keys))}
        assert judge(signs, dict.fromkeys(signs, 0.0), 60) is None
        self.looked_s = time.monotonic() - began

    def write(self) -> None:
        storage = open_storage(self.saved.folder)
        self.reports = [
            told_of([write_shard(storage, shard(rank, self.world))], self.world) for rank in range(self.world)
        ]

    def hear(self) -> None:
        save = self._save()
        for rank, report in enumerate(self.reports):
            self.store.set(f"{save.key}/{rank}", json.dumps({"result": report}))
        assert save._reports(self.store)[1] == []

    def commit(self) -> None:
        self._save()._commit(self.store)

    def _save(self) -> Save:
        return Save(self.checkpoints, 1, 1, None, {"optimizer": {"groups": {}}}, time.monotonic())

    def index(self) -> None:
        first = {"name": "r00000", "rank": 0, "head": 4096, "buffers": {}}
        starts, size = self.split.begins(0), -(-(1 << 20) // self.world)
        slices = [[f"layer.{n}.weight", [1 << 20], 0, size, int(starts[n]), 3] for n in range(self.parameters)]
        ends = [int(self.split.begins(rank)[-1]) for rank in range(self.world)]
        others = [first | {"name": f"r{n:05d}", "rank": n, "bytes": ends[n]} for n in range(1, self.world)]
        index = index_of([first | {"slices": slices, "bytes": ends[0]}, *others])
        assert "parts" in index
        self.index_bytes = len(json.dumps(index))

    def verify(self) -> None:
        assert Saved(self.saved.folder).faults(self.world - 1, self.world) == []

    def hear_whole(self) -> None:
        keys = [f"choice/{rank}" for rank in range(self.world)]
        for key in keys:
            self.store.set(key, json.dumps({"result": []}))
        assert all(told == {"result": []} for told in _gather(self.store, keys, 30))

    def plan(self) -> None:
        lo, hi = even_part(1 << 20, OTHER_WORLD // 2, OTHER_WORLD)
        touched = {piece.file for n in range(self.parameters) for _ in KINDS for piece in self.split.pieces(n, lo, hi)}
        assert len(touched) <= self.world // OTHER_WORLD + 2

    def read(self) -> None:
        slices, rank = Slices(self.saved.folder), OTHER_WORLD // 2
        wanted = [(kind, name, *even_part(size, rank, OTHER_WORLD)) for kind in KINDS for name, size in TENSORS.items()]
        slices.fill([(kind, name, lo, torch.empty(hi - lo)) for kind, name, lo, hi in wanted if lo < hi])


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    """In memory where there is such a disk: the number of files is what is looked at."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as name:
        yield Path(name)


def measure(world: int, parameters: int) -> dict[str, tuple[float, float]]:
    """Step -> (seconds, MB at most that Python took meanwhile: measured in a second round)."""
    seconds: dict[str, float] = {}
    told: dict[str, tuple[float, float]] = {}
    for traced in (False, True):
        with folder() as place:
            run = Simulated(world, parameters, place)
            for name, step in run.steps():
                if traced:
                    tracemalloc.start()
                began = time.perf_counter()
                step()
                if traced:
                    told[name] = seconds[name], tracemalloc.get_traced_memory()[1] / 1e6
                    tracemalloc.stop()
                else:
                    seconds[name] = time.perf_counter() - began
                if name == "save: rank 0 makes index, manifest, commit" and not traced:
                    sizes = {file: run.saved.storage.stat(file)[0] / 1e6 for file in (MANIFEST, "index.json")}
    print(f"{world} ranks: MB of {sizes}, index of {parameters} parameters {run.index_bytes / 1e6:.2f}", flush=True)
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", default="1024,16384")
    parser.add_argument("--parameters", type=int, default=300)
    asked = parser.parse_args()
    worlds = [int(world) for world in asked.ranks.split(",")]
    columns = {world: measure(world, asked.parameters) for world in worlds}
    table = Table("step", *(f"{world:,} ranks" for world in worlds))
    for name in columns[worlds[0]]:
        cells = (columns[world][name] for world in worlds)
        table.add_row(name, *(f"{seconds * 1e3:,.1f} ms, {memory:,.1f} MB" for seconds, memory in cells))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
