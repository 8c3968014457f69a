"""Translation of configurations saved by earlier versions. YAML files and overrides are never translated."""

from collections.abc import Mapping
from typing import Any

import pydantic

from pretrain.schema import TaskConfig
from pretrain.schema.names import RENAMED
from pretrain.schema.tasks import check_best
from pretrain.schema.vqgan import MIDDLE, sides_of_levels

BEFORE_FIELDS: dict[str, dict[str, Any]] = {
    "bert": {"activation": "gelu", "norm_eps": 1e-12},
    "electra": {"activation": "gelu", "norm_eps": 1e-12},
    "gpt": {"activation": "gelu", "norm_eps": 1e-5},
    "clip": {"norm_eps": 1e-5, "logit_scale": 1 / 0.07, "logit_bias": None},
}
"""Values that were fixed before they became fields, by kind of model."""


def saved_run(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Translate the saved configuration, or identity, of a run."""
    tree = {key: _renamed(key, section) for key, section in _renamed("", tree).items()}
    model = {"model": _with_known_sides(saved_model(tree["model"]))} if "model" in tree else {}
    return {**tree, **model, **_with_known_best(tree)}


def saved_fingerprints(tree: Mapping[Any, Any]) -> dict[str, str]:
    """Rename saved fingerprints to the current names."""
    return {RENAMED.get(str(name), str(name)): str(fingerprint) for name, fingerprint in tree.items()}


def _renamed(section: str, tree: Any) -> Any:
    """Rename the keys of `tree` to the current names; leave anything but a mapping for the schema to refuse."""
    if not isinstance(tree, Mapping):
        return tree
    prefix = f"{section}." if section else ""
    return {RENAMED.get(f"{prefix}{key}", f"{prefix}{key}").removeprefix(prefix): value for key, value in tree.items()}


def _with_known_best(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Drop a `train.keep_best` that is invalid now; earlier versions accepted it and kept the lowest or nothing."""
    train = tree.get("train")
    if not isinstance(train, Mapping) or not train.get("keep_best"):
        return {}
    try:
        task = pydantic.TypeAdapter(TaskConfig).validate_python(tree.get("task"))
        check_best(train["keep_best"], task, train["steps"], _evaluated(tree))
    except (AttributeError, KeyError, TypeError, ValueError):  # pydantic's error is a ValueError
        return {"train": {**train, "keep_best": ""}}
    return {}


def _evaluated(tree: Mapping[str, Any]) -> list[str]:
    """Return the names of the evaluations made in training, as `RunConfig.evaluated` does."""
    held_out = tree["data"].get("evaluation") if tree["train"].get("evaluate_every_steps") else None
    return [*held_out] if isinstance(held_out, Mapping) else [""] if held_out else []


def _with_known_sides(tree: Any) -> Any:
    """Drop sides in `attention_at` that no vqgan level has; with none left, only the middle blocks have attention.

    Exported models keep these sides: the id that names their codes is a digest of the configuration.
    """
    try:
        at, sides = tree["attention_at"], sides_of_levels(tree["image_size"], len(tree["multipliers"]))
        known = [side for side in at if side in (*sides, MIDDLE)]
    except (KeyError, TypeError):
        return tree
    return {**tree, "attention_at": known or [MIDDLE]} if at else tree


def saved_model(tree: Any) -> Any:
    """Translate the saved configuration of a model; return anything else unchanged, for the schema to refuse.

    A vqgan without `norm_groups` had four channels per group and at most 32 groups, that is 32 from 128 channels on.
    """
    if not isinstance(tree, Mapping) or "kind" not in tree:
        return tree
    channels = tree.get("channels")
    groups = "width/4" if isinstance(channels, int) and channels < 128 else 32
    new = {"norm_groups": groups} if tree["kind"] == "vqgan" else BEFORE_FIELDS.get(str(tree["kind"]), {})
    return {**new, **tree}
