"""The `tessera checkpoint` commands: list, verify, export, import, name and garbage-collect checkpoints."""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.errors import ConfigError, DataError
from data_pipeline.outputs import holds_same, refuse_used
from data_pipeline.storage import open_storage
from data_pipeline.text.kinds import open_tokenizer
from data_pipeline.text.tokenizer import TextTokenizer
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
from pretrain.checkpoint.fingerprints import check_files, recorded
from pretrain.checkpoint.trained import (
    is_export,
    load_weights,
    newest_whole,
    no_run,
    root_of,
    run_config,
    saved_tree,
)
from pretrain.checkpoint.universal import export_universal
from pretrain.config import FINGERPRINTS, RunConfig
from pretrain.interchange.folder import export_model, read_notes, write_notes
from pretrain.interchange.foreign import read_layout
from pretrain.interchange.hub import POOLED_AT_END, WITH_TOKEN_IDS, export_layout
from pretrain.interchange.layouts import LAYOUTS, check_derived


def list_(run: str | Path, overrides: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Return the committed checkpoints of a run, oldest first, and why each is kept."""
    root = _root(run, overrides)
    rows = committed(root)
    kept = _retention(run, overrides).reasons(root, rows)
    return [
        {"step": saved.step, "attempt": saved.attempt, "folder": saved.folder, "kept": ", ".join(kept[saved.name])}
        | _told_by(saved)
        for saved in rows
    ]


def _told_by(saved: Saved) -> dict[str, Any]:
    """Return world size and bytes from the manifest; None if it is damaged, which `verify` reports."""
    try:
        return {"world": saved.manifest["world"], "bytes": sum(entry["bytes"] for entry in saved.manifest["files"])}
    except DataError:
        return {"world": None, "bytes": None}


def verify(run: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Check sizes and digests of all checkpoints. Raises DataError naming each bad file, or if there are none."""
    rows = committed(_root(run, overrides))
    if not rows:
        raise DataError(f"{run}: no committed checkpoint; train the run first")
    faults = [f"{saved.name}/{line}" for saved in rows for line in saved.faults()]
    if faults:
        raise DataError(f"{run}: {len(faults)} damaged files\n  " + "\n  ".join(faults))
    return {"checkpoints": len(rows), "newest_step": rows[-1].step, "whole": True}


def export(
    run: str | Path,
    output: str | Path,
    step: int | None = None,
    form: str = "tessera",
    label: str | None = None,
    overrides: Sequence[str] = (),
    again: bool = False,
    ema: bool = False,
) -> Path:
    """Export the newest whole checkpoint (of `step`, or named `label`), or an exported model, in the format `form`.

    tessera: config.json and model.safetensors, which every other command reads; `overrides` change the settings
    recorded there. deepspeed: a universal checkpoint with the optimizer's state. One of LAYOUTS: model.safetensors with
    the tensor names of that public model, and for transformers its config.json, so that `from_pretrained` reads the
    folder. The latter two also have a tessera.json with what our own config.json records. ema: write the average of
    the weights. again: accept a folder that already holds this export. Raises ConfigError for a used folder, or if the
    run's vocabulary or image tokenizer is no longer the one it was trained with.
    """
    if form not in ("tessera", "deepspeed", *LAYOUTS):
        raise ConfigError(f"--format {form} is not known; use tessera, deepspeed, {', '.join(sorted(LAYOUTS))}")
    if again and holds_same(output, lambda aside: export(run, aside, step, form, label, overrides, ema=ema)):
        return Path(output)
    refuse_used(output)
    settings = _settings_of(run, overrides)
    if settings:
        check_files(run, settings, missing_ok=True)
    noted = _noted(settings, recorded(run))
    noted |= {"weights": "ema"} if ema else {}
    if form == "deepspeed" and ema:
        raise ConfigError(
            "--ema: a universal checkpoint continues the training; use another --format, or leave --ema out"
        )
    if form == "deepspeed":
        saved = newest_whole(run, step, label, overrides)
        model_config, more = run_config(run, overrides).model, noted | {"step": saved.step}
        return export_universal(saved, output, lambda folder: write_notes(folder, model_config, more))
    model, config, at = load_weights(run, step, label, overrides, ema)
    state, more = model.state_dict(), noted | {"step": at}
    if form == "tessera":
        return export_model(output, config, state, more)
    check_derived(form, config)  # before a tokenizer is asked for
    return export_layout(output, form, config, state, more, _tokenizer_of(settings, form))


def import_(source: str | Path, output: str | Path, form: str) -> Path:
    """Convert a folder of a public layout to a new folder as written by `export`. Raises DataError naming any mismatch.

    Data settings and fingerprints that `export` recorded in it are kept.
    """
    refuse_used(output)
    config, state = read_layout(source, form)
    return export_model(output, config, state, read_notes(source, config))


def _settings_of(source: str | Path, overrides: Sequence[str]) -> RunConfig | None:
    """Return the settings to use the model with; None if its source does not record them."""
    tree = saved_tree(source)
    return None if is_export(tree) and "data" not in tree and not overrides else run_config(source, overrides)


def _tokenizer_of(settings: RunConfig | None, form: str) -> TextTokenizer | None:
    """Return the text tokenizer whose special ids the layout `form` records; None if there is none to read them from.

    Raises DataError if the layout pools text at one of them and the tokenizer that `settings` names is gone.
    """
    path = settings.data.text_tokenizer if settings else None
    if path is None or form not in WITH_TOKEN_IDS:
        return None
    try:
        return open_tokenizer(path)
    except DataError as error:
        if form in POOLED_AT_END:
            raise DataError(f"{error}, or set data.text_tokenizer: {form} records its token ids") from None
        print(f"note: config.json will have no token ids ({error})", file=sys.stderr)
        return None


def _noted(settings: RunConfig | None, known: Mapping[str, str] | None) -> dict[str, Any]:
    """Return what an export records besides its model."""
    tree = settings.model_dump(mode="json", include={"task", "data", "seed"}) if settings else {}
    return tree | ({FINGERPRINTS: dict(known)} if known else {})


def name(
    run: str | Path, label: str, step: int | None = None, remove: bool = False, overrides: Sequence[str] = ()
) -> dict[str, Any]:
    """Name a checkpoint, which protects it from retention, or with `remove` delete the name."""
    root, entry = _root(run, overrides), f"name-{label}.json"
    if not NAME.fullmatch(entry):
        raise ConfigError(f"name {label!r}: use letters, digits, '_', '-' and '.' only")
    taken = {label for _, label in names(root)}
    if remove:
        if label not in taken:
            there = ", ".join(sorted(taken)) or "none"
            raise ConfigError(f"{run}: no checkpoint is named {label!r}; there are {there}")
        open_storage(root).remove(entry)
        return {"removed": label}
    saved = newest_whole(run, step, overrides=overrides)
    if label in taken:
        raise ConfigError(f"{run}: a checkpoint is named {label!r} already; remove that name first with --remove")
    put_once(open_storage(root), entry, as_json({"checkpoint": saved.name}))
    return {"named": label, "folder": saved.folder}


def gc(run: str | Path, keep: int | None = None, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Remove checkpoints without a reason to keep, and orphans. keep: replaces the run's `train.keep_checkpoints`.

    An orphan, a folder that was never committed, is removed if its attempt was overtaken or a later step was committed:
    a live run may still be writing a newer one.
    """
    root, kept = _root(run, overrides), _retention(run, overrides)
    rows = committed(root)
    newest = numbers(rows[-1].name) if rows else (-1, -1)
    owner = newest_claim(root)

    def may_go(step: int, attempt: int) -> bool:
        return attempt < owner or (step, attempt) < newest

    return {"removed": tidy(root, dataclasses.replace(kept, last=keep or kept.last), may_go)}


def _root(run: str | Path, overrides: Sequence[str]) -> str:
    """Return the root of a run's checkpoints, even if its configuration is lost. Raises ConfigError if it is no run."""
    root = root_of(run, overrides)
    if not (Path(run) / "config.json").is_file() and not Path(root).is_dir():
        raise no_run(run)
    return root


def _retention(run: str | Path, overrides: Sequence[str]) -> Retention:
    known = (Path(run) / "config.json").is_file()
    return Retention.of(run_config(run, overrides).train) if known else Retention(1)
