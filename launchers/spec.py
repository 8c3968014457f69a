"""The description of a run that local.py, slurm.py and kubernetes/ render, and the schemas of the places it runs in.

The recipe says what to train, `configs/cluster/*.yaml` where. Imports no torch: login nodes render jobs too.
"""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveInt

from data_pipeline.config import BuildConfig
from data_pipeline.errors import ConfigError
from data_pipeline.ingest.filters import Condition
from data_pipeline.settings import Location, Settings, check_settings, digest, load_settings, read_yaml
from data_pipeline.text.config import VocabConfig
from launchers.quoting import command_line
from launchers.watch import refuse_other_folder
from pretrain.config import RunConfig, has_begun, load_run, micro_batch_of
from pretrain.runtime.deadline import LEAD_VARIABLE, refusal

CLUSTER_DIR = Path("configs/cluster")

# ------------------------------------------------------------------------------------------ where it runs


class ClusterConfig(Settings):
    """Settings of every place. `lead_s` and `retries` map to settings that each place names differently."""

    nodes: PositiveInt = 1
    procs_per_node: PositiveInt = 1
    env: dict[Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")], str] = {}

    @property
    def lead_s(self) -> int:
        """Seconds from the stop signal to the kill: a step and a save must fit."""
        raise NotImplementedError

    @property
    def retries(self) -> int:
        """Maximum number of new attempts after a fault or a time limit."""
        raise NotImplementedError


class LocalCluster(ClusterConfig):
    """This machine."""

    kind: Literal["local"] = "local"
    procs_per_node: PositiveInt = 2
    restarts: NonNegativeInt = 0
    stop_timeout_s: PositiveInt = 300

    @property
    def lead_s(self) -> int:
        """Seconds from the stop signal to the kill."""
        return self.stop_timeout_s

    @property
    def retries(self) -> int:
        """Maximum number of new attempts."""
        return self.restarts


def _time_limit(given: Any) -> str:
    """Check a limit in one of Slurm's forms. Raise ValueError also for numbers, which YAML makes of unquoted times."""
    if isinstance(given, int) and not isinstance(given, bool):
        minutes, seconds = divmod(given, 60)
        clock = f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
        raise ValueError(
            f"YAML reads a limit such as {clock} without quotation marks as a number; write time_limit: "
            f'"{clock}", or "{given}" for minutes'
        )
    if not isinstance(given, str) or not TIME_LIMIT.fullmatch(given):
        raise ValueError('not a time limit of Slurm; write "MINUTES", "HOURS:MINUTES:SECONDS" or "DAYS-HOURS"')
    return given


TIME_LIMIT = re.compile(r"([0-9]+-)?[0-9]+(:[0-9]+){0,2}")
TimeLimit = Annotated[str, BeforeValidator(_time_limit)]


class SlurmCluster(ClusterConfig):
    """A Slurm site. Empty fields are left out of the batch script.

    start: what starts the processes of a node. master_addr: how rank 0 is found, by the name of its node or, where
    names do not resolve, by the address that Slurm has for it. options: further sbatch options, with or without dashes.
    setup: shell lines that run first, the only field that is code.
    """

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
    options: tuple[str, ...] = ()
    time_limit: TimeLimit = "24:00:00"
    signal_lead_s: PositiveInt = Field(300, le=65535)
    requeues: NonNegativeInt = 20
    max_excluded_nodes: NonNegativeInt = 2
    output: Location = "%x-%j.out"
    start: Literal["srun", "torchrun"] = "srun"
    master_addr: Literal["hostname", "node_addr"] = "hostname"
    python: Location = ".venv/bin/python"
    setup: tuple[str, ...] = ()
    container: Literal["none", "pyxis", "apptainer"] = "none"
    container_image: str = ""
    container_mounts: tuple[str, ...] = ()

    @property
    def lead_s(self) -> int:
        """Seconds from the stop signal to the kill."""
        return self.signal_lead_s

    @property
    def retries(self) -> int:
        """Maximum number of new attempts."""
        return self.requeues


class KubernetesCluster(ClusterConfig):
    """A Kubernetes cluster with the JobSet controller or Kubeflow Trainer; builds on several nodes need KubeRay.

    queue: Kueue's queue, if there is one. topology: a node label whose value is the same within a rack or block; the
    pods of a run are kept within one. rdma: number of devices per pod by resource name. secrets: names of Secrets whose
    keys become environment variables. tolerations: keys of taints.
    """

    kind: Literal["kubernetes"] = "kubernetes"
    image: str
    namespace: str = "default"
    controller: Literal["jobset", "trainjob"] = "jobset"
    queue: str = ""
    service_account: str = ""
    secrets: tuple[str, ...] = ()
    node_selector: dict[str, str] = {}
    tolerations: tuple[str, ...] = ()
    topology: str = ""
    topology_required: bool = False
    gpus_per_node: NonNegativeInt = 0
    gpu_resource: str = "nvidia.com/gpu"
    rdma: dict[str, PositiveInt] = {}
    cpus_per_node: PositiveInt = 8
    memory: str = "32Gi"
    shared_memory: str = "8Gi"
    claims: dict[str, str] = {}
    max_restarts: NonNegativeInt = 3
    stop_timeout_s: PositiveInt = 300
    master_port: PositiveInt = Field(29500, le=65535)

    @property
    def lead_s(self) -> int:
        """Seconds from the stop signal to the kill."""
        return self.stop_timeout_s

    @property
    def retries(self) -> int:
        """Maximum number of new attempts."""
        return self.max_restarts


C = TypeVar("C", bound=ClusterConfig)


def load_cluster(schema: type[C], path: Path | None) -> C:
    """Load the cluster file at `path`; by default configs/cluster/<kind>.yaml if it exists, else the defaults."""
    kind = schema.model_fields["kind"].default
    usual = CLUSTER_DIR / f"{kind}.yaml"
    if path is None and not usual.is_file():
        return check_settings(schema, {}, f"no --cluster was given and {usual} does not exist")
    return load_settings(schema, path or usual)


# --------------------------------------------------------------------------------------------- what runs

Task = Literal["train", "build", "encode", "vocab", "export", "evaluate", "generate"]
COMMANDS: dict[Task, tuple[str, ...]] = {
    "train": ("train",),
    "build": ("data", "build"),
    "encode": ("data", "encode"),
    "vocab": ("vocab", "train"),
    "export": ("checkpoint", "export"),
    "evaluate": ("evaluate",),
    "generate": ("generate",),
}
RECOGNISED: dict[str, Task] = {"model": "train", "source": "build", "dataset": "vocab"}
"""The section that identifies the task of a YAML."""
LAUNCHED = Path("runs")
LONGEST_NAME, NAME_DIGITS = 40, 6
RAY_OPTION: dict[Task, str] = {"build": "ray_address=", "encode": "--ray-address="}
"""Prefix of the argument that holds a Ray cluster's address."""


@dataclass(frozen=True)
class RunSpec:
    """A `tessera` command to run, whatever the place: its arguments, number of processes and rules of restart.

    `arguments` is what follows `tessera`. `run_folder` is where the launcher keeps its records: a training's own
    folder, runs/NAME for other tasks. `storage` lists the folders and addresses that are read or written; `reads` is
    the part of it that must exist before the start. `checkpoints` is where a training saves, if not in its folder.
    `lead_s` is the time in seconds from the stop signal to the kill, `retries` the maximum number of new attempts.
    Image and volumes are settings of the place.
    """

    name: str
    task: Task
    arguments: tuple[str, ...]
    config_hash: str
    run_folder: str
    nodes: int = 1
    procs_per_node: int = 1
    env: tuple[tuple[str, str], ...] = ()
    lead_s: int = 300
    retries: int = 0
    storage: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    checkpoints: str = ""

    @property
    def world_size(self) -> int:
        return self.nodes * self.procs_per_node

    @property
    def writes(self) -> tuple[str, ...]:
        """The part of `storage` that it writes itself."""
        return tuple(path for path in self.storage if path not in self.reads)

    @property
    def saves(self) -> bool:
        """Whether it saves on a stop signal and exits with 75."""
        return self.task == "train"

    @property
    def goes_on(self) -> bool:
        """Whether the same command resumes where it was interrupted; other tasks start over."""
        return self.task in ("train", "build", "encode")

    @property
    def wants_gpus(self) -> bool:
        """Whether it runs a model, rather than only reading and writing."""
        return self.task not in ("build", "vocab", "export")

    @property
    def on_ray(self) -> bool:
        """Whether it needs a Ray cluster over several nodes; on one node a build starts its own."""
        return self.task in ("build", "encode") and self.nodes > 1

    def with_workers(self, count: int) -> "RunSpec":
        """Return a copy with `count` workers, unless its arguments already give a number."""
        told = {"build": ("workers=", f"workers={count}"), "encode": ("--workers", f"--workers={count}")}
        if self.task not in told or any(word.startswith(told[self.task][0]) for word in self.arguments):
            return self
        return replace(self, arguments=(*self.arguments, told[self.task][1]))

    def on_cluster_of(self, address: str) -> "RunSpec":
        """Return a copy that joins the Ray cluster at `address`, which the place starts."""
        return replace(self, arguments=(*self.arguments, RAY_OPTION[self.task] + address))

    @property
    def command(self) -> tuple[str, ...]:
        """Arguments of the interpreter, in each process."""
        return ("-m", "launchers.cli", *self.arguments)

    @property
    def environment(self) -> dict[str, str]:
        """Variables of each process in every place; a place adds ranks, rendezvous, threads. The user's entries win."""
        lead = {LEAD_VARIABLE: str(self.lead_s)} if self.saves else {}
        return {"PYTHONUNBUFFERED": "1", **lead, **dict(self.env)}

    @property
    def header(self) -> tuple[str, str, str]:
        """Lines for the head of a rendered job: command, size and configuration hash, paths read and written."""
        command = command_line(["tessera", *self.arguments])
        size = f"{self.nodes} x {self.procs_per_node} processes, configuration {self.config_hash}"
        return command, size, f"reads and writes {', '.join(self.storage)}"


def describe(
    target: str | Path,
    arguments: Sequence[str],
    cluster: ClusterConfig,
    nodes: int | None = None,
    procs_per_node: int | None = None,
    task: Task | None = None,
) -> RunSpec:
    """Check a command and whether it fits the number of processes, before anything starts; return its RunSpec.

    target: the YAML of a run, build or vocabulary; the dataset of `encode`; the run of `export`, `evaluate` and
    `generate`. arguments: overrides, or that command's options. Raise ConfigError for a wrong recipe, for a batch that
    does not divide, and for a target whose task cannot be recognised.
    """
    task = task or task_of(target)
    spec = RunSpec(
        name="",
        task=task,
        arguments=(*COMMANDS[task], str(target), *arguments),
        config_hash="",
        run_folder="",
        nodes=(nodes or cluster.nodes) if task in ("train", "build", "encode") else 1,
        procs_per_node=(procs_per_node or cluster.procs_per_node) if task == "train" else 1,
        env=tuple(sorted(cluster.env.items())),
        lead_s=cluster.lead_s,
        retries=cluster.retries,
    )
    spec = DESCRIBED[task](spec, str(target), arguments)
    return replace(spec, run_folder=spec.run_folder or str(LAUNCHED / spec.name))


def task_of(target: str | Path) -> Task:
    """Return the task that a YAML describes. Raise ConfigError if it cannot be recognised."""
    path = Path(target)
    tree: Mapping[str, object] = read_yaml(path) if path.suffix in (".yaml", ".yml", ".json") else {}
    found = next((task for key, task in RECOGNISED.items() if key in tree), None)
    if found is None:
        raise ConfigError(
            f"{target}: neither a run (`model:`), a build (`source:`), a vocabulary (`dataset:`) nor a pipeline "
            f"(`steps:`); give --task {'|'.join(get_args(Task))}"
        )
    return found


def check_names(config: RunConfig) -> None:
    """Raise ConfigError if `optim.freeze` or `optim.layer_decay` do not fit the parameters. Imports torch only then.

    A machine that only submits may lack torch; the run itself refuses them before its first step.
    """
    if (config.optim.freeze or config.optim.layer_decay < 1) and find_spec("torch"):
        from pretrain.engine.optim import check_parameters

        check_parameters(config)


def _train(spec: RunSpec, target: str, arguments: Sequence[str]) -> RunSpec:
    config = load_run(target, *split_changes(arguments))
    check_names(config)
    refuse_other_folder(config.run)
    try:
        micro_batch_of(config.train, spec.world_size)
    except ValueError as error:
        raise ConfigError(f"{target}: {error}") from None
    if text := refusal(spec.lead_s, Path(config.run)):
        raise ConfigError(text)
    places = (config.run, config.train.checkpoints, config.initial, *config.data.paths)
    name = job_name(Path(config.run).name)
    return replace(
        spec,
        name=name,
        config_hash=digest(config),
        run_folder=config.run,
        storage=tuple(path for path in places if path),
        reads=((config.initial,) if config.initial and not has_begun(config) else ()) + config.data.paths,
        checkpoints=config.train.checkpoints or "",
    )


def split_changes(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split the arguments of a training into overrides and the values of --change (one word or two)."""
    overrides: list[str] = []
    changes: list[str] = []
    words = iter(arguments)
    for word in words:
        option, _, value = word.partition("=")
        if option == "--change":
            changes.append(value or next(words, ""))
        else:
            overrides.append(word)
    return overrides, changes


def _build(spec: RunSpec, target: str, overrides: Sequence[str]) -> RunSpec:
    config = load_settings(BuildConfig, target, overrides)
    source = getattr(config.source, "path", None)
    storage = tuple(path for path in (config.output, source, config.image_tokenizer) if path)
    for name, condition in config.filters.items():
        Condition(condition, f"filters.{name}")
    name = job_name(f"build-{Path(config.output).name}")
    return replace(spec, name=name, config_hash=digest(config), storage=storage, reads=storage[1:])


def _vocab(spec: RunSpec, target: str, overrides: Sequence[str]) -> RunSpec:
    config = load_settings(VocabConfig, target, overrides)
    name = job_name(f"vocab-{Path(config.output).name}")
    return replace(
        spec, name=name, config_hash=digest(config), storage=(config.output, config.dataset), reads=(config.dataset,)
    )


def _command(spec: RunSpec, target: str, arguments: Sequence[str]) -> RunSpec:
    """Complete the spec of a command that has options but no YAML; its hash is that of the command line."""
    hashed = hashlib.sha256("\0".join(spec.arguments).encode()).hexdigest()[:16]
    named = tuple(_named_folders(spec.task, arguments))
    return replace(
        spec,
        name=job_name(f"{spec.task}-{Path(target).name}"),
        config_hash=hashed,
        storage=(target, *named),
        reads=(target,) if spec.task == "export" else (target, *named),
    )


def _named_folders(task: Task, arguments: Sequence[str]) -> list[str]:
    """Return what a command line touches besides its target: the tokenizer of `encode`, the output of `export`."""
    if task == "export":
        return [word for word in arguments[:1] if not word.startswith("-")]
    pairs = zip(arguments, [*arguments[1:], ""], strict=False)
    told = (after if word == "--image-tokenizer" else word.partition("--image-tokenizer=")[2] for word, after in pairs)
    return [folder for folder in told if folder]


DESCRIBED: dict[Task, Callable[[RunSpec, str, Sequence[str]], RunSpec]] = {
    "train": _train,
    "build": _build,
    "vocab": _vocab,
    "encode": _command,
    "export": _command,
    "evaluate": _command,
    "generate": _command,
}


def seconds_of(limit: str) -> int:
    """Convert a Slurm limit to seconds: minutes[:seconds], hours:minutes:seconds, days-hours[:minutes[:seconds]]."""
    days, dash, clock = limit.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    units = (3600, 60, 1) if dash or len(parts) == 3 else (60, 1)
    return int(days or 0) * 86400 + sum(part * unit for part, unit in zip(parts, units, strict=False))


def check_gpus(procs_per_node: int, gpus_per_node: int) -> None:
    """Raise ConfigError for more processes than GPUs: a GPU belongs to one process."""
    if gpus_per_node and procs_per_node > gpus_per_node:
        raise ConfigError(
            f"procs_per_node={procs_per_node} is more than gpus_per_node={gpus_per_node}; "
            f"a GPU serves one process, use --procs-per-node {gpus_per_node}"
        )


def dns_label(text: str, longest: int = LONGEST_NAME) -> str:
    """Return `text` as a name for Slurm, DNS and Kubernetes: a-z, 0-9 and '-', a letter first, cut to `longest`."""
    label = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    if not label or not label[0].isalpha():
        label = f"run-{label}"
    return label[:longest].rstrip("-")


def job_name(text: str) -> str:
    """Return `text` if it is a label of at most 40 letters; otherwise its label and six digits of its sha256.

    Names that differ only in case, punctuation, non-ASCII letters or after the cut then differ as jobs and objects too.
    """
    if dns_label(text) == text:
        return text
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:NAME_DIGITS]
    return f"{dns_label(text, LONGEST_NAME - NAME_DIGITS - 1)}-{digest}"
