"""`tessera launch local|slurm|kubernetes`."""

from pathlib import Path
from typing import Annotated

import typer

from launchers.arguments import Overrides

Config = Annotated[Path, typer.Argument(help="YAML of the run, one of the recipes in configs/.")]
Cluster = Annotated[Path | None, typer.Option(help="YAML of the place, for example configs/cluster/slurm.yaml.")]
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
    raise NotImplementedError


def slurm(
    config: Config,
    overrides: Overrides = None,
    cluster: Cluster = None,
    nodes: Nodes = None,
    procs_per_node: Procs = None,
    dry_run: DryRun = False,
) -> None:
    """Render a batch script for the site described by --cluster, and submit it unless --dry-run."""
    raise NotImplementedError


def kubernetes(
    config: Config,
    overrides: Overrides = None,
    cluster: Cluster = None,
    nodes: Nodes = None,
    procs_per_node: Procs = None,
    dry_run: DryRun = False,
) -> None:
    """Render a JobSet for the cluster described by --cluster, and create it unless --dry-run."""
    raise NotImplementedError
