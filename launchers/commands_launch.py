"""`tessera launch local|slurm|kubernetes`: check a command line, then render, start or submit it.

Also `tessera preflight`, the checks before a run.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from data_pipeline.errors import ConfigError
from launchers import commands_checkpoint, commands_data, commands_run
from launchers import slurm as slurm_jobs
from launchers.arguments import AsJson, Changes, Overrides, emit, finite
from launchers.local import check_rendezvous, launch_local
from launchers.output import print_program
from launchers.pipeline import Step, check_paths, plan_steps
from launchers.spec import COMMANDS, KubernetesCluster, LocalCluster, RunSpec, SlurmCluster, Task

Target = Annotated[
    str,
    typer.Argument(
        metavar="CONFIG",
        help="YAML of a run, build, vocabulary or pipeline; a dataset with --task encode; a run's folder with "
        "--task export, evaluate or generate.",
    ),
]
Rest = Annotated[
    list[str] | None,
    typer.Argument(metavar="key=value ...", help="Dotted overrides; or, after --, options of the --task."),
]
TaskOption = Annotated[Task | None, typer.Option("--task", help="Task to run; needed when TARGET is not a YAML file.")]
Cluster = Annotated[Path | None, typer.Option(help="Cluster file; default configs/cluster/<place>.yaml.")]
Nodes = Annotated[int | None, typer.Option(min=1, help="Number of nodes; default: the cluster file's.")]
Procs = Annotated[int | None, typer.Option(min=1, help="Processes per node; default: the cluster file's.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would run, without starting it.")]

PROGRAMS: dict[Task, Callable[..., None]] = {
    "train": commands_run.train,
    "build": commands_data.build,
    "encode": commands_data.encode,
    "vocab": commands_data.vocab_train,
    "export": commands_checkpoint.export,
    "evaluate": commands_run.evaluate,
    "generate": commands_run.generate,
}


def check_options(spec: RunSpec) -> None:
    """Parse the command line that will run, without running it: a mistake in it ends this command with 64."""
    program = typer.Typer(add_completion=False)
    program.command()(PROGRAMS[spec.task])
    words = COMMANDS[spec.task]
    with typer.main.get_command(program).make_context(
        " ".join(("tessera", *words)), list(spec.arguments[len(words) :])
    ):
        pass


def with_changes(rest: list[str] | None, change: list[str] | None) -> list[str]:
    """Return the arguments of the launched command: overrides or options, then the changes, for every attempt."""
    return [*(rest or []), *(f"--change={word}" for word in change or [])]


def checked(steps: list[Step[Any]]) -> list[Step[Any]]:
    """Check the command line of each step and return the steps."""
    for step in steps:
        check_options(step.spec)
    return steps


def local(
    config: Target,
    rest: Rest = None,
    change: Changes = None,
    task: TaskOption = None,
    cluster: Cluster = None,
    nodes: Nodes = None,
    procs_per_node: Procs = None,
    node_rank: Annotated[int, typer.Option(min=0, help="Rank of this node, from 0.")] = 0,
    master_addr: Annotated[str, typer.Option(help="Address of node 0.")] = "127.0.0.1",
    master_port: Annotated[int, typer.Option(min=0, max=65535, help="Port on node 0; 0 picks a free one.")] = 0,
    restarts: Annotated[int | None, typer.Option(min=0, help="Restarts allowed after node faults.")] = None,
    dry_run: DryRun = False,
) -> None:
    """Start the processes of this machine and stream their output; Ctrl-C or SIGTERM saves and stops.

    The steps of a pipeline run in sequence, until one exits with a code other than 0.
    """
    steps = checked(plan_steps(LocalCluster, config, with_changes(rest, change), cluster, nodes, procs_per_node, task))
    for step in steps:
        check_rendezvous(step.spec.nodes, node_rank, master_addr, master_port)
    if not dry_run:
        check_paths(steps)
    for step in steps:
        code = launch_local(
            step.spec,
            node_rank=node_rank,
            master_addr=master_addr,
            master_port=master_port,
            restarts=restarts,
            dry_run=dry_run,
        )
        if code:
            raise typer.Exit(code)


def preflight(
    config: Annotated[Path | None, typer.Argument(help="YAML of a run; checks its data, storage and size.")] = None,
    overrides: Overrides = None,
    nodes: Nodes = None,
    procs_per_node: Procs = None,
    node_rank: Annotated[int, typer.Option(min=0, help="Rank of this node, from 0.")] = 0,
    master_addr: Annotated[str, typer.Option(help="Address of node 0.")] = "127.0.0.1",
    master_port: Annotated[int, typer.Option(min=0, max=65535, help="Port on node 0; 0 picks a free one.")] = 0,
    timeout_s: Annotated[
        float, typer.Option("--timeout", min=1, callback=finite, help="Timeout of each check in seconds.")
    ] = 20,
    json: AsJson = False,
) -> None:
    """Check devices, collectives, storage, clock, disk, data and program on every rank before a run.

    Start this machine's processes, or act as one rank inside srun or torchrun. Exit with 0, 70 for a node
    fault or 74 for storage or data, and name the rank.
    """
    from launchers.preflight import Asked, inside_group, run_rank_and_leave, start_group

    asked = Asked(config, overrides or [], timeout_s, json)
    if not inside_group():
        raise typer.Exit(start_group(asked, nodes, procs_per_node, node_rank, master_addr, master_port))
    run_rank_and_leave(asked)


def slurm(
    config: Target,
    rest: Rest = None,
    change: Changes = None,
    task: TaskOption = None,
    cluster: Cluster = None,
    nodes: Nodes = None,
    procs_per_node: Procs = None,
    seeds: Annotated[str | None, typer.Option(help="Array of runs, as 0-3 or 1,5,9; each in RUN/seed-N.")] = None,
    dry_run: DryRun = False,
    json: AsJson = False,
) -> None:
    """Render batch scripts for the site in --cluster, and submit them unless --dry-run.

    Each step of a pipeline waits for its dependencies; if Slurm refuses one, none is submitted.
    """
    steps = checked(plan_steps(SlurmCluster, config, with_changes(rest, change), cluster, nodes, procs_per_node, task))
    if seeds == "":
        raise ConfigError("--seeds is empty; write 0-3 or 1,5,9, or leave --seeds out for one run")
    scripts = slurm_jobs.render_all(steps, seeds or "")
    if dry_run:
        print_program(scripts)
        return
    check_paths(steps)
    jobs = slurm_jobs.submit_all(steps, seeds or "")
    if len(jobs) == 1:
        emit(jobs[0], json)
    else:
        emit({"jobs": jobs} if json else {job["run"]: job["job"] for job in jobs}, json)


def kubernetes(
    config: Target,
    rest: Rest = None,
    change: Changes = None,
    task: TaskOption = None,
    cluster: Cluster = None,
    nodes: Nodes = None,
    procs_per_node: Procs = None,
    dry_run: DryRun = False,
    json: AsJson = False,
) -> None:
    """Render the objects of a run for the cluster in --cluster, and create them unless --dry-run."""
    from launchers.kubernetes.submit import render, submit

    step = _only(
        checked(plan_steps(KubernetesCluster, config, with_changes(rest, change), cluster, nodes, procs_per_node, task))
    )
    if dry_run:
        print_program(render(step.spec, step.cluster))
        return
    emit(submit(step.spec, step.cluster), json)


def _only(steps: list[Step[Any]]) -> Step[Any]:
    """Return the only step, for a place without pipelines. Raise ConfigError for several."""
    if len(steps) > 1:
        raise ConfigError(f"{len(steps)} steps: Kubernetes launches do not order jobs; launch each step by itself")
    return steps[0]
