"""The settings that a checkpoint is bound to, and those that may change with consent. Imports no torch."""

import functools
import importlib.metadata
import json
import re
import shlex
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pydantic

from data_pipeline.errors import ConfigError
from data_pipeline.settings import flatten
from pretrain.config import AdamWConfig, RunConfig, changeable
from pretrain.schema.saved import saved_run

FREE_TO_CHANGE = {
    "run": None,
    "initial": None,
    "guards": None,
    "tracking": None,
    "data": (
        "dataset", "datasets", "reweigh", "shuffle", "text_tokenizer", "image_tokenizer", "prefetch_steps", "workers",
        "max_bad_rate",
    ),
    "train": (
        "global_batch", "zero_stage", "micro_batch", "recompute", "checkpoint_every_steps", "keep_checkpoints",
        "keep_every_steps", "keep_best", "checkpoints", "log_every_steps", "sample_every_steps", "collective_timeout_s",
        "evaluate_every_steps", "patience",
    ),
}  # fmt: skip
"""Settings that may differ in a resumed run: paths, how work is split, what is written and when.
Datasets, their order and mixture are compared with the state of the stream; text tokenizer, image tokenizer and initial
weights with their fingerprints (fingerprints.py)."""

FREE_IN_DEEPSPEED = frozenset((
    "activation_checkpointing", "aio", "comet", "comms_logger", "csv_monitor", "dump_state", "flops_profiler",
    "memory_breakdown", "steps_per_print", "tensorboard", "wall_clock_breakdown", "wandb",
))  # fmt: skip
"""Keys of `deepspeed.extra` that only log or move bytes. Others, such as clipping, are assumed to change results."""
FREE_IN_ZERO = re.compile(
    r"stage\d?(_.*)?|.*bucket_size|overlap_comm|contiguous_gradients|reduce_scatter|allgather_partitions|offload_.*|"
    r"sub_group_size|round_robin_gradients|memory_efficient_linear"
)
"""Such keys within its `zero_optimization`: how state is split and moved."""


def identity(config: RunConfig) -> dict[str, Any]:
    """Return the settings that determine what is computed; a run resumes from a checkpoint only if they are equal."""
    tree = config.model_dump(mode="json")
    for section, keys in FREE_TO_CHANGE.items():
        if keys is None:
            tree.pop(section, None)
        else:
            tree[section] = {key: value for key, value in tree[section].items() if key not in keys}
    roles = {role: config.optim.of(role) for role in config.task.roles[1:]}
    tree["optim"]["roles"] = {
        role: own.model_dump(mode="json", include=set(AdamWConfig.model_fields)) for role, own in roles.items()
    }
    tree["deepspeed"] = {"extra": _deciding(tree["deepspeed"]["extra"])}
    return tree


