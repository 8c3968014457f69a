"""The `tessera` command: the table of commands, and the only place that turns errors into text and exit codes.

Commands import their dependencies when they run, so `--help` and `--dry-run` need no torch.
"""

import errno
import importlib.metadata
import os
import signal
import sys
from typing import Annotated

import typer
from rich.console import Console

from data_pipeline.errors import FILE_SYSTEM_ERRORS, ConfigError, Interrupted, Requeue, TesseraError, storage_error
from launchers import commands_checkpoint, commands_data, commands_launch, commands_plan, commands_run
from launchers.output import finish_output, protect_output

USAGE_EXIT = 2  # the argument parser's exit code, reported as a configuration error (64)

app = typer.Typer(
    name="tessera",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Pretraining of image-text and text models, from raw pairs to exported weights.\n\n"
    "Exit codes: 0 done, 64 configuration, 70 node fault, 74 storage or data, 75 requeue.",
)

# ------------------------------------------------------------------------------------ the command line


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"tessera {importlib.metadata.version('tessera')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options before the command; the help text is set on the app."""


data = typer.Typer(no_args_is_help=True, help="Build, encode, inspect and verify datasets.")
data.command("build")(commands_data.build)
data.command("retry")(commands_data.retry)
data.command("encode")(commands_data.encode)
data.command("index")(commands_data.index)
data.command("verify")(commands_data.verify)
data.command("order")(commands_data.order)
data.command("report")(commands_data.report)

vocab = typer.Typer(no_args_is_help=True, help="SentencePiece vocabularies.")
vocab.command("train")(commands_data.vocab_train)
vocab.callback()(lambda: None)  # keeps `train` a subcommand while it is the only one

launch = typer.Typer(no_args_is_help=True, help="Launch a recipe on this machine, Slurm or Kubernetes.")
launch.command("local")(commands_launch.local)
launch.command("slurm")(commands_launch.slurm)
launch.command("kubernetes")(commands_launch.kubernetes)

checkpoint = typer.Typer(no_args_is_help=True, help="List, verify, name, prune and convert checkpoints.")
checkpoint.command("list")(commands_checkpoint.list_checkpoints)
checkpoint.command("verify")(commands_checkpoint.verify)
checkpoint.command("export")(commands_checkpoint.export)
checkpoint.command("import")(commands_checkpoint.import_weights)
checkpoint.command("name")(commands_checkpoint.name)
checkpoint.command("gc")(commands_checkpoint.gc)

app.add_typer(data, name="data")
app.add_typer(vocab, name="vocab")
app.command("train")(commands_run.train)
app.add_typer(launch, name="launch")
app.command("preflight")(commands_launch.preflight)
app.command("status")(commands_run.status)
app.command("logs")(commands_run.logs)
app.command("stop")(commands_run.stop)
app.command("plan")(commands_plan.plan)
app.add_typer(checkpoint, name="checkpoint")
app.command("generate")(commands_run.generate)
app.command("evaluate")(commands_run.evaluate)
app.command("chaos")(commands_run.chaos)

# ------------------------------------------------------------------------------------ errors and exit codes


def main() -> None:
    """Run the command line and exit with its exit code.

    A process that trained flushes its output and calls os._exit. The interpreter's shutdown would stop threads wherever
    they are; if one is returning from a torch call, C++ aborts the process and its exit code is lost.
    """
    protect_output()
    code = finish_output(run(), needed=not commands_run.trains)
    if commands_run.trains:
        os._exit(code)
    sys.exit(code)


def run() -> int:
    """Run the command and return its exit code.

    A TesseraError is printed without a traceback; an unexpected exception is raised, with its traceback.
    """
    try:
        app(prog_name="tessera")
    except TesseraError as error:
        return _tell(error)
    except OSError as error:  # a disk, path or permission error from anywhere
        if error.errno not in FILE_SYSTEM_ERRORS or (commands_run.trains and error.errno == errno.ENOENT):
            raise  # with its traceback: user code did not find a file during training
        return _tell(storage_error(error, error.filename or "storage"))
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
        if code == Interrupted.exit_code:  # typer's exit code for Ctrl-C
            return _tell(Interrupted("interrupted: files are written atomically; finished files stay"))
        return ConfigError.exit_code if code == USAGE_EXIT else code
    return 0


def _tell(error: TesseraError) -> int:
    """Print the error and return its exit code."""
    asked_for = isinstance(error, Requeue | Interrupted)
    if isinstance(error, Interrupted):
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C would interrupt the shutdown
    text, style = (str(error), "") if asked_for else (f"error: {error}", "red")
    Console(stderr=True, soft_wrap=True).print(text, style=style, markup=False, highlight=False)
    return error.exit_code


if __name__ == "__main__":
    main()
