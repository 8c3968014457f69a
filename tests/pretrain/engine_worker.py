"""One rank of tests/pretrain/engine/test_engine.py: MODE and its arguments in, one JSON line out."""

import json
import math
import sys
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from data_pipeline.errors import NodeFault
from data_pipeline.settings import check_settings
from pretrain.config import RunConfig
from pretrain.engine.engine import Engine
from pretrain.runtime.mesh import Mesh
from tests.pretrain.plain import Plain

STEPS, BATCH, WIDTH = 6, 8, 16
LR = 1e-2


def config(**train: Any) -> RunConfig:
    """A run whose optimizer and engine settings are used; its model is not."""
    tree = {
        "run": "unused",
        "model": {"kind": "electra"},
        "task": {"kind": "rtd"},
        "data": {"dataset": "unused", "text_tokenizer": "unused"},
        "train": {"steps": STEPS, "global_batch": BATCH, "precision": "fp32", "clip_norm": 0.5, **train},
        "optim": {"lr": LR, "eps": 1e-4, "weight_decay": 0.1, "no_decay": ["spared"]},
        "tracking": {"uri": ""},
    }
    return check_settings(RunConfig, tree, "test")


class Towers(Plain):
    """Two towers, a spared matrix and a vector; the batch says which towers run."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.spared = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """x float32 [b, WIDTH] -> loss."""
        tower = self.a if int(batch["tower"]) == 0 else self.b
        return {"loss": self.spared(torch.tanh(tower(batch["x"]))).float().square().mean()}


def global_batch(step: int) -> Tensor:
    """float32 [BATCH, WIDTH] of a step."""
    return torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(step))


def plain(precision: str) -> list[float]:
    """The same training by torch alone, on one device: the reference."""
    module = Towers()
    decay = [p for n, p in module.named_parameters() if p.ndim == 2 and "spared" not in n]
    spared = [p for n, p in module.named_parameters() if not (p.ndim == 2 and "spared" not in n)]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": spared, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=1e-4)
    losses = []
    for step in range(STEPS):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = module({"x": global_batch(step), "tower": torch.tensor(step % 2)})["loss"]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for parameter in module.parameters():  # an unused tower has gradient 0, as in flat sharded partitions
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.nn.utils.clip_grad_norm_(module.parameters(), 0.5)
        optimizer.step()
        losses.append(float(loss))
    return losses


def sharded(mesh: Mesh, stage: int, accumulation: int, precision: str) -> list[float]:
    """The same by the engine. Towers alternate, so each is without a gradient in every second step."""
    micro = BATCH // mesh.world // accumulation
    engine = Engine(Towers(), config(zero_stage=stage, precision=precision), mesh, micro, accumulation)
    losses = []
    for step in range(STEPS):
        mine = global_batch(step).chunk(mesh.world)[mesh.rank].chunk(accumulation)
        values = []
        for x in mine:
            loss = engine.forward({"x": x, "tower": torch.tensor(step % 2)})["loss"]
            engine.backward(loss)
            values.append(float(loss.detach()))
        engine.update(LR)
        losses.append(mesh.mean([sum(values) / accumulation])[0])
    return losses


COUNTS = (1, 1, 2, 3, 3, 1, 2)
"""Micro-batches of a rank in each step of `growing`."""


def growing(mesh: Mesh, stage: int) -> dict[str, Any]:
    """Losses of steps of other sizes, of the engine and of torch alone; a batch of `count` times the micro-batch."""
    micro = BATCH // mesh.world
    engine = Engine(Towers(), config(zero_stage=stage), mesh, micro, max(COUNTS))
    module, found, plain = Towers(), [], []
    decay, spared = [module.a.weight, module.b.weight], [module.a.bias, module.b.bias, module.spared.weight]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": spared, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=1e-4)
    for step, count in enumerate(COUNTS):
        whole, tower = torch.cat([global_batch(100 * step + part) for part in range(count)]), torch.tensor(step % 2)
        engine.accumulate(count)
        values = []
        for x in whole.chunk(mesh.world)[mesh.rank].chunk(count):
            loss = engine.forward({"x": x, "tower": tower})["loss"]
            engine.backward(loss)
            values.append(float(loss.detach()))
        engine.update(LR)
        found.append(mesh.mean([sum(values) / count])[0])
        optimizer.zero_grad(set_to_none=False)
        loss = module({"x": whole, "tower": tower})["loss"]
        loss.backward()
        for parameter in module.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.nn.utils.clip_grad_norm_(module.parameters(), 0.5)
        optimizer.step()
        plain.append(float(loss))
    return {"losses": found, "plain": plain}


def stale(mesh: Mesh, stage: int) -> dict[str, float]:
    """How far tower a moves (by SGD-like AdamW moments: its gradient) in a step that does not use it."""
    engine = Engine(Towers(), config(zero_stage=stage), mesh, BATCH // mesh.world, 1)
    moments = []
    for tower in (0, 1):
        x = global_batch(tower).chunk(mesh.world)[mesh.rank]
        engine.backward(engine.forward({"x": x, "tower": torch.tensor(tower)})["loss"])
        engine.update(LR)
        mine = [owned.tensors["exp_avg"].abs().sum() for owned in engine.owned() if owned.name.startswith("a.")]
        moments.append(mesh.mean([float(sum(mine))])[0])
    return {"first": moments[0], "second": moments[1]}


def costs(mesh: Mesh) -> dict[str, int]:
    """What one step of stage 3 does, once its first are over: gathers, and processes started."""
    engine = Engine(Towers(), config(zero_stage=3), mesh, BATCH // mesh.world, 1)
    mine, started = global_batch(0).chunk(mesh.world)[mesh.rank], [0]

    def step() -> None:
        engine.backward(engine.forward({"x": mine, "tower": torch.tensor(0)})["loss"])
        engine.update(LR)

    def count(event: str, _arguments: tuple[Any, ...]) -> None:
        started[0] += event == "subprocess.Popen"

    step(), step()
    sys.addaudithook(count)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    calls = {event.key: event.count for event in profile.key_averages()}
    return {"gathers": calls.get("c10d::_allgather_base_", 0), "processes": started[0]}


def start(mesh: Mesh) -> dict[str, Any]:
    """The commands that the start of an engine, its collectives and its first step run."""
    commands: list[str] = []
    sys.addaudithook(lambda event, of: commands.append(str(of[:2])) if event == "subprocess.Popen" else None)
    engine = Engine(Towers(), config(zero_stage=3), mesh, BATCH // mesh.world, 1)
    mine = global_batch(0).chunk(mesh.world)[mesh.rank]
    engine.backward(engine.forward({"x": mine, "tower": torch.tensor(0)})["loss"])
    engine.update(LR)
    return {"commands": commands}


def refused(mesh: Mesh, stage: int) -> dict[str, Any]:
    """Steps 0 and 2, with nothing between them, or with a step that is refused: NaN on one rank, or finite."""

    def states(between: Tensor | None) -> tuple[list[Tensor], dict[str, Any], list[float]]:
        engine = Engine(Towers(), config(zero_stage=stage), mesh, BATCH // mesh.world, 1)
        norms = []
        for step, x in ((0, global_batch(0)), (1, between), (2, global_batch(2))):
            if x is None:
                continue
            mine = x.chunk(mesh.world)[mesh.rank]
            engine.backward(engine.forward({"x": mine, "tower": torch.tensor(step % 2)})["loss"])
            norms.append(engine.update(LR, lambda norm, step=step: step != 1 and math.isfinite(norm)))
        kept = [tensor.clone() for owned in engine.owned() for tensor in owned.tensors.values()]
        return kept, engine.scalars(), norms

    broken = global_batch(1)
    broken[-1] = math.nan
    expected, scalars, _ = states(None)
    results = {"finite": states(global_batch(1)), "nan": states(broken)}
    return {
        name: {"same": all(map(torch.equal, kept, expected)), "scalars": counts == scalars, "norm": str(norms[1])}
        for name, (kept, counts, norms) in results.items()
    }


def different(mesh: Mesh) -> dict[str, Any]:
    """Each rank runs another tower."""
    engine = Engine(Towers(), config(zero_stage=3), mesh, BATCH // mesh.world, 1)
    before = [owned.tensors["param"].clone() for owned in engine.owned()]
    engine.backward(engine.forward({"x": global_batch(0)[: BATCH // 2], "tower": torch.tensor(mesh.rank)})["loss"])
    try:
        engine.update(LR)
    except NodeFault as error:
        after = [owned.tensors["param"] for owned in engine.owned()]
        return {"error": str(error), "untouched": all(map(torch.equal, before, after))}
    return {"error": ""}


def main() -> None:
    """MODE [stage] [accumulation]"""
    torch.set_num_threads(1)
    mode, *numbers = sys.argv[1:]
    mesh = Mesh.start(60)
    stage, accumulation = (int(given or usual) for given, usual in zip_longest(numbers, (3, 1)))
    result: dict[str, Any] = {
        **{
            kind: lambda kind=kind: {"losses": sharded(mesh, stage, accumulation, kind), "plain": plain(kind)}
            for kind in ("fp32", "bf16")
        },
        "growing": lambda: {str(stage): growing(mesh, stage) for stage in range(4)},
        "start": lambda: start(mesh),
        "stale": lambda: stale(mesh, stage),
        "costs": lambda: costs(mesh),
        "refused": lambda: refused(mesh, stage),
        "different": lambda: different(mesh),
        "gather": lambda: gathered(mesh),
    }[mode]()
    mesh.stop()
    print(json.dumps(result))


def gathered(mesh: Mesh) -> dict[str, float]:
    """The contrastive loss over ranks against one device: largest difference of loss and averaged gradient."""
    torch.manual_seed(0)
    weight = torch.randn(WIDTH, 4)

    def loss_of(w: Tensor, x: Tensor, gather: Any) -> Tensor:
        rows = gather(nn.functional.normalize(x @ w, dim=-1))
        return nn.functional.cross_entropy(rows @ rows.roll(1, 0).T, torch.arange(len(rows)))

    whole = weight.clone().requires_grad_()
    reference = loss_of(whole, global_batch(0), lambda rows: rows)
    reference.backward()
    mine = weight.clone().requires_grad_()
    loss = loss_of(mine, global_batch(0).chunk(mesh.world)[mesh.rank], mesh.gather)
    loss.backward()
    assert mine.grad is not None and whole.grad is not None
    averaged = mesh.sum(mine.grad) / mesh.world
    return {"loss": float(abs(loss - reference).detach()), "gradient": float((averaged - whole.grad).abs().max())}


if __name__ == "__main__":
    main()
