"""`tessera checkpoint ...`: what is saved, is it whole, take it elsewhere, tidy up."""

from pathlib import Path
from typing import Annotated

import typer

from launchers.arguments import AsJson, Run, as_dict, emit


def list_checkpoints(run: Run, json: AsJson = False) -> None:
    """The committed checkpoints of a run, oldest first."""
    from pretrain.checkpoint import list_

    rows = [as_dict(row) for row in list_(run)]
    if json:
        emit({"checkpoints": rows}, json)
        return
    for row in rows:
        typer.echo("  ".join(f"{name}={value}" for name, value in row.items()))


def verify(run: Run, json: AsJson = False) -> None:
    """Sizes and digests of every file; leaves with 74 when something is off."""
    from pretrain.checkpoint import verify as run_verify

    emit(as_dict(run_verify(run)), json)


def export(
    run: Run,
    output: Annotated[Path, typer.Argument(help="New folder for config.json and model.safetensors.")],
    json: AsJson = False,
) -> None:
    """The newest checkpoint's weights as one plain folder, without optimizer state."""
    from pretrain.checkpoint import export as run_export

    emit({"exported": str(run_export(run, output) or output)}, json)


def gc(run: Run, json: AsJson = False) -> None:
    """Remove what no manifest names and what retention no longer keeps."""
    from pretrain.checkpoint import gc as run_gc

    emit(as_dict(run_gc(run)), json)
