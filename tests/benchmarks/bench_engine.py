"""ms/step of the engine's ZeRO stages 0 to 3 beside plain DistributedDataParallel, in fp32.

python tests/benchmarks/bench_engine.py        a GPT of 5M parameters, 2 processes of 1 thread, alternating rounds

Each process holds all five at once; a round times STEPS steps of each, in an order that turns with the round, so that
what else the machine does meets all alike. Steps are whole: forward, backward, clipping, AdamW.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from data_pipeline.settings import check_settings
from pretrain.config import RunConfig
from pretrain.engine.engine import Engine
from pretrain.engine.optim import build_optimizer, parameter_groups
from pretrain.models import MODELS
from pretrain.runtime.mesh import Mesh
from pretrain.tasks import TASKS
from pretrain.tasks.collectives import Collectives

ROOT = Path(__file__).resolve().parents[2]
PROCESSES, ROUNDS, STEPS, MICRO_BATCH, LR = 2, 5, 2, 4, 1e-3
PLAIN = "DDP"


def config(stage: int) -> RunConfig:
    """The same run at another stage."""
    model = {"kind": "gpt", "text_vocab": 2000, "image_vocab": 256, "text_tokens": 32, "image_tokens": 64}
    tree = {
        "run": "unused",
        "model": model | {"layers": 6, "width": 240, "heads": 6},
        "task": {"kind": "autoregressive"},
        "data": {"dataset": "unused", "text_tokenizer": "unused", "image_tokenizer": "unused"},
        "train": {"steps": 1000, "global_batch": PROCESSES * MICRO_BATCH, "precision": "fp32", "zero_stage": stage},
        "optim": {"lr": LR},
    }
    return check_settings(RunConfig, tree, "benchmark")


def objective(mesh: Mesh) -> nn.Module:
    """The model with the weights of one seed, in its objective."""
    torch.manual_seed(0)
    run = config(0)
    collectives = Collectives(gather=mesh.gather, sum=mesh.sum, world=mesh.world)
    return TASKS["autoregressive"](MODELS["gpt"](run.model), run.task, collectives).train()


def batch(rank: int) -> dict[str, Tensor]:
    """text int64 [b, 32], codes int64 [b, 64], step: another one on each rank."""
    generator = torch.Generator().manual_seed(rank)
    return {
        "text": torch.randint(5, 2000, (MICRO_BATCH, 32), generator=generator),
        "codes": torch.randint(0, 256, (MICRO_BATCH, 64), generator=generator),
        "step": torch.tensor(0),
    }


def by_engine(mesh: Mesh, stage: int) -> Callable[[], None]:
    """One step of ours."""
    engine, mine = Engine(objective(mesh), config(stage), mesh, MICRO_BATCH, 1), batch(mesh.rank)

    def step() -> None:
        engine.backward(engine.forward(mine)["loss"])
        engine.update(LR)

    return step


def by_ddp(mesh: Mesh) -> Callable[[], None]:
    """One step of torch's own."""
    module, mine = objective(mesh), batch(mesh.rank)
    optim = config(0).optim
    optimizer = build_optimizer(parameter_groups(module, optim))
    wrapped = DistributedDataParallel(module)

    def step() -> None:
        loss = wrapped(mine)["loss"]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()

    return step


def rank_main() -> None:
    """One process: time the rounds, print them as JSON in the last line."""
    torch.set_num_threads(1)
    mesh = Mesh.start(120)
    steps = {PLAIN: by_ddp(mesh)} | {f"stage {stage}": by_engine(mesh, stage) for stage in range(4)}
    for step in steps.values():
        step()
        step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(ROUNDS):
        names = list(steps)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            torch.distributed.barrier()
            began = time.perf_counter()
            for _ in range(STEPS):
                steps[name]()
            times[name].append((time.perf_counter() - began) / STEPS * 1000)
    parameters = sum(parameter.numel() for parameter in objective(mesh).parameters())
    mesh.stop()
    print(json.dumps({"times": times, "parameters": parameters}))


def main() -> None:
    sys.path.insert(0, str(ROOT))
    from tests.pretrain.processes import run_ranks

    measured = run_ranks(Path(__file__), ["rank"], PROCESSES)[0]
    times = measured["times"]
    print(f"GPT of {measured['parameters']:,} parameters, {PROCESSES} processes, {ROUNDS} rounds of {STEPS} steps")
    print(f"{'':10}{'ms/step':>10}{'lowest':>10}{'of DDP':>10}")
    for name, values in times.items():
        ratio = statistics.median(one / plain for one, plain in zip(values, times[PLAIN], strict=True))
        print(f"{name:10}{statistics.median(values):10.1f}{min(values):10.1f}{ratio:10.2f}")


if __name__ == "__main__":
    rank_main() if sys.argv[1:] == ["rank"] else main()
