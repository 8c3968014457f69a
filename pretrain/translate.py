"""Configurations that earlier versions saved, as this one reads them. YAML files and overrides are never translated."""

from collections.abc import Mapping
from typing import Any

from pretrain.best import check_best
from pretrain.config import MIDDLE, sides_of_levels

BEFORE_FIELDS: dict[str, dict[str, Any]] = {
    "bert": {"activation": "gelu", "norm_eps": 1e-12},
    "electra": {"activation": "gelu", "norm_eps": 1e-12},
    "gpt": {"activation": "gelu", "norm_eps": 1e-5},
    "clip": {"norm_eps": 1e-5},
}
"""What was fixed before it became a field, by the kind of the model."""


def saved_run(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The saved configuration, or identity, of a run."""
    model = {"model": _with_known_sides(saved_model(tree["model"]))} if "model" in tree else {}
    return {**tree, **model, **_with_known_best(tree)}


def _with_known_best(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out a `train.keep_best` that is refused today; it was accepted once, and kept the lowest or nothing."""
    train, objective = tree.get("train"), tree.get("objective", {})
    if not isinstance(train, Mapping) or not train.get("keep_best"):
        return {}
    try:
        check_best(train["keep_best"], objective, train["steps"])
    except (AttributeError, KeyError, TypeError, ValueError):
        return {"train": {**train, "keep_best": ""}}
    return {}


def _with_known_sides(tree: Any) -> Any:
    """Leave out sides of `attention_at` that no level of a vqgan has: alone they gave the middle blocks attention.

    An exported model keeps them: its id, by which codes are known, is a digest of its configuration.
    """
    try:
        at, sides = tree["attention_at"], sides_of_levels(tree["image_size"], len(tree["multipliers"]))
        known = [side for side in at if side in (*sides, MIDDLE)]
    except (KeyError, TypeError):
        return tree
    return {**tree, "attention_at": known or [MIDDLE]} if at else tree


def saved_model(tree: Any) -> Any:
    """The saved configuration of a model; what is none stays as it is, for the schema to refuse.

    A vqgan without `norm_groups` had four channels a group and at most 32 groups, which is 32 from 128 channels on.
    """
    if not isinstance(tree, Mapping) or "kind" not in tree:
        return tree
    channels = tree.get("channels")
    groups = "width/4" if isinstance(channels, int) and channels < 128 else 32
    new = {"norm_groups": groups} if tree["kind"] == "vqgan" else BEFORE_FIELDS.get(str(tree["kind"]), {})
    return {**new, **tree}
