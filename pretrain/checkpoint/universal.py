"""Export to DeepSpeed's universal layout, which stock DeepSpeed loads at stages 1 to 3 and any world size.

OUT/latest_universal names the tag; OUT/TAG/zero/NAME/{fp32,exp_avg,exp_avg_sq,step}.pt hold one whole parameter each;
zero/optimizer_state.pt holds the groups. These files are pickles, as DeepSpeed requires: written here, never read.
Under stage 3 DeepSpeed gives every group the settings of the first one: set weight decay by hand after loading.
"""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from data_pipeline.outputs import new_folder
from pretrain.checkpoint.catalog import Saved
from pretrain.checkpoint.layout import Slices

TAG = "universal"
DEEPSPEED_VERSION = "0.19.8"  # the version whose layout this is
KEYS = {"param": "fp32", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
MODEL_FILES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")
"""Stages 1 and 2 read the first, stage 3 the second."""


def export_universal(saved: Saved, output: str | Path, note: Callable[[Path], None] = lambda folder: None) -> Path:
    """Write the new folder `output`, with one parameter in memory at a time -> its path.

    note: a function that adds to the folder what DeepSpeed's files do not contain.
    """
    groups: dict[str, Any] = saved.state["optimizer"]["groups"]
    updates = {name: group["updates"] for group in groups.values() for name in group["names"]}
    with new_folder(output) as folder:
        slices = Slices(saved.folder)
        for name in slices.shapes:
            place = folder / TAG / "zero" / name
            place.mkdir(parents=True)
            for kind in KEYS.keys() & set(slices.kinds(name)):  # DeepSpeed knows no average of the weights
                _write({"param": slices.whole(kind, name)}, place / f"{KEYS[kind]}.pt")
            if name in updates:
                _write(torch.tensor(float(updates[name])), place / "step.pt")
        _write(_optimizer_state(groups, updates), folder / TAG / "zero" / "optimizer_state.pt")
        for file in MODEL_FILES:
            _write(_model_state(saved, slices), folder / TAG / file)
        note(folder)
        (folder / "latest_universal").write_text(TAG)
    return Path(output)


def _write(value: Any, path: Path) -> None:
    """Write as torch.save does, but raise OSError on a full disk, which torch's own writer does not."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    path.write_bytes(buffer.getbuffer())


def _optimizer_state(groups: dict[str, Any], updates: dict[str, int]) -> dict[str, Any]:
    ordered = sorted(groups.values(), key=lambda group: int(group["number"]))  # in the optimizer's order
    rows = [{key: value for key, value in group.items() if key not in ("names", "number")} for group in ordered]
    hyper = [row | {"betas": tuple(row["betas"]), "params": []} for row in rows]
    step = torch.tensor(float(max(updates.values(), default=0)))
    inner = {"state": {0: {"step": step}}, "param_groups": hyper}
    return {"param_groups": hyper, "optimizer_state_dict": inner, "ds_version": DEEPSPEED_VERSION}


def _model_state(saved: Saved, slices: Slices) -> dict[str, Any]:
    """Return what DeepSpeed reads besides the parameters: counts and buffers."""
    return {
        "module": {name: slices.buffer(name) for name in slices.buffers},
        "buffer_names": slices.buffers,
        "param_shapes": [{name: torch.Size(shape) for name, shape in slices.shapes.items()}],
        "dp_world_size": saved.manifest["world"],
        "mp_world_size": 1,
        "global_steps": saved.step,
        "global_samples": 0,
        "skipped_steps": 0,
        "lr_scheduler": None,
        "ds_version": DEEPSPEED_VERSION,
    }
