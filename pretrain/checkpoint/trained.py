"""A checkpoint -> a model on one device: to evaluate, to export, to start another run from."""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from data_pipeline.errors import ConfigError, DataError
from data_pipeline.settings import check_settings
from data_pipeline.storage import open_storage
from pretrain.checkpoint.catalog import Saved, checkpoint_root, committed, read_json
from pretrain.checkpoint.layout import Slices
from pretrain.config import RunConfig
from pretrain.interchange.folder import WEIGHTS_FILE
from pretrain.models import MODELS
from pretrain.translate import saved_run

PREFIX = "model."
"""Objectives hold their model under this name."""


def run_config(run: str | Path) -> RunConfig:
    """The configuration that a run folder was trained with. Raises ConfigError where there is none."""
    path = Path(run) / "config.json"
    if not path.is_file():
        raise no_run(run)
    return check_settings(RunConfig, saved_run(read_json(open_storage(run), path.name)), str(path))


def root_of(run: str | Path) -> str:
    """Where the checkpoints of a run lie."""
    known = (Path(run) / "config.json").is_file()
    return checkpoint_root(run, run_config(run).train.checkpoints if known else None)


def no_run(run: str | Path) -> ConfigError:
    """For a path that a user took for a run's folder."""
    what = "is no run: it has no config.json" if Path(run).is_dir() else "is no folder"
    return ConfigError(f"{run} {what}; give the folder that a configuration names as `run:`")


def newest_whole(run: str | Path, step: int | None = None) -> Saved:
    """The newest checkpoint of a run (or of a step) whose files are whole. Raises DataError when there is none."""
    rows = [saved for saved in committed(root_of(run)) if step in (None, saved.step)]
    for saved in reversed(rows):
        if not saved.faults():
            return saved
    what = f"{run}: no whole checkpoint" + ("" if step is None else f" of step {step}")
    raise DataError(f"{what}; train it first, or look with `tessera checkpoint verify {run}`")


def load_trained(run: str | Path, step: int | None = None) -> tuple[nn.Module, RunConfig]:
    """The model of a run's newest whole checkpoint, in evaluation mode on the CPU, and the run's configuration."""
    config = run_config(run)
    saved = newest_whole(run, step)
    state = weights_of(saved)
    model = MODELS[config.model.kind](config.model)
    model.load_state_dict(state, strict=False)
    absent = {name for name, _ in model.named_parameters()} - set(state)
    if absent:
        raise DataError(f"{saved.folder} lacks {len(absent)} tensors of the model, first {sorted(absent)[0]}")
    return model.eval(), config


def weights_of(saved: Saved) -> dict[str, Tensor]:
    """Parameters and buffers of the model alone, under its own names."""
    slices = Slices(saved.folder)
    parameters = {name: slices.whole("param", name) for name in slices.shapes if name.startswith(PREFIX)}
    buffers = {name: slices.buffer(name) for name in slices.buffers if name.startswith(PREFIX)}
    return {name.removeprefix(PREFIX): tensor for name, tensor in (parameters | buffers).items()}


# ------------------------------------------------------------------------------------------- partial load


def start_from(model: nn.Module, source: str | Path) -> str:
    """Copy what fits by name and shape from a run or an exported folder -> a table of what matched, for people.

    Raises DataError when nothing fits: a run that starts from nothing by mistake looks like one that learns slowly.
    """
    weights = _weights(source)
    target = model.state_dict()
    fits = {name for name in target.keys() & weights.keys() if target[name].shape == weights[name].shape}
    lines = [_row(name, target.get(name), weights.get(name)) for name in sorted(target.keys() | weights.keys())]
    if not fits:
        raise DataError(f"{source}: no tensor fits this model by name and shape\n" + "\n".join(lines[:20]))
    for name in fits:
        target[name].copy_(weights[name])
    counts = f"{len(fits)} of {len(target)} tensors start from {source}, {len(weights) - len(fits)} of it are left out"
    return "\n".join([counts, *lines])


def _row(name: str, ours: Tensor | None, theirs: Tensor | None) -> str:
    shape = [None if tensor is None else list(tensor.shape) for tensor in (ours, theirs)]
    if ours is None:
        return f"  left out  {name} {shape[1]}: not in this model"
    if theirs is None:
        return f"  new       {name} {shape[0]}: not in the source"
    if shape[0] != shape[1]:
        return f"  new       {name} {shape[0]}: {shape[1]} in the source"
    return f"  taken     {name} {shape[0]}"


def _weights(source: str | Path) -> dict[str, Tensor]:
    file = Path(source) / WEIGHTS_FILE
    if not file.is_file():
        return weights_of(newest_whole(source))
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{file} cannot be read ({error}); export the model again") from None
