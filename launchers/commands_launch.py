"""`tessera launch local|slurm|kubernetes`, `tessera preflight`."""

from pathlib import Path
from typing import Annotated

import typer

from launchers import kubernetes as kubernetes_jobs
from launchers import slurm as slurm_jobs
from launchers.arguments import AsJson, Overrides, emit
from launchers.local import launch_local
from launchers.spec import KubernetesCluster, LocalCluster, SlurmCluster, describe, load_cluster

Config = Annotated[Path, typer.Argument(help="YAML of the run, one of the recipes in configs/.")]
Cluster = Annotated[Path | None, typer.Option(help="YAML of the place; configs/cluster/<place>.yaml where not given.")]
Nodes = Annotated[int | None, typer.Option(min=1, help="Machines; the cluster file's where not given.")]
Procs = Annotated[int | None, typer.Option(min=1, help="Processes on each; the cluster file's where not given.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would run, start nothing.")]


def local(
    config: Config,
    overrides: Overrides = None,
    cluster: Cluster = None,
    nodes: Nodes = None,
    procs_per_node: Procs = None,
    node_rank: Annotated[int, typer.Option(min=0, help="Which of the nodes this machine is.")] = 0,
    master_addr: Annotated[str, typer.Option(help="Address of node 0.")] = "127.0.0.1",
    master_port: Annotated[int, typer.Option(min=0, help="Port on node 0; 0 takes a free one.")] = 0,
    restarts: Annotated[int | None, typer.Option(min=0, help="New attempts after a node fault.")] = None,
    dry_run: DryRun = False,
) -> None:
    """Start the processes of one machine, stream their output, and stop them with a save on Ctrl-C or SIGTERM."""
    code = launch_local(
        config,
        overrides or [],
        load_cluster(LocalCluster, cluster),
        nodes=nodes,
        procs_per_node=procs_per_node,
        node_rank=node_rank,
        master_addr=master_addr,
        master_port=master_port,
        restarts=restarts,
        dry_run=dry_run,
    )
    raise typer.Exit(code)


def preflight(
    config: Annotated[Path | None, typer.Argument(help="YAML of a run: its data, storage and size, too.")] = None,
    overrides: Overrides = None,
    nodes: Nodes = None,
    procs_per_node: Procs = None,
    node_rank: Annotated[int, typer.Option(min=0, help="Which of the nodes this machine is.")] = 0,
    master_addr: Annotated[str, typer.Option(help="Address of node 0.")] = "127.0.0.1",
    master_port: Annotated[int, typer.Option(min=0, help="Port on node 0; 0 takes a free one.")] = 0,
    timeout_s: Annotated[float, typer.Option("--timeout", min=1, help="Seconds that a check may take.")] = 20,
    json: AsJson = False,
) -> None:
    """Devices, collectives, storage, clock, disk, data and program on every rank, before the expensive part.

    Starts this machine's processes, or is one, inside srun and torchrun. Leaves with 0, with 70 for a node, with 74 for
    storage or data, and says which rank.
    """
    from launchers.preflight import Asked, inside_group, run_rank_and_leave, start_group

    asked = Asked(config, overrides or [], timeout_s, json)
    if not inside_group():
        raise typer.Exit(start_group(asked, nodes, procs_per_node, node_rank, master_addr, master_port))
    run_rank_and_leave(asked)


def slurm(
    config: Config,
    overrides: Overrides = None,
    cluster: Cluster = None,
    nodes: Nodes = None,
    procs_per_node: Procs = None,
    dry_run: DryRun = False,
    json: AsJson = False,
) -> None:
    """Render a batch script for the site described by --cluster, and submit it unless --dry-run."""
    site = load_cluster(SlurmCluster, cluster)
    spec = describe(config, overrides or [], site, nodes, procs_per_node)
    if dry_run:
        typer.echo(slurm_jobs.render(spec, site), nl=False)
        return
    job, script = slurm_jobs.submit(spec, site)
    emit({"job": job, "script": str(script)}, json)


def kubernetes(
    config: Config,
    overrides: Overrides = None,
    cluster: Cluster = None,
    nodes: Nodes = None,
    procs_per_node: Procs = None,
    dry_run: DryRun = False,
    json: AsJson = False,
) -> None:
    """Render a JobSet for the cluster described by --cluster, and create it unless --dry-run."""
    place = load_cluster(KubernetesCluster, cluster)
    spec = describe(config, overrides or [], place, nodes, procs_per_node)
    if dry_run:
        typer.echo(kubernetes_jobs.render(spec, place), nl=False)
        return
    emit({"jobset": kubernetes_jobs.submit(spec, place), "namespace": place.namespace}, json)
