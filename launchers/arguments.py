"""Arguments and output that every command shares."""

import contextlib
import dataclasses
import json as json_module
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from data_pipeline.errors import Interrupted
from data_pipeline.settings import MAX_SEED


def finite(value: float | None) -> float | None:
    """Check a float option (a typer callback). Raise BadParameter for infinity and NaN, which pass `min`."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not finite; give a number")
    return value


Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="key=value ...", help="Dotted overrides, for example optim.lr=3e-4.")
]
Seed = Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Random seed.")]
Changes = Annotated[
    list[str] | None,
    typer.Option(
        "--change",
        metavar="key=value",
        help="Resume from the newest checkpoint with another train.steps, data.evaluation, or setting of optim (lr, "
        "schedule, betas, eps, weight_decay, no_decay, freeze, layer_decay). Repeatable.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON value instead of text.")]
Run = Annotated[Path, typer.Argument(help="Folder of a run.")]
RunOrExport = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run or of an exported model.")]
Step = Annotated[int | None, typer.Option(min=1, help="Take the checkpoint of this step instead of the newest.")]
Ema = Annotated[bool, typer.Option("--ema", help="Take the moving average of the weights (`optim.ema`).")]
Name = Annotated[str | None, typer.Option(help="Take the checkpoint of this name (`tessera checkpoint name`).")]


@contextlib.contextmanager
def interruptible(written: Callable[[], str]) -> Iterator[None]:
    """Turn Ctrl-C in the block into an Interrupted whose message is `written()`: what has been written by then."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted: {written()}") from None


def as_dict(result: Any) -> dict[str, Any]:
    """Convert a command's result (mapping, dataclass, pydantic model, path or None) to a plain dict."""
    if result is None:
        return {}
    if dataclasses.is_dataclass(result) and not isinstance(result, type):
        return dataclasses.asdict(result)
    if hasattr(result, "model_dump"):
        return dict(result.model_dump(mode="json"))
    return dict(result) if isinstance(result, Mapping) else {"result": result}


def emit(result: Mapping[str, Any], as_json: bool) -> None:
    """Print `result` as one JSON line, or as `name  value` lines, in which a table is shown as its number of rows."""
    if as_json:
        escaped = "utf" not in (sys.stdout.encoding or "").lower()  # use JSON's escapes, not the stream's
        typer.echo(json_module.dumps(result, ensure_ascii=escaped, sort_keys=True, default=str))
        return
    width = max((len(name) for name in result), default=0)
    for name, value in result.items():
        is_table = isinstance(value, list | tuple) and any(isinstance(row, Mapping) for row in value)
        typer.echo(f"{name:<{width}}  {len(value) if is_table else value}")
