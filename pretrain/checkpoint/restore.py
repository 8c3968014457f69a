"""Loads a checkpoint of any world size and stage into this rank's engine, reading only the bytes that it keeps."""

from typing import TYPE_CHECKING

import torch

from data_pipeline.errors import DataError
from pretrain.checkpoint.catalog import Saved
from pretrain.checkpoint.layout import Slices
from pretrain.engine.engine import AVERAGE, MOMENTS
from pretrain.engine.optim import regrouped

if TYPE_CHECKING:
    from pretrain.engine.engine import Engine


@torch.no_grad()
def restore(saved: Saved, engine: "Engine", regroup: bool = False) -> None:
    """Restore the engine's masters, moments, working copies, buffers and update counts.

    regroup: the optimizer's settings were changed on purpose, so that groups may have other settings and members.
    At the world size that wrote the checkpoint, every rank restores its own buffers; at any other, those of rank 0.
    What was still frozen then begins with moments of zero; an average of the weights that was not kept, at the weights.
    Raises DataError if the checkpoint belongs to another model.
    """
    scalars = saved.state["optimizer"]
    if regroup:
        scalars = scalars | {"groups": regrouped(scalars["groups"], engine.scalars()["groups"])}
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
    new: dict[str, tuple[str, ...]] = {name: (*MOMENTS, AVERAGE) for name in fresh}
    new |= {name: (AVERAGE,) for name in slices.shapes if name not in fresh and AVERAGE not in slices.kinds(name)}
    slices.fill(
        (kind, owned.name, owned.lo, view)
        for owned in parts
        for kind, view in owned.tensors.items()
        if kind not in new.get(owned.name, ())
    )
    for owned in parts:
        owned.begin(new.get(owned.name, ()))
    if engine.mesh.rank == 0 and AVERAGE in engine.kinds and not any(AVERAGE in slices.kinds(n) for n in slices.shapes):
        print(f"{saved.folder} holds no average of the weights: optim.ema begins at the weights", flush=True)
    engine.refresh()
    buffers = dict(engine.deepspeed.module.named_buffers())
    rank = engine.mesh.rank if engine.mesh.world == saved.manifest["world"] else 0
    for name in slices.buffers:
        buffers[name].copy_(slices.buffer(name, rank))
    engine.load_scalars(scalars, saved.folder)
