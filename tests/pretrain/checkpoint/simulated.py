"""Ranks of a run simulated in one process: one store, and a tiny model whose parameters each rank keeps in part."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from data_pipeline.settings import check_settings
from pretrain.checkpoint.catalog import Retention, Saved, committed
from pretrain.checkpoint.identity import identity
from pretrain.checkpoint.saver import Checkpoints
from pretrain.config import RunConfig
from pretrain.engine.engine import Owned
from pretrain.models import MODELS
from pretrain.runtime.mesh import Mesh, RankPlace
from tests.pretrain.commands import Material, electra

KINDS = ("param", "exp_avg", "exp_avg_sq")


def config_of(run: Path, **train: Any) -> RunConfig:
    return check_settings(RunConfig, electra(Material(Path("data"), Path("vocab")), run, **train), "test")


class Part:
    """Stands where the engine does: a model whose parameters this rank keeps in part."""

    def __init__(self, module: torch.nn.Module, rank: int, world: int) -> None:
        self.model = module
        self.deepspeed = SimpleNamespace(module=torch.nn.ModuleDict({"model": module}))
        self.rank, self.world = rank, world

    def owned(self) -> list[Owned]:
        parts = []
        for name, parameter in self.model.named_parameters():
            size = parameter.numel()
            lo, hi = size * self.rank // self.world, size * (self.rank + 1) // self.world
            if lo < hi:
                flat = parameter.detach().flatten()[lo:hi]
                views = {"param": flat, "exp_avg": flat * 2, "exp_avg_sq": flat**2}
                parts.append(Owned(f"model.{name}", tuple(parameter.shape), lo, hi, views))
        return parts


def mesh_of(rank: int = 0, world: int = 1, store: Any = None) -> Mesh:
    return Mesh(RankPlace(rank, rank, world, "", 0), torch.device("cpu"), store or torch.distributed.HashStore())


def ranks_of(root: Path | str, world: int, attempt: int = 0, retention: Retention | None = None) -> list[Checkpoints]:
    """The checkpoints of a run as each of its ranks sees them."""
    store = torch.distributed.HashStore()
    return [Checkpoints(root, mesh_of(rank, world, store), attempt, retention or Retention(9)) for rank in range(world)]


def model_of(step: int) -> torch.nn.Module:
    torch.manual_seed(step)
    return MODELS["electra"](config_of(Path("unused")).model)


def save(ranks: list[Checkpoints], step: int, model: torch.nn.Module, **state: Any) -> None:
    """All ranks stage and write; returns when every one has ended, raises what the first of them says."""
    for rank, checkpoints in enumerate(ranks):
        part: Any = Part(model, rank, len(ranks))
        known = {"step": step, "identity": identity(config_of(Path("unused"))), "optimizer": optimizer_of(model, step)}
        checkpoints.save(part, step, known | state)
    for checkpoints in ranks:
        assert checkpoints._save is not None and checkpoints._save.ended(200)
    for checkpoints in ranks:
        checkpoints.finish()


def optimizer_of(model: torch.nn.Module, updates: int) -> dict[str, Any]:
    names = [f"model.{name}" for name, _ in model.named_parameters()]
    return {"groups": {"main": {"number": 0, "names": names, "updates": updates, "lr": 1e-3, "betas": [0.9, 0.95]}}}


def write(
    run: Path, step: int, attempt: int = 0, keep: int = 9, world: int = 2, retention: Retention | None = None
) -> torch.nn.Module:
    """A committed checkpoint under RUN/checkpoints -> the model in it."""
    model = model_of(step)
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.json").write_text(config_of(run).model_dump_json())
    save(ranks_of(run / "checkpoints", world, attempt, retention or Retention(keep)), step, model)
    return model


def folder_of(run: Path, index: int) -> Path:
    saved: Saved = committed(run / "checkpoints")[index]
    return Path(saved.folder)


# ------------------------------------------------------------------------------------------------- damage


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-50] ^= 4
    path.write_bytes(data)


DAMAGES = [(cut, "the manifest has"), (flip_a_bit, "sha256"), (Path.unlink, "missing")]
