"""What a checkpoint belongs to: the settings under which alone it may be continued."""

import functools
import importlib.metadata
import subprocess
from pathlib import Path
from typing import Any

from data_pipeline.errors import ConfigError
from data_pipeline.settings import flatten
from pretrain.config import RunConfig
from pretrain.translate import saved_run

FREE_TO_CHANGE = {
    "run": None,
    "initial": None,
    "guards": None,
    "tracking": None,
    "deepspeed": None,
    "data": (
        "dataset", "datasets", "reweigh", "shuffle", "vocabulary", "tokenizer", "evaluation", "prefetch_steps",
        "workers", "max_bad_rate",
    ),
    "train": (
        "global_batch", "zero_stage", "micro_batch", "recompute", "checkpoint_every_steps", "keep_checkpoints",
        "keep_every_steps", "keep_best", "checkpoints", "log_every_steps", "sample_every_steps", "collective_timeout_s",
    ),
}  # fmt: skip
"""Settings that a resumed run may have differently: where things lie, how work is split, what is written when.
Datasets, their order and mixture are held to the state of the stream, the tokenizer to its fingerprint."""


def identity(config: RunConfig) -> dict[str, Any]:
    """The settings that decide what is computed; a checkpoint is continued only under equal ones."""
    tree = config.model_dump(mode="json")
    for section, keys in FREE_TO_CHANGE.items():
        if keys is None:
            tree.pop(section, None)
        else:
            tree[section] = {key: value for key, value in tree[section].items() if key not in keys}
    return tree


@functools.cache
def versions() -> dict[str, str]:
    """What computed it: packages that decide the numbers, and the commit where the program lies in a repository."""
    made_by = {name: importlib.metadata.version(name) for name in ("tessera", "torch", "deepspeed")}
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):  # no git here
        found = ""
    return made_by | {"revision": found}


def check_identity(saved: dict[str, Any], now: dict[str, Any], where: str) -> None:
    """Raises ConfigError listing every setting that differs."""
    before, after = flatten(saved_run(saved)), flatten(now)
    lines = [
        f"{key}: {before.get(key)!r} saved, {after.get(key)!r} now"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]
    if lines:
        remedy = "restore these values, or give the run another folder"
        raise ConfigError(f"{where} was made under another configuration; {remedy}\n  " + "\n  ".join(lines))