def _deciding(extra: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of `deepspeed.extra` that may change results."""
    kept = {key: value for key, value in extra.items() if key not in FREE_IN_DEEPSPEED}
    zero = kept.pop("zero_optimization", {})
    inner = {key: value for key, value in zero.items() if not FREE_IN_ZERO.fullmatch(key)}
    return kept | ({"zero_optimization": inner} if inner else {})


@functools.cache
def versions() -> dict[str, str]:
    """Return the versions of packages that affect results, and the git revision if the program is in a repository."""
    made_by = {name: importlib.metadata.version(name) for name in ("tessera", "torch", "deepspeed")}
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):  # no git here
        found = ""
    return made_by | {"revision": found}


# ---------------------------------------------------------------------------------------- saved vs. current

Changes = dict[str, dict[str, Any]]
"""Dotted key -> {"from": value saved, "to": value now}."""


def differences(saved: Mapping[str, Any], now: RunConfig) -> Changes:
    """Return the settings in which a saved identity differs from a configuration.

    A field newer than the checkpoint is compared as its default value. `deepspeed` and `data.evaluation` are not
    compared with older checkpoints, which lack them (see `unchecked` for the former).
    """
    before, after = _flat(_as_of_today(saved, now)), _flat(identity(now))
    return {
        key: {"from": before.get(key), "to": after.get(key)}
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    }


def unchecked(saved: Mapping[str, Any], now: RunConfig) -> list[str]:
    """Return the settings of `now` that may change results but are not recorded in an older checkpoint."""
    return [] if "deepspeed" in saved else sorted(flatten({"deepspeed": identity(now)["deepspeed"]}))


def _as_of_today(saved: Mapping[str, Any], now: RunConfig) -> dict[str, Any]:
    """Convert a saved identity to the current schema: add the free settings, validate, and reduce to the identity.

    Keys unknown to the current schema are kept unchanged; so is a tree that the schema rejects as a whole.
    """
    tree, unknown = _completed(saved, now), {}
    try:
        RunConfig.model_validate(tree)
    except pydantic.ValidationError as error:
        strange = [problem["loc"] for problem in error.errors() if problem["type"] == "extra_forbidden"]
        unknown = {key: value for place in strange for key, value in _take_out(tree, place).items()}
    try:
        return identity(RunConfig.model_validate(tree)) | unknown
    except pydantic.ValidationError:
        return saved_run(saved)


def _completed(saved: Mapping[str, Any], now: RunConfig) -> dict[str, Any]:
    """Return a copy of the saved tree with the current values of the free settings."""
    whole = now.model_dump(mode="json")
    tree = {"deepspeed": whole["deepspeed"]} | {key: _copied(value) for key, value in saved_run(saved).items()}
    tree["data"] = {"evaluation": whole["data"]["evaluation"]} | tree.get("data", {})
    for section, keys in FREE_TO_CHANGE.items():
        if keys is None:
            tree[section] = whole[section]
        else:
            tree[section] = {key: whole[section][key] for key in keys} | tree.get(section, {})
    return tree


def _copied(value: Any) -> Any:
    return {key: _copied(below) for key, below in value.items()} if isinstance(value, Mapping) else value


def _take_out(tree: dict[str, Any], place: Sequence[int | str]) -> dict[str, Any]:
    """Remove the key at pydantic's `place`, which also names the chosen member of a union -> {dotted key: value}."""
    *sections, leaf = map(str, place)
    names = []
    for section in sections:
        if isinstance(below := tree.get(section), dict):
            names.append(section)
            tree = below
    return {".".join((*names, leaf)): tree.pop(leaf, None)}


def values_of(config: RunConfig, keys: Iterable[str]) -> dict[str, Any]:
    """Return the values of dotted keys of the identity, for the claim of an attempt."""
    settings = _flat(identity(config))
    return {key: settings.get(key) for key in keys}


def _flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten an identity to dotted keys; evaluation data, which may be several by name, are one setting."""
    flat = flatten(tree)
    if isinstance(data := tree.get("data"), Mapping) and isinstance(whole := data.get("evaluation"), Mapping):
        flat = {key: value for key, value in flat.items() if not key.startswith("data.evaluation.")}
        flat["data.evaluation"] = dict(whole)
    return flat


def check_identity(
    saved: Mapping[str, Any], now: RunConfig, where: str, consented: frozenset[str] = frozenset()
) -> Changes:
    """Compare a saved identity with a configuration -> the consented changes.

    Raises ConfigError listing every setting that differs without consent, and how to give consent where it is allowed.
    """
    found = differences(saved, now)
    agreed = {key: change for key, change in found.items() if _covered(key, found, consented)}
    refused = {key: change for key, change in found.items() if key not in agreed}
    if refused:
        lines = [f"{key}: {change['from']!r} saved, {change['to']!r} now" for key, change in refused.items()]
        remedy = "restore these values, or set another `run` folder"
        if consent := [_option(key, change["to"]) for key, change in refused.items() if changeable(key)]:
            remedy += f"; to resume with the new value add {' '.join(consent)}"
        raise ConfigError(f"{where} was made under another configuration; {remedy}\n  " + "\n  ".join(lines))
    return agreed


def _covered(key: str, found: Changes, consented: frozenset[str]) -> bool:
    """Return whether the change of `key` has consent, for itself or through the same change of the main optimizer."""
    main = re.sub(r"^optim\.roles\.[^.]+\.", "optim.", key)
    named = key in consented or (main in consented and found.get(main) == found[key])
    return named and changeable(key) is not None


def refuse_idle(asked: Iterable[str], changed: Changes, saved: Mapping[str, Any], now: RunConfig, where: str) -> None:
    """Raise ConfigError if `--change` was given for a setting that stays as it was saved.

    asked: the settings of `--change`; changed: those that change. A restart may repeat the change that the checkpoint
    was made under, and an old checkpoint may not record the setting. saved: the checkpoint's state.
    """
    made: dict[str, Any] = {}
    for change in saved.get("changes", []):
        made |= {key: told.get("to") for key, told in change.get("settings", {}).items()}
    before = _flat(saved_run(saved["identity"]))
    for key, value in values_of(now, asked).items():
        repeated = key in made and made[key] == value
        unknown = key == "data.evaluation" and key not in before
        if not (key in changed or repeated or unknown):
            raise ConfigError(
                f"--change {key}={_as_word(value)} changes nothing: {where} was made with this value; give another, or "
                "leave --change out"
            )


def _option(key: str, value: Any) -> str:
    return f"--change {shlex.quote(f'{key}={_as_word(value)}')}"


def _as_word(value: Any) -> str:
    """Return a value as an override gives it."""
    if isinstance(value, list | Mapping):
        return json.dumps(value, ensure_ascii=False)
    return "" if value is None else str(value)
