"""The few things of kustomize that deploy/ uses, applied by hand: what `kubectl kustomize FOLDER` prints, as trees.

resources, namespace, images and JSON patches by target. Anything else in a kustomization fails the test that asks.
"""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

Tree = dict[str, Any]
KNOWN = {"apiVersion", "kind", "resources", "namespace", "images", "patches"}
CLUSTER_WIDE = {"Namespace"}


def kustomize(folder: Path) -> list[Tree]:
    """The objects of a kustomization."""
    told = read(folder)
    trees: list[Tree] = []
    for name in told["resources"]:
        path = folder / name
        trees += kustomize(path) if path.is_dir() else [tree for tree in yaml.safe_load_all(path.read_text()) if tree]
    for patch in told.get("patches", []):
        found = [tree for tree in trees if matches(tree, patch["target"])]
        assert found, f"{folder}: {patch['target']} is none of the objects"
        for tree in found:
            for change in yaml.safe_load((folder / patch["path"]).read_text()):
                change_at(tree, change)
    for image in told.get("images", []):
        rename_image(trees, image)
    for tree in trees:
        if "namespace" in told and tree["kind"] not in CLUSTER_WIDE:
            tree["metadata"]["namespace"] = told["namespace"]
    return trees


def read(folder: Path) -> Tree:
    told: Tree = yaml.safe_load((folder / "kustomization.yaml").read_text())
    assert told.keys() <= KNOWN, f"{folder}: {sorted(told.keys() - KNOWN)} is not known here"
    return told


def files(folder: Path) -> Iterator[Path]:
    """Every file that a kustomization names, and itself."""
    told = read(folder)
    yield folder / "kustomization.yaml"
    for name in [*told["resources"], *(patch["path"] for patch in told.get("patches", []))]:
        path = (folder / name).resolve()
        yield from files(path) if path.is_dir() else [path]


def matches(tree: Tree, target: Tree) -> bool:
    return tree["kind"] == target["kind"] and tree["metadata"]["name"] == target.get("name", tree["metadata"]["name"])


def change_at(tree: Tree, change: Tree) -> None:
    """One operation of RFC 6902 on members of objects."""
    *steps, last = [step.replace("~1", "/").replace("~0", "~") for step in change["path"].split("/")[1:]]
    place: Any = tree
    for step in steps:
        place = place[int(step)] if isinstance(place, list) else place[step]
    assert change["op"] in ("add", "replace") and isinstance(place, dict), change
    assert change["op"] == "add" or last in place, f"{change['path']} is not there to be replaced"
    place[last] = copy.deepcopy(change["value"])


def rename_image(tree: Any, image: Tree) -> None:
    """In every container, wherever it stands."""
    if isinstance(tree, list):
        for item in tree:
            rename_image(item, image)
    elif isinstance(tree, dict):
        for key, value in tree.items():
            for container in value if key in ("containers", "initContainers") and isinstance(value, list) else []:
                name, _, tag = container["image"].partition(":")
                if name == image["name"]:
                    container["image"] = f"{image.get('newName', name)}:{image.get('newTag', tag)}"
            rename_image(value, image)
