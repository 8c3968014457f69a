"""What `tessera checkpoint` does: what is saved and why it stays, is it whole, name it, take it elsewhere, tidy up."""

import dataclasses
from pathlib import Path
from typing import Any

from data_pipeline.errors import ConfigError, DataError
from data_pipeline.outputs import refuse_used
from data_pipeline.storage import open_storage
from pretrain.checkpoint.catalog import (
    NAME,
    Retention,
    Saved,
    as_json,
    committed,
    names,
    newest_claim,
    numbers,
    put_once,
    tidy,
)
from pretrain.checkpoint.trained import load_trained, newest_whole, no_run, root_of, run_config
from pretrain.checkpoint.universal import export_universal
from pretrain.interchange.folder import export_model
from pretrain.interchange.hub import export_layout
from pretrain.interchange.layouts import LAYOUTS


def list_(run: str | Path) -> list[dict[str, Any]]:
    """The committed checkpoints of a run, oldest first, and why each stays."""
    root = _root(run)
    rows = committed(root)
    kept = _retention(run).reasons(root, rows)
    return [
        {"step": saved.step, "attempt": saved.attempt, "folder": saved.folder, "kept": ", ".join(kept[saved.name])}
        | _told_by(saved)
        for saved in rows
    ]


def _told_by(saved: Saved) -> dict[str, Any]:
    """What its manifest says; nothing where that is damaged, which is for `verify` to tell."""
    try:
        return {"world": saved.manifest["world"], "bytes": sum(entry["bytes"] for entry in saved.manifest["files"])}
    except DataError:
        return {"world": None, "bytes": None}


def verify(run: str | Path) -> dict[str, Any]:
    """Sizes and digests of all checkpoints. Raises DataError naming each file that is off, or when there is none."""
    rows = committed(_root(run))
    if not rows:
        raise DataError(f"{run}: no committed checkpoint; train the run first")
    faults = [f"{saved.name}/{line}" for saved in rows for line in saved.faults()]
    if faults:
        raise DataError(f"{run}: {len(faults)} files are off\n  " + "\n  ".join(faults))
    return {"checkpoints": len(rows), "newest_step": rows[-1].step, "whole": True}


def export(run: str | Path, output: str | Path, step: int | None = None, form: str = "tessera") -> Path:
    """The newest whole checkpoint (or that of a step) as `form`: tessera, deepspeed, or one of LAYOUTS.

    tessera: config.json and model.safetensors, which every other command reads. deepspeed: a universal checkpoint with
    the optimizer's state. A layout: model.safetensors under the names of that public model; those of transformers with
    its config.json, so that `from_pretrained` takes the folder.
    """
    if form not in ("tessera", "deepspeed", *LAYOUTS):
        raise ConfigError(f"--format {form} is not known; use tessera, deepspeed, {', '.join(sorted(LAYOUTS))}")
    refuse_used(output)
    if form == "deepspeed":
        return export_universal(newest_whole(run, step), output)
    model, config = load_trained(run, step)
    if form == "tessera":
        return export_model(output, config.model, model.state_dict())
    return export_layout(output, form, config.model, model.state_dict())


def name(run: str | Path, label: str, step: int | None = None, remove: bool = False) -> dict[str, Any]:
    """Keep a checkpoint from retention under a name, or (`remove`) no longer."""
    root, entry = _root(run), f"name-{label}.json"
    if not NAME.fullmatch(entry):
        raise ConfigError(f"name {label!r}: use letters, digits, '_', '-' and '.' only")
    taken = {label for _, label in names(root)}
    if remove:
        if label not in taken:
            there = ", ".join(sorted(taken)) or "none"
            raise ConfigError(f"{run}: no checkpoint is named {label!r}; there are {there}")
        open_storage(root).remove(entry)
        return {"removed": label}
    saved = newest_whole(run, step)
    if label in taken:
        raise ConfigError(f"{run}: a checkpoint is named {label!r} already; remove that name first with --remove")
    put_once(open_storage(root), entry, as_json({"checkpoint": saved.name}))
    return {"named": label, "folder": saved.folder}


def gc(run: str | Path, keep: int | None = None) -> dict[str, Any]:
    """Remove checkpoints that nothing keeps (`keep` of the newest instead of the run's own number) and orphans.

    An orphan, a folder that was never committed, goes when its attempt was overtaken or a later step was committed: a
    newer one may be one that a live run is writing.
    """
    root, kept = _root(run), _retention(run)
    rows = committed(root)
    newest = numbers(rows[-1].name) if rows else (-1, -1)
    owner = newest_claim(root)

    def may_go(step: int, attempt: int) -> bool:
        return attempt < owner or (step, attempt) < newest

    return {"removed": tidy(root, dataclasses.replace(kept, last=keep or kept.last), may_go)}


def _root(run: str | Path) -> str:
    """Where its checkpoints lie, also if it lost its configuration. Raises ConfigError for what is no run."""
    root = root_of(run)
    if not (Path(run) / "config.json").is_file() and not Path(root).is_dir():
        raise no_run(run)
    return root


def _retention(run: str | Path) -> Retention:
    known = (Path(run) / "config.json").is_file()
    return Retention.of(run_config(run).train) if known else Retention(1)
