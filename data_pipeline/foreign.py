"""Recognise folders with models of other programs, to explain how to import them."""

import json
from pathlib import Path

LAYOUT_KINDS = ("bert", "clip", "electra", "vit")
"""Kinds of transformers models that `tessera checkpoint import` reads, by their `model_type`."""
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "open_clip_pytorch_model.bin",
    "open_clip_model.safetensors",
)
CONFIG = "config.json"


def foreign_model(folder: str | Path) -> str:
    """Return what to append to an error about a foreign model's folder: how to import it. Empty for anything else."""
    path = Path(folder)
    trees = [_tree(path / part / CONFIG) for part in (".", "discriminator", "generator")]
    kind = next((str(tree["model_type"]) for tree in trees if "model_type" in tree), "")
    if not kind and ("model" in trees[0] or not any((path / name).is_file() for name in WEIGHTS)):
        return ""
    known = kind if kind in LAYOUT_KINDS else f"{{{','.join(LAYOUT_KINDS)}}}"
    way = f"tessera checkpoint import {folder} OUT --format transformers-{known}"
    return f"; it looks like another program's model; convert it with `{way}`"


def _tree(path: Path) -> dict[str, object]:
    """Return the contents of a config.json; empty if it is missing or invalid."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return tree if isinstance(tree, dict) else {}
