"""How long a save holds up training, beside waiting for it and beside stock DeepSpeed; what it writes, and how fast.

python tests/benchmarks/bench_save.py        a GPT of 40M parameters, 2 processes, ZeRO-3, alternating rounds

Bandwidth is that of a save from its start to its commit, over the same bytes written and synced by dd.
"""

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from data_pipeline.settings import check_settings
from pretrain.checkpoint.catalog import Retention
from pretrain.checkpoint.saver import Checkpoints
from pretrain.config import RunConfig
from pretrain.engine.engine import Engine
from pretrain.models import MODELS
from pretrain.runtime.mesh import Mesh
from pretrain.tasks import TASKS
from pretrain.tasks.collectives import Collectives

ROOT = Path(__file__).resolve().parents[2]
PROCESSES, ROUNDS, MICRO_BATCH, LR = 2, 5, 1, 1e-3


def engine_of(mesh: Mesh, width: int = 512) -> tuple[Engine, int]:
    """-> the engine of a GPT of 12 layers after a step, and the number of parameters."""
    model = {"kind": "gpt", "text_vocab": 2000, "image_vocab": 256, "text_tokens": 8, "image_tokens": 16}
    tree: dict[str, Any] = {
        "run": "unused",
        "model": model | {"layers": 12, "width": width, "heads": 8},
        "task": {"kind": "autoregressive"},
        "data": {"dataset": "unused", "text_tokenizer": "unused", "image_tokenizer": "unused"},
        "train": {"steps": 10, "global_batch": mesh.world * MICRO_BATCH, "precision": "fp32", "zero_stage": 3},
        "optim": {"lr": LR},
    }
    config = check_settings(RunConfig, tree, "benchmark")
    torch.manual_seed(0)
    collectives = Collectives(gather=mesh.gather, sum=mesh.sum, world=mesh.world)
    objective = TASKS["autoregressive"](MODELS["gpt"](config.model), config.task, collectives).train()
    parameters = sum(parameter.numel() for parameter in objective.parameters())
    engine = Engine(objective, config, mesh, MICRO_BATCH, 1)
    text, codes = torch.randint(5, 2000, (MICRO_BATCH, 8)), torch.randint(0, 256, (MICRO_BATCH, 16))
    engine.backward(engine.forward({"text": text, "codes": codes})["loss"])
    engine.update(LR)
    return engine, parameters


def rank_main(folder: Path) -> None:
    """One process: time the rounds, print them as JSON in the last line."""
    torch.set_num_threads(1)
    mesh = Mesh.start(120)
    engine, parameters = engine_of(mesh)
    checkpoints = Checkpoints(folder / "ours", mesh, 0, Retention(1))
    step = 0

    def beside() -> float:
        """What training waits for; the rest is waited for outside of the clock."""
        before = checkpoints.blocked_s
        checkpoints.save(engine, step, {"step": step})
        checkpoints.finish()
        return checkpoints.blocked_s - before

    def waiting() -> float:
        checkpoints.save(engine, step, {"step": step})
        checkpoints.finish()
        return float("nan")

    def stock() -> float:
        engine.deepspeed.save_checkpoint(str(folder / "stock"), tag=f"step-{step}")
        return float("nan")

    ways: dict[str, Callable[[], float]] = {"beside training": beside, "waited for": waiting, "stock DeepSpeed": stock}
    times: dict[str, list[float]] = {name: [] for name in ways}
    written: dict[str, int] = {}
    for turn in range(-1, ROUNDS):
        for place in range(len(ways)):
            name = list(ways)[(turn + place) % len(ways)]
            step += 1
            torch.distributed.barrier()
            began = time.perf_counter()
            blocked = ways[name]()
            took = time.perf_counter() - began if blocked != blocked else blocked
            torch.distributed.barrier()
            if turn >= 0:
                times[name].append(took)
        if mesh.rank == 0:
            written = {kind: bytes_of(folder / kind) for kind in ("ours", "stock")}
            shutil.rmtree(folder / "stock")
        torch.distributed.barrier()
    mesh.stop()
    print(json.dumps({"times": times, "parameters": parameters, "written": written}))


def bytes_of(folder: Path) -> int:
    """Of the newest checkpoint in the folder."""
    newest = max((path for path in folder.iterdir() if path.is_dir()), key=lambda path: path.stat().st_mtime)
    return sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())


def disk(folder: Path, count: int) -> float:
    """Bytes a second of dd with its data synced."""
    began = time.perf_counter()
    size = f"count={max(1, count >> 20)}"
    argv = ["dd", "if=/dev/zero", f"of={folder / 'dd'}", "bs=1M", size, "conv=fdatasync"]
    subprocess.run(argv, check=True, capture_output=True, timeout=300)
    return (max(1, count >> 20) << 20) / (time.perf_counter() - began)


def main() -> None:
    sys.path.insert(0, str(ROOT))
    from tests.pretrain.processes import run_ranks

    with tempfile.TemporaryDirectory() as name:
        measured = run_ranks(Path(__file__), ["rank", name], PROCESSES)
        count = measured[0]["written"]["ours"]
        plain = statistics.median(disk(Path(name), count) for _ in range(3))
    times = {way: [max(pair) for pair in zip(*(rank["times"][way] for rank in measured), strict=True)]
             for way in measured[0]["times"]}  # fmt: skip
    parameters = measured[0]["parameters"]
    print(f"GPT of {parameters:,} parameters, {PROCESSES} processes, ZeRO-3, {ROUNDS} rounds; the slower rank")
    for way, values in times.items():
        middle, least, most = (1000 * of(values) for of in (statistics.median, min, max))
        print(f"{way:16} {middle:8.0f} ms ({least:.0f} to {most:.0f})")
    for kind, size in measured[0]["written"].items():
        print(f"{kind:16} {size / parameters:8.2f} bytes a parameter")
    speed = count / statistics.median(times["waited for"])
    print(f"bandwidth        {speed / 1e6:8.0f} MB/s, dd {plain / 1e6:.0f} MB/s: {speed / plain:.2f}")


if __name__ == "__main__":
    rank_main(Path(sys.argv[2])) if sys.argv[1:2] == ["rank"] else main()
