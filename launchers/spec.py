"""One description of a run, rendered by local.py, slurm.py and kubernetes.py; and the schema of the place it runs in.

The recipe says what is learnt, `configs/cluster/*.yaml` says where. Imports no torch: a login node renders jobs too.
"""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import Field, NonNegativeInt, PositiveInt

from data_pipeline.errors import ConfigError
from data_pipeline.settings import Settings, check_settings, digest, load_settings
from pretrain.config import RunConfig, micro_batch_of

CLUSTER_DIR = Path("configs/cluster")

# ------------------------------------------------------------------------------------------ where it runs


class ClusterConfig(Settings):
    """What every place has."""

    nodes: PositiveInt = 1
    procs_per_node: PositiveInt = 1
    env: dict[str, str] = {}


class LocalCluster(ClusterConfig):
    """This machine."""

    kind: Literal["local"] = "local"
    procs_per_node: PositiveInt = 2
    restarts: NonNegativeInt = 0
    stop_timeout_s: PositiveInt = 300


class SlurmCluster(ClusterConfig):
    """A Slurm site. What is empty is left out of the batch script."""

    kind: Literal["slurm"] = "slurm"
    account: str = ""
    partition: str = ""
    qos: str = ""
    constraint: str = ""
    gres: str = ""
    gpus_per_node: NonNegativeInt = 0
    cpus_per_proc: PositiveInt = 8
    memory: str = "0"
    exclusive: bool = False
    time_limit: str = Field("24:00:00", pattern=r"^(\d+-)?\d+(:\d+){0,2}$")
    signal_lead_s: PositiveInt = Field(300, le=65535)
    requeues: NonNegativeInt = 20
    output: str = "%x-%j.out"
    python: str = ".venv/bin/python"
    setup: tuple[str, ...] = ()
    container: Literal["none", "pyxis", "apptainer"] = "none"
    container_image: str = ""
    container_mounts: tuple[str, ...] = ()


class KubernetesCluster(ClusterConfig):
    """A Kubernetes cluster with the JobSet controller; `queue` needs Kueue."""

    kind: Literal["kubernetes"] = "kubernetes"
    image: str
    namespace: str = "default"
    queue: str = ""
    gpus_per_node: NonNegativeInt = 0
    gpu_resource: str = "nvidia.com/gpu"
    cpus_per_node: PositiveInt = 8
    memory: str = "32Gi"
    shared_memory: str = "8Gi"
    claims: dict[str, str] = {}
    max_restarts: NonNegativeInt = 3
    stop_timeout_s: PositiveInt = 300
    master_port: PositiveInt = Field(29500, le=65535)


C = TypeVar("C", bound=ClusterConfig)


def load_cluster(schema: type[C], path: Path | None) -> C:
    """The cluster file at `path`; without one, configs/cluster/<kind>.yaml of the working folder, else the defaults."""
    kind = schema.model_fields["kind"].default
    usual = CLUSTER_DIR / f"{kind}.yaml"
    if path is None and not usual.is_file():
        return check_settings(schema, {}, f"no cluster file was named and there is no {usual}")
    return load_settings(schema, path or usual)


# --------------------------------------------------------------------------------------------- what runs


@dataclass(frozen=True)
class RunSpec:
    """Something that runs on `nodes` x `procs_per_node` processes; `arguments` is what follows `tessera`."""

    name: str
    task: Literal["train", "build"]
    arguments: tuple[str, ...]
    config_hash: str
    run_folder: str
    nodes: int
    procs_per_node: int
    env: tuple[tuple[str, str], ...]

    @property
    def world_size(self) -> int:
        return self.nodes * self.procs_per_node

    @property
    def command(self) -> tuple[str, ...]:
        """What follows the interpreter, in each process."""
        return ("-m", "launchers.cli", *self.arguments)

    @property
    def header(self) -> str:
        """One line for the head of a rendered job: what it runs, and the hash of the resolved configuration."""
        command = shlex.join(["tessera", *self.arguments])
        return f"{command}\n# {self.nodes} x {self.procs_per_node} processes, configuration {self.config_hash}"


def describe(
    config_path: Path, overrides: Sequence[str], cluster: ClusterConfig, nodes: int | None, procs_per_node: int | None
) -> RunSpec:
    """Check the recipe and its fit to the number of processes, before anything starts or is submitted.

    Raises ConfigError for a wrong recipe and for a batch that does not divide.
    """
    config = load_settings(RunConfig, config_path, overrides)
    spec = RunSpec(
        name=dns_label(Path(config.run).name),
        task="train",
        arguments=("train", str(config_path), *overrides),
        config_hash=digest(config),
        run_folder=config.run,
        nodes=nodes or cluster.nodes,
        procs_per_node=procs_per_node or cluster.procs_per_node,
        env=tuple(sorted(cluster.env.items())),
    )
    try:
        micro_batch_of(config.train, spec.world_size)
    except ValueError as error:
        raise ConfigError(f"{config_path}: {error}") from None
    return spec


def describe_build(config_path: Path, overrides: Sequence[str], cluster: ClusterConfig) -> RunSpec:
    """A data build: one process on one node, Ray spreads the work over that node's cores."""
    from data_pipeline.config import BuildConfig

    config = load_settings(BuildConfig, config_path, overrides)
    return RunSpec(
        name=dns_label(f"build-{Path(config.output).name}"),
        task="build",
        arguments=("data", "build", str(config_path), *overrides),
        config_hash=digest(config),
        run_folder=config.output,
        nodes=1,
        procs_per_node=1,
        env=tuple(sorted(cluster.env.items())),
    )


def check_gpus(procs_per_node: int, gpus_per_node: int) -> None:
    """A device belongs to one process."""
    if gpus_per_node and procs_per_node > gpus_per_node:
        raise ConfigError(
            f"procs_per_node={procs_per_node} is more than gpus_per_node={gpus_per_node}; "
            f"a GPU serves one process, use --procs-per-node {gpus_per_node}"
        )


def dns_label(text: str) -> str:
    """`text` as a job name that Slurm, DNS and Kubernetes accept: a-z, 0-9 and '-', a letter first, at most 40 long."""
    label = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40].rstrip("-")
    if not label or not label[0].isalpha():
        label = f"run-{label}".rstrip("-")
    return label
