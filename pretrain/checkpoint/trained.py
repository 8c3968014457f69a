"""Loads a model from a checkpoint or an exported folder on one device, to evaluate, export or start another run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from data_pipeline.errors import ConfigError, DataError
from data_pipeline.foreign import foreign_model
from data_pipeline.settings import flatten, override_settings
from data_pipeline.storage import open_storage
from pretrain.checkpoint.catalog import Saved, committed, names, read_json
from pretrain.checkpoint.layout import Slices
from pretrain.config import RunConfig, checkpoint_root
from pretrain.interchange.folder import CONFIG_FILE, WEIGHTS_FILE, load_config, load_model
from pretrain.models import MODELS
from pretrain.schema import ModelConfig, task_for
from pretrain.schema.saved import saved_run

PREFIX = "model."
"""Prefix of the model's tensor names within a task."""
NOT_SAID = "(not recorded in the export)"
"""Placeholder for a dataset that an exported model does not name."""


class Trained(NamedTuple):
    """A model in evaluation mode on the CPU, the settings to use it with, and the step of its weights.

    step: None for an exported model that does not record it.
    """

    model: nn.Module
    config: RunConfig
    step: int | None


# ------------------------------------------------------------------------------------------------- settings


def run_config(source: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Return the configuration of a run, or of an exported model as far as recorded, with `key=value` overrides.

    Raises ConfigError if there is none or an override names the model, DataError if it is damaged.
    """
    if fixed := next((text for text in overrides if text.partition("=")[0].split(".")[0] == "model"), None):
        raise ConfigError(f"override {fixed!r}: the weights in {source} determine the model; leave it out")
    tree = saved_tree(source)
    tree = _of_export(source, tree) if is_export(tree) else tree
    return override_settings(RunConfig, tree, overrides, f"{source}/{CONFIG_FILE}")


def saved_tree(source: str | Path) -> dict[str, Any]:
    """Return the contents of config.json of a run or an exported model.

    Raises ConfigError if there is none, DataError if it is damaged or of another program.
    """
    if not (Path(source) / CONFIG_FILE).is_file():
        raise no_run(source)
    tree = saved_run(read_json(open_storage(source), CONFIG_FILE))
    if not isinstance(tree.get("model"), dict):
        hint = foreign_model(source)
        raise DataError(
            f"{source}/{CONFIG_FILE} does not describe a tessera model; restore it, or export the model again{hint}"
        )
    return tree


def is_export(tree: Mapping[str, Any]) -> bool:
    """Return whether this is the config.json of an exported model: a run's has training settings."""
    return "train" not in tree


def _of_export(source: str | Path, tree: Mapping[str, Any]) -> dict[str, Any]:
    """Complete the settings of an export to a run's configuration, with placeholders for what it does not record."""
    known = {key: value for key, value in tree.items() if key in RunConfig.model_fields}
    unsaid = {
        "run": str(source),
        "task": {"kind": task_for(load_config(source))},
        "data": {"dataset": NOT_SAID},
        "train": {"steps": 1, "global_batch": 2, "zero_stage": 0},
        "optim": {"lr": 1.0},
        "tracking": {"uri": ""},
    }
    return unsaid | known


# ---------------------------------------------------------------------------------------------- checkpoints


def root_of(run: str | Path, overrides: Sequence[str] = ()) -> str:
    """Return the root of a run's checkpoints. Raises ConfigError for an exported model, which has none."""
    if not (Path(run) / CONFIG_FILE).is_file():
        if foreign_model(run):
            raise no_run(run)
        return checkpoint_root(run, None)
    if is_export(saved_tree(run)):
        raise ConfigError(f"{run} is an exported model and has no checkpoints; use the run that it was exported from")
    return checkpoint_root(run, run_config(run, overrides).train.checkpoints)


def no_run(run: str | Path) -> ConfigError:
    """Return the error for a path that is not a run's folder."""
    what = "is not a run: it has no config.json" if Path(run).is_dir() else "is not a folder"
    return ConfigError(f"{run} {what}; use the folder in `run:` of a configuration{foreign_model(run)}")


def newest_whole(
    run: str | Path, step: int | None = None, label: str | None = None, overrides: Sequence[str] = ()
) -> Saved:
    """Return the newest whole checkpoint of a run, optionally only of step `step` or with the name `label`.

    Raises ConfigError if no checkpoint has that name, DataError if no such checkpoint is whole.
    """
    root = root_of(run, overrides)
    rows = [saved for saved in committed(root) if step in (None, saved.step)]
    if label is not None:
        labels = {known: folder for folder, known in names(root)}
        if label not in labels:
            raise ConfigError(
                f"{run}: no checkpoint is named {label!r}; there are {', '.join(sorted(labels)) or 'none'}"
            )
        rows = [saved for saved in rows if saved.name == labels[label]]
    for saved in reversed(rows):
        if not saved.faults():
            return saved
    if not rows and step is None and label is None:
        raise DataError(f"{run}: no committed checkpoint; train the run first")
    asked = ("" if step is None else f" of step {step}") + ("" if label is None else f" named {label!r}")
    raise DataError(
        f"{run}: no valid checkpoint{asked}; see `tessera checkpoint list {run}` and `tessera checkpoint verify {run}`"
    )


def load_trained(
    source: str | Path,
    step: int | None = None,
    label: str | None = None,
    overrides: Sequence[str] = (),
    ema: bool = False,
) -> Trained:
    """Load the model of an exported folder, or of a run's newest whole checkpoint (of `step`; named `label`).

    ema: take the average of the weights instead.
    """
    config = run_config(source, overrides)
    model, _, at = load_weights(source, step, label, overrides, ema)
    return Trained(model, config, at)


def load_weights(
    source: str | Path,
    step: int | None = None,
    label: str | None = None,
    overrides: Sequence[str] = (),
    ema: bool = False,
) -> tuple[nn.Module, ModelConfig, int | None]:
    """Load as `load_trained` without settings, which an export may lack -> model, its configuration, step."""
    tree = saved_tree(source)
    if is_export(tree):
        if ema:
            raise ConfigError(f"{source} is an exported model, with one set of weights; leave --ema out")
        if step is not None or label is not None:
            raise ConfigError(f"{source} is an exported model with one checkpoint; leave --step and --name out")
        return *load_model(source), tree.get("step")
    saved = newest_whole(source, step, label, overrides)
    config = run_config(source, overrides).model
    model, state = MODELS[config.kind](config), weights_of(saved, ema)
    absent = {name for name, _ in model.named_parameters()} - set(state)
    if absent:
        raise DataError(f"{saved.folder} lacks {len(absent)} tensors of the model, first {sorted(absent)[0]}")
    try:
        model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise DataError(f"{saved.folder} does not fit the model of {source}/{CONFIG_FILE} ({error})") from None
    return model.eval(), config, saved.step


def weights_of(saved: Saved, ema: bool = False) -> dict[str, Tensor]:
    """Return only the model's parameters and buffers of a checkpoint, under the model's own names.

    ema: the average of the parameters instead; of a frozen one it is the parameter. Raises ConfigError if the
    checkpoint holds none.
    """
    slices = Slices(saved.folder)
    if ema and not any("ema" in slices.kinds(name) for name in slices.shapes):
        raise ConfigError(f"{saved.folder} holds no average of the weights; train with optim.ema, or leave --ema out")
    kinds = {name: "ema" if ema and "ema" in slices.kinds(name) else "param" for name in slices.shapes}
    parameters = {name: slices.whole(kind, name) for name, kind in kinds.items() if name.startswith(PREFIX)}
    buffers = {name: slices.buffer(name) for name in slices.buffers if name.startswith(PREFIX)}
    return {name.removeprefix(PREFIX): tensor for name, tensor in (parameters | buffers).items()}


# ------------------------------------------------------------------------------------------- partial load


def start_from(model: nn.Module, source: str | Path, config: ModelConfig | None = None) -> str:
    """Copy tensors that match by name and shape from a run or an exported folder -> a readable table of matches.

    Raises DataError if nothing matches: a run that starts from scratch by mistake only seems to learn slowly.
    config: of the model; if given, ConfigError is raised for a source that computes something else with equal tensors.
    """
    if config is not None:
        check_same_model(config, source)
    weights = weights_in(source)
    target = model.state_dict()
    fits = {name for name in target.keys() & weights.keys() if target[name].shape == weights[name].shape}
    lines = [_row(name, target.get(name), weights.get(name)) for name in sorted(target.keys() | weights.keys())]
    if not fits:
        raise DataError(f"{source}: no tensor fits this model by name and shape\n" + "\n".join(lines[:20]))
    for name in fits:
        target[name].copy_(weights[name])
    counts = f"{len(fits)} of {len(target)} tensors start from {source}, {len(weights) - len(fits)} of it are not used"
    return "\n".join([counts, *lines])


INVISIBLE = ("activation", "norm_eps", "heads", "norm_groups")
"""Settings of a model that change what it computes without changing any tensor's shape."""
SHAPED_BY = {"heads": "width", "norm_groups": "channels"}
"""Setting -> the size it depends on: between weights that differ in this size, the setting is not compared."""


def check_same_model(config: ModelConfig, source: str | Path) -> None:
    """Raise ConfigError naming the INVISIBLE settings that differ in the source's config.json, if it has one."""
    if not (Path(source) / CONFIG_FILE).is_file():
        return
    tree = saved_tree(source)
    there = load_config(source) if is_export(tree) else run_config(source).model
    if type(there) is not type(config):
        return
    theirs, ours = (flatten(one.model_dump(mode="json")) for one in (there, config))
    lines = []
    for key, value in ours.items():
        section, dot, name = key.rpartition(".")
        size = section + dot + SHAPED_BY.get(name, name)
        if name in INVISIBLE and theirs[key] != value and (name not in SHAPED_BY or theirs[size] == ours[size]):
            lines.append(f"model.{key}: {theirs[key]} in the source, {value} in this run")
    if lines:
        raise ConfigError(
            f"initial={source}: these settings change what the weights compute; use the values they were "
            "trained with\n  " + "\n  ".join(lines)
        )


def _row(name: str, ours: Tensor | None, theirs: Tensor | None) -> str:
    shape = [None if tensor is None else list(tensor.shape) for tensor in (ours, theirs)]
    if ours is None:
        return f"  left out  {name} {shape[1]}: not in this model"
    if theirs is None:
        return f"  new       {name} {shape[0]}: not in the source"
    if shape[0] != shape[1]:
        return f"  new       {name} {shape[0]}: {shape[1]} in the source"
    return f"  taken     {name} {shape[0]}"


def weights_in(source: str | Path) -> dict[str, Tensor]:
    """Return the tensors of an exported folder, or of a run's newest whole checkpoint."""
    file = Path(source) / WEIGHTS_FILE
    if not file.is_file():
        return weights_of(newest_whole(source))
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{file} cannot be read ({error}); export the model again") from None
