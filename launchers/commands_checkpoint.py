"""`tessera checkpoint ...`: list, verify, export, import, name and remove checkpoints."""

from pathlib import Path
from typing import Annotated

import typer

from launchers.arguments import AsJson, Ema, Name, Overrides, Run, RunOrExport, Step, as_dict, emit, interruptible


def list_checkpoints(run: Run, overrides: Overrides = None, json: AsJson = False) -> None:
    """List a run's committed checkpoints, oldest first, with the reason each is kept."""
    from pretrain.checkpoint.verbs import list_

    rows = [as_dict(row) for row in list_(run, overrides or [])]
    if json:
        emit({"checkpoints": rows}, json)
        return
    for row in rows:
        typer.echo("  ".join(f"{name}={value}" for name, value in row.items()))


def verify(run: Run, overrides: Overrides = None, json: AsJson = False) -> None:
    """Check the size and digest of every file; exit with 74 on a mismatch."""
    from pretrain.checkpoint.verbs import verify as run_verify

    emit(as_dict(run_verify(run, overrides or [])), json)


def export(
    run: RunOrExport,
    output: Annotated[Path, typer.Argument(help="Folder for the weights; must be new or empty.")],
    overrides: Overrides = None,
    form: Annotated[
        str, typer.Option("--format", help="tessera, deepspeed (universal, with optimizer), or a public layout.")
    ] = "tessera",
    step: Step = None,
    name: Name = None,
    ema: Ema = False,
    again: Annotated[bool, typer.Option("--again", help="Succeed if OUTPUT already holds this export.")] = False,
    json: AsJson = False,
) -> None:
    """Export the newest valid checkpoint for other commands, other programs or DeepSpeed."""
    with interruptible(lambda: _unwritten(output)):
        from pretrain.checkpoint.verbs import export as run_export

        exported = run_export(run, output, step, form, name, overrides or [], again, ema)
    emit({"exported": str(exported)}, json)


def _unwritten(output: Path) -> str:
    """Say whether an interrupted command wrote its output, which appears atomically."""
    return f"{output} is written" if output.is_dir() and any(output.iterdir()) else f"{output} was not written"


def import_weights(
    source: Annotated[Path, typer.Argument(help="Folder with transformers' config.json and model.safetensors.")],
    output: Annotated[Path, typer.Argument(help="Folder for the export; must be new or empty.")],
    form: Annotated[str, typer.Option("--format", help="Such as transformers-bert; an unknown one lists all.")],
    json: AsJson = False,
) -> None:
    """Convert weights of a public layout to a tessera export; reject settings that tessera does not support."""
    with interruptible(lambda: _unwritten(output)):
        from pretrain.checkpoint.verbs import import_

        imported = import_(source, output, form)
    emit({"imported": str(imported)}, json)


def name(
    run: Run,
    label: Annotated[str, typer.Argument(metavar="NAME", help="Letters, digits, '_', '-' and '.'.")],
    overrides: Overrides = None,
    step: Step = None,
    remove: Annotated[bool, typer.Option("--remove", help="Remove the name.")] = False,
    json: AsJson = False,
) -> None:
    """Name the newest valid checkpoint, which protects it from retention."""
    from pretrain.checkpoint.verbs import name as run_name

    emit(run_name(run, label, step, remove, overrides or []), json)


def gc(run: Run, overrides: Overrides = None, json: AsJson = False) -> None:
    """Remove files that no manifest lists, and checkpoints beyond retention."""
    from pretrain.checkpoint.verbs import gc as run_gc

    emit(as_dict(run_gc(run, overrides=overrides or [])), json)
