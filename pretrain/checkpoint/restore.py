"""Loads a checkpoint of any world size and stage into this rank's engine, reading only the bytes that it keeps."""

from typing import TYPE_CHECKING

import torch

from data_pipeline.errors import DataError
from pretrain.checkpoint.catalog import Saved
from pretrain.checkpoint.layout import Slices
from pretrain.engine.optim import regrouped

if TYPE_CHECKING:
    from pretrain.engine.engine import Engine


@torch.no_grad()
def restore(saved: Saved, engine: "Engine", regroup: bool = False) -> None:
    """Restore the engine's masters, moments, working copies, buffers and update counts.

    regroup: the optimizer's settings were changed on purpose, so that groups may have other settings and members.
    At the world size that wrote the checkpoint, every rank restores its own buffers; at any other, those of rank 0.
    What was still frozen then begins with moments of zero. Raises DataError if the checkpoint belongs to another model.
    """
    slices = Slices(saved.folder)
    unknown = sorted(set(engine.names.values()) ^ set(slices.shapes))
    if unknown:
        raise DataError(f"{saved.folder} belongs to another model: {len(unknown)} names differ, first {unknown[:3]}")
    parts = engine.owned()
    for owned in parts:
        if slices.shapes[owned.name] != owned.shape:
            was = list(slices.shapes[owned.name])
            raise DataError(f"{saved.folder}: {owned.name} has shape {was}, this model {list(owned.shape)}")
    fresh = engine.stateless(saved.state["optimizer"])
    wanted = [(kind, owned.name, owned.lo, view) for owned in parts for kind, view in owned.tensors.items()]
    slices.fill(one for one in wanted if one[0] == "param" or one[1] not in fresh)
    for kind, name, _, view in wanted:
        if kind != "param" and name in fresh:
            view.zero_()
    engine.refresh()
    buffers = dict(engine.deepspeed.module.named_buffers())
    rank = engine.mesh.rank if engine.mesh.world == saved.manifest["world"] else 0
    for name in slices.buffers:
        buffers[name].copy_(slices.buffer(name, rank))
    scalars = saved.state["optimizer"]
    if regroup:
        scalars = scalars | {"groups": regrouped(scalars["groups"], engine.scalars()["groups"])}
    engine.load_scalars(scalars, saved.folder)
