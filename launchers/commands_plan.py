"""`tessera plan`."""

from pathlib import Path
from typing import Annotated

import typer

from launchers.arguments import AsJson, Overrides, emit, finite


def plan(
    config: Annotated[Path, typer.Argument(help="YAML of the run, such as a recipe in configs/.")],
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(min=1, help="Machines.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs per node; with --gpu cpu, processes.")] = 8,
    gpu: Annotated[str, typer.Option(help="a100-40, a100-80, h100, h200, b200, or cpu for this machine.")] = "h100",
    network_gbits: Annotated[
        float | None,
        typer.Option(min=0.001, callback=finite, help="One-way bandwidth of a node; default: the vendor's."),
    ] = None,
    json: AsJson = False,
) -> None:
    """Predict memory, FLOPs, traffic and time of a run, with error bars; suggest the fastest setting."""
    from rich.console import Console

    from launchers.plan.clusters import cluster_of
    from launchers.plan.make import advise, as_json, check_batch, make_plan
    from launchers.plan.show import show
    from pretrain.config import load_run

    run = load_run(config, overrides or [])
    check_batch(run, nodes * gpus_per_node)
    cluster = cluster_of(gpu, nodes, gpus_per_node, network_gbits)
    planned = make_plan(run, cluster)
    best = advise(run, cluster, planned)
    if json:
        emit(as_json(planned, best), json)
        return
    show(planned, best, Console(soft_wrap=False, highlight=False))
