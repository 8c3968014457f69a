"""One rank of test_state.py: an engine at one stage is saved and restored into an engine at every other."""

import json
import sys
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from data_pipeline.errors import DataError
from pretrain.checkpoint.catalog import Retention, committed
from pretrain.checkpoint.layout import Slices
from pretrain.checkpoint.restore import restore
from pretrain.checkpoint.saver import Checkpoints
from pretrain.checkpoint.universal import export_universal
from pretrain.config import AdamWConfig, RunConfig
from pretrain.engine.engine import Engine, deepspeed_settings
from pretrain.engine.optim import build_optimizer, parameter_groups
from pretrain.runtime.mesh import Mesh
from tests.pretrain.engine_worker import BATCH, LR, WIDTH, config, global_batch
from tests.pretrain.plain import Plain

STAGES = (0, 1, 2, 3)


class Everything(Plain):
    """A frozen layer, a tied matrix, batch norm with its buffers, a matrix that does not decay, odd sizes.

    A judge on top has an optimizer of its own, and its turns begin a step later.
    """

    roles: ClassVar[tuple[str, ...]] = ("main", "judge")

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.inner = nn.Linear(WIDTH, WIDTH, bias=False)
        self.tied = nn.Linear(WIDTH, WIDTH, bias=False)
        self.tied.weight = self.inner.weight
        self.norm = nn.BatchNorm1d(WIDTH)
        self.spared = nn.Linear(WIDTH, 7, bias=True)
        self.judge = nn.Linear(7, 5)

    def role_of(self, name: str) -> str:
        return "judge" if name.startswith("judge.") else "main"

    def turns(self, step: int) -> tuple[str, ...]:
        return self.roles if step else self.roles[:1]

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """x float32 [b, WIDTH], turn int64 [] -> loss."""
        hidden = torch.tanh(self.norm(self.inner(self.frozen(batch["x"]))))
        seen = self.judge(self.spared(self.tied(hidden)))
        return {"loss": (seen - 1).square().mean() if int(batch["turn"]) else seen.square().mean()}


def settings_at(stage: int) -> RunConfig:
    settings = config(zero_stage=stage)
    judge = AdamWConfig(lr=LR / 2, betas=(0.5, 0.9), eps=1e-3, weight_decay=0.3)
    return settings.model_copy(update={"optim": settings.optim.model_copy(update={"roles": {"judge": judge}})})


def engine_at(stage: int, mesh: Mesh, seed: int) -> Engine:
    return Engine(Everything(seed), settings_at(stage), mesh, BATCH // mesh.world, 1)


def step(engine: Engine, mesh: Mesh, number: int) -> float:
    """-> the sum of the turns' losses."""
    losses = []
    for turn, role in enumerate(Everything.turns(engine.deepspeed.module, number)):
        engine.take_turn(role)
        x = global_batch(number).chunk(mesh.world)[mesh.rank]
        loss = engine.forward({"x": x, "turn": torch.tensor(turn)})["loss"]
        engine.backward(loss)
        engine.update(LR)
        losses.append(float(loss.detach()))
    return mesh.mean([sum(losses)])[0]


def contents(engine: Engine) -> dict[str, list[Any]]:
    """Everything this rank keeps, by name and kind, with its place; counts; buffers."""
    kept = {f"{kind}/{o.name}": [o.lo, tensor.tolist()] for o in engine.owned() for kind, tensor in o.tensors.items()}
    buffers = {name: buffer.tolist() for name, buffer in engine.deepspeed.module.named_buffers()}
    return kept | {"buffers": [buffers], "scalars": [engine.scalars()["groups"]]}


def of_universal(mesh: Mesh, folder: Path, stage: int) -> dict[str, Any]:
    """Stock DeepSpeed loads our export of what stage 3 saved -> names whose master or moments differ, weight decays."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    (saved,), output = committed(folder / "3"), folder / "universal"
    if mesh.rank == 0 and not output.exists():
        export_universal(saved, output)
    mesh.sum(torch.zeros(1))  # wait for rank 0
    module, settings = Everything(5), settings_at(stage)
    stock = deepspeed_settings(settings, module, mesh.world, BATCH // mesh.world, 1)
    optimizer = build_optimizer(parameter_groups(module, settings.optim))
    stock["checkpoint"] = {"load_universal": True}
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=stock, dist_init_required=False)
    engine.load_checkpoint(str(output))
    slices, wrong = Slices(saved.folder), []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            found = {"param": safe_get_full_fp32_param(parameter)}
            found |= {key: safe_get_full_optimizer_state(parameter, key) for key in ("exp_avg", "exp_avg_sq")}
            wrong += [f"{kind}/{name}" for kind in found if not torch.equal(found[kind], slices.whole(kind, name))]
    return {"wrong": wrong, "decays": [group["weight_decay"] for group in engine.optimizer.param_groups]}


def main() -> None:
    """FOLDER -> for each pair of stages what the next loss is, continued and restored; for equal ones, is all equal."""
    torch.set_num_threads(1)
    mesh, results, refused = Mesh.start(60), {}, ""
    for before in STAGES:
        checkpoints = Checkpoints(f"{sys.argv[1]}/{before}", mesh, 0, Retention(1))
        engine = engine_at(before, mesh, 1)
        for number in range(3):
            step(engine, mesh, number)
        checkpoints.save(engine, 3, {"optimizer": engine.scalars()})
        saved = checkpoints.finish()
        assert saved is not None
        held, expected = contents(engine), step(engine, mesh, 3)
        for after in STAGES:
            other = engine_at(after, mesh, 2)
            restore(saved, other)
            same = before != after or contents(other) == held
            results[f"{before} to {after}"] = {"same": same, "expected": expected, "loss": step(other, mesh, 3)}
        saved.state["optimizer"]["groups"]["decay"]["weight_decay"] += 1
        try:
            engine.load_scalars(saved.state["optimizer"], saved.folder)
        except DataError as error:
            refused = str(error)
    universal = {stage: of_universal(mesh, Path(sys.argv[1]), stage) for stage in (1, 2, 3)}
    mesh.stop()
    files = sorted(path.name for path in Path(sys.argv[1]).rglob("r*.safetensors"))
    print(json.dumps({"results": results, "refused": refused, "files": files, "universal": universal}))


if __name__ == "__main__":
    main()
