"""`tessera train|generate|evaluate|status|logs|stop`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from data_pipeline.errors import NodeFault, Requeue
from launchers.arguments import (
    AsJson,
    Changes,
    Ema,
    Name,
    Overrides,
    Run,
    RunOrExport,
    Seed,
    Step,
    emit,
    finite,
    interruptible,
)

trains = False
"""Whether this process has begun to train; if so, it must exit without the interpreter's shutdown (cli.main)."""


def train(
    config: Annotated[Path, typer.Argument(help="YAML of the run, such as a recipe in configs/.")],
    overrides: Overrides = None,
    change: Changes = None,
) -> None:
    """Train, or resume from the run's newest checkpoint, as one process or one rank of a group."""
    from launchers.watch import refuse_other_folder
    from pretrain.config import check_initial, consented_keys, load_run

    global trains
    run_config = load_run(config, overrides or [], change or [])
    check_initial(run_config)
    refuse_other_folder(run_config.run)
    from pretrain.runtime.signals import ignore_stop_signals

    trains = True
    from pretrain.train import main  # after the configuration, whose mistakes are reported without torch

    try:
        main(run_config, consented_keys(change or []))
    except Requeue:
        ignore_stop_signals()  # saved and exiting: another stop signal must not kill the process now
        raise


def generate(
    run: RunOrExport,
    prompt: Annotated[str, typer.Option(help="Text prompt.")],
    overrides: Overrides = None,
    count: Annotated[int, typer.Option("-n", "--count", min=1, help="Number of images.")] = 4,
    out: Annotated[Path | None, typer.Option(help="Folder for the images; default RUN/samples.")] = None,
    temperature: Annotated[
        float, typer.Option(min=0, callback=finite, help="Sampling temperature; 0 is greedy.")
    ] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="Sample from the k likeliest codes; 0 disables it.")] = 0,
    guidance: Annotated[
        float, typer.Option(min=0, callback=finite, help="Classifier-free guidance scale; 1 disables it.")
    ] = 1.0,
    seed: Seed = 0,
    step: Step = None,
    name: Name = None,
    ema: Ema = False,
) -> None:
    """Generate images from a prompt; print their paths, a labelled grid first."""
    where = str(out) if out else None
    with interruptible(lambda: "only the images with printed paths are written"):
        from pretrain.generate import main

        main(str(run), prompt, count, where, temperature, top_k, guidance, seed, step, name, overrides or [], ema)


def evaluate(
    run: RunOrExport,
    overrides: Overrides = None,
    rerank: Annotated[
        Path | None, typer.Option(help="CLIP run or export that picks the best image per prompt.")
    ] = None,
    candidates: Annotated[int, typer.Option(min=1, help="Images per prompt to pick from.")] = 8,
    step: Step = None,
    name: Name = None,
    every: Annotated[bool, typer.Option("--all", help="Evaluate every checkpoint, in the order of steps.")] = False,
    ema: Ema = False,
    json: AsJson = False,
) -> None:
    """Evaluate a run's newest checkpoint on held-out data; print the metrics and write RUN/evaluation.json.

    RUN/evaluation.jsonl keeps one line for each checkpoint and data that were evaluated.
    """
    printed: list[bool] = []

    def say(told: dict[str, Any]) -> None:
        emit(told, json)
        printed.append(True)

    def written() -> str:
        file = run / "evaluation.json"
        return f"the metrics are printed; {file} may lack them" if printed else f"{file} was not written"

    with interruptible(written):
        from pretrain.evaluate import main

        main(run, rerank, candidates, step, name, overrides or [], say, every, ema)


def status(run: Run, json: AsJson = False) -> None:
    """Show a run's state, progress and speed; exit with 70 if its job vanished."""
    from launchers.watch import run_status

    told = run_status(run)
    emit(told, json)
    if told["state"] == "vanished":
        raise typer.Exit(NodeFault.exit_code)


def logs(
    run: Run,
    lines: Annotated[int, typer.Option("-n", "--lines", min=1, help="How many.")] = 20,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Follow until the run ends.")] = False,
    job: Annotated[bool, typer.Option("--job", help="Print the job's output instead of metrics.")] = False,
) -> None:
    """Print the last lines of the run's metrics.jsonl, one per logged step."""
    from launchers.watch import job_lines, metric_lines

    for line in (job_lines if job else metric_lines)(run, lines, follow):
        typer.echo(line)


def stop(
    run: Run,
    timeout_s: Annotated[float, typer.Option(min=1, callback=finite, help="Timeout of the save in seconds.")] = 300,
    json: AsJson = False,
) -> None:
    """Stop a local run or its job after a save, without a restart, and wait until it exits."""
    from launchers.watch import stop_run

    emit(stop_run(run, timeout_s), json)


def chaos(
    config: Annotated[Path, typer.Argument(help="YAML of the run; trained in the campaign's own folders.")],
    overrides: Overrides = None,
    kills: Annotated[int, typer.Option(min=1, help="Number of strikes.")] = 10,
    seed: Seed = 0,
    procs_per_node: Annotated[int, typer.Option(min=1, help="Processes on this machine.")] = 2,
    json: AsJson = False,
) -> None:
    """Kill and restart a run repeatedly, and compare it with an undisturbed run; print the verdict last."""
    from launchers.chaos.campaign import run_campaign
    from launchers.chaos.laws import broken_laws
    from launchers.chaos.report import figures, write_report

    def say(text: str) -> None:
        typer.echo(text, err=json)

    campaign = run_campaign(config, overrides or [], kills, seed, procs_per_node, say)
    told, laws = figures(campaign), broken_laws(campaign)
    say(f"report: {write_report(campaign, told | {'laws': laws})}")
    for law, complaints in laws.items():
        say(f"{law}: {'held' if not complaints else f'BROKEN ({len(complaints)}): ' + '; '.join(complaints[:3])}")
    broken = [law for law, complaints in laws.items() if complaints]
    verdict = f"broken: {', '.join(broken)}" if broken else "every law held"
    emit(told | {"strikes": len(campaign.events), "seed": seed, "verdict": verdict}, json)
    if broken:
        raise typer.Exit(NodeFault.exit_code)
