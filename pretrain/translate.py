"""Configurations that earlier versions saved, as this one reads them. YAML files and overrides are never translated."""

from collections.abc import Mapping
from typing import Any


def saved_run(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The saved configuration, or identity, of a run."""
    return {**tree, "model": saved_model(tree["model"])} if "model" in tree else dict(tree)


def saved_model(tree: Any) -> Any:
    """The saved configuration of a model; what is none stays as it is, for the schema to refuse.

    A vqgan without `norm_groups` had four channels a group and at most 32 groups, which is 32 from 128 channels on.
    """
    if not isinstance(tree, Mapping) or tree.get("kind") != "vqgan" or "norm_groups" in tree:
        return tree
    channels = tree.get("channels")
    return {**tree, "norm_groups": "width/4" if isinstance(channels, int) and channels < 128 else 32}
