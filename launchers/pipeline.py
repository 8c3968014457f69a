"""Pipelines: steps that run in sequence, such as build -> encode -> train -> evaluate, from one file.

A single command is a pipeline of one step, so that every place handles one form.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic

from pydantic import PositiveInt

from data_pipeline.errors import ConfigError
from data_pipeline.settings import Location, Settings, check_settings, local_path, read_yaml
from launchers.spec import C, RunSpec, Task, describe, load_cluster


class StepConfig(Settings):
    """A step: the arguments that `tessera launch` takes on its command line.

    after: names of steps that must have succeeded; by default the step above, `[]` for none. cluster: the cluster file
    of this step alone, for example a partition without GPUs.
    """

    target: Location
    name: str | None = None
    task: Task | None = None
    arguments: tuple[str, ...] = ()
    after: tuple[str, ...] | None = None
    cluster: Path | None = None
    nodes: PositiveInt | None = None
    procs_per_node: PositiveInt | None = None


class PipelineConfig(Settings):
    """The steps of a pipeline, each below the steps it waits for."""

    steps: tuple[StepConfig, ...]


@dataclass(frozen=True)
class Step(Generic[C]):
    """One step: what runs, where, and after which other steps (by name)."""

    name: str
    spec: RunSpec
    cluster: C
    after: tuple[str, ...] = ()


def plan_steps(
    schema: type[C],
    target: str,
    arguments: Sequence[str] = (),
    cluster: Path | None = None,
    nodes: int | None = None,
    procs_per_node: int | None = None,
    task: Task | None = None,
) -> list[Step[C]]:
    """Return the checked steps that a command line launches: those of a pipeline, or a single one.

    Raise ConfigError as `describe` does, and for steps that wait for one not above them or share a folder.
    """
    if task is None and _is_pipeline(target):
        if arguments:
            raise ConfigError(f"{target}: overrides belong to a step of a pipeline; write {arguments[0]} into its file")
        return _read_pipeline(schema, Path(target), cluster, nodes, procs_per_node)
    place = load_cluster(schema, cluster)
    spec = describe(target, arguments, place, nodes, procs_per_node, task)
    return [Step(spec.name, spec, place)]


def _is_pipeline(target: str) -> bool:
    return Path(target).suffix in (".yaml", ".yml") and "steps" in read_yaml(Path(target))


def _read_pipeline(
    schema: type[C], path: Path, cluster: Path | None, nodes: int | None, procs_per_node: int | None
) -> list[Step[C]]:
    steps: list[Step[C]] = []
    for config in check_settings(PipelineConfig, read_yaml(path), str(path)).steps:
        place = load_cluster(schema, config.cluster or cluster)
        procs = config.procs_per_node or procs_per_node
        spec = describe(config.target, config.arguments, place, config.nodes or nodes, procs, config.task)
        name, above = config.name or spec.name, [step.name for step in steps]
        if name in above:
            raise ConfigError(f"{path}: two steps are called {name!r}; give one of them another `name:`")
        after = tuple(above[-1:]) if config.after is None else config.after
        if unknown := [other for other in after if other not in above]:
            raise ConfigError(f"{path}: {name!r} waits for {unknown[0]!r}, which is not an earlier step: {above}")
        if same := [step.name for step in steps if step.spec.run_folder == spec.run_folder]:
            raise ConfigError(f"{path}: {name!r} and {same[0]!r} use the same run folder {spec.run_folder}")
        steps.append(Step(name, spec, place, after))
    if not steps:
        raise ConfigError(f"{path}: `steps:` is empty; give at least one `target:`")
    return steps


def check_paths(steps: Sequence[Step[Any]]) -> None:
    """Raise ConfigError if a step reads a path that neither exists nor is written by a step above.

    Addresses and patterns are left for the step itself to check.
    """
    written: list[Path] = []
    for step in steps:
        for path in map(local_path, step.spec.reads):
            if path is None or path.exists() or any(path.absolute().is_relative_to(made) for made in written):
                continue
            raise ConfigError(
                f"{step.name} reads {path}, which does not exist and no earlier step writes; create it, or correct "
                "the path"
            )
        written += [made.absolute() for made in map(local_path, step.spec.writes) if made is not None]
