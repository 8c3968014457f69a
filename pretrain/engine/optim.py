"""AdamW parameter groups: by role, weight decay, the step at which they begin to train, and depth in the model."""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from data_pipeline.errors import ConfigError
from pretrain.config import FreezeConfig, OptimConfig, RunConfig
from pretrain.schema.common import MAIN

if TYPE_CHECKING:
    from pretrain.tasks.task import Task

NEVER = 2**63
"""The first step of a parameter that does not train in this run."""

NO_GRADIENT = "optim.freeze: the loss depends on no parameter that is left to train; leave out what it depends on"


class Kind(NamedTuple):
    """What the parameters of a group have in common.

    first_step: the step whose update is the first to train them. below: their layer, counted down from the head.
    """

    role: str
    decays: bool
    first_step: int = 0
    below: int = 0

    @property
    def name(self) -> str:
        """The group's name in checkpoints."""
        role = "" if self.role == MAIN else f"{self.role}."
        depth, start = f"-{self.below}" if self.below else "", f"@{self.first_step}" if self.first_step else ""
        return f"{role}{'decay' if self.decays else 'no_decay'}{depth}{start}"


def parameter_groups(task: "Task", optim: OptimConfig, step: int = 0) -> list[dict[str, Any]]:
    """Return the groups of what trains at `step`, with `role`, `name`, `names`, `params` and AdamW's settings.

    Each role has the groups [decay, no_decay], and two more for each step at which frozen parameters begin to train:
    their update counts, which AdamW's bias correction uses, begin there. With `layer_decay` there are such groups for
    each layer. Frozen parameters and empty groups are left out. Vectors (biases, norm gains, scales) never decay;
    neither does a parameter whose name matches a pattern of `no_decay` (re.search).
    """
    depths = depths_of([name for name, _ in task.named_parameters()]) if optim.layer_decay < 1 else {}
    members: dict[Kind, list[tuple[str, nn.Parameter]]] = {}
    for role in task.roles:
        members |= {Kind(role, True): [], Kind(role, False): []}
    for name, parameter in task.named_parameters():
        first = first_step(name, optim.freeze)
        if parameter.requires_grad and first <= step:
            role = task.role_of(name)
            spare = parameter.ndim < 2 or any(re.search(pattern, name) for pattern in optim.of(role).no_decay)
            members.setdefault(Kind(role, not spare, first, depths.get(name, 0)), []).append((name, parameter))
    return [_group(kind, named, optim) for kind, named in members.items() if named]


def _group(kind: Kind, named: list[tuple[str, nn.Parameter]], optim: OptimConfig) -> dict[str, Any]:
    own = optim.of(kind.role)
    return {
        "role": kind.role,
        "first_step": kind.first_step,
        "name": kind.name,
        "names": [name for name, _ in named],
        "params": [parameter for _, parameter in named],
        "weight_decay": own.weight_decay if kind.decays else 0.0,
        "lr": own.lr,
        "lr_scale": optim.layer_decay**kind.below,
        "betas": own.betas,
        "eps": own.eps,
    }


def regrouped(saved: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Return saved groups under the settings and with the members of `now`, both as in `Engine.scalars`.

    A group takes the update count of its members; one of parameters that begin to train is left out. Returns the groups
    as saved if members of different counts came together, which settings do not explain. Raises ConfigError if
    some begin to train in a group of another name (`Kind.name`): they need a count of their own.
    """
    counts = {name: row["updates"] for row in saved.values() for name in row["names"]}
    found = {key: {counts.get(name) for name in row["names"]} for key, row in now.items()}
    for key, row in now.items():
        if None in found[key] and (len(found[key]) > 1 or "@" not in key):
            new = next(name for name in row["names"] if name not in counts)
            raise ConfigError(
                f"optim.freeze: {new} was frozen, and begins to train; keep its pattern, with until_step at this step "
                "or later"
            )
    if any(len(several) > 1 for several in found.values()):
        return dict(saved)
    known = {key: count for key, [count] in found.items() if count is not None}
    return {key: {**now[key], "updates": count} for key, count in known.items()}


def build_optimizer(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Return torch's own fused AdamW: DeepSpeed's would take minutes to compile on first use."""
    members = [{key: value for key, value in group.items() if key not in ("name", "names")} for group in groups]
    return torch.optim.AdamW(members, fused=True)


# ------------------------------------------------------------------------------- layer-wise decay of the rate

BLOCK = re.compile(r"(.*\.)?blocks\.(\d+)\.")
EMBEDDING = re.compile(r"\bembed(dings)?\.")


def depths_of(names: Sequence[str]) -> dict[str, int]:
    """Return how many layers each parameter is below the head, from all names in the order of their definition.

    As BEiT and MAE: of L numbered blocks, block i is L - i layers below, embeddings are L + 1, all else is the head, 0.
    (ELECTRA counts one more below its head.) A tower's embeddings are what it defines before its blocks; embeddings
    shared by towers, in a module `embeddings`, lie below the deepest. No entry for names of a model without blocks.
    """
    blocks = {name: found for name in names if (found := BLOCK.match(name))}
    towers: dict[str, int] = {}
    for found in blocks.values():
        towers[found[1]] = max(towers.get(found[1], 0), int(found[2]) + 1)
    below, passed = dict[str, int](), set[str]()
    for name in names if towers else ():
        if found := blocks.get(name):
            passed.add(found[1])
            below[name] = towers[found[1]] - int(found[2])
        else:
            own = max((tower for tower in towers if name.startswith(tower)), key=len, default=None)
            embeds = own not in passed if own is not None else bool(EMBEDDING.search(name))
            layers = max(towers.values()) if own is None else towers[own]
            below[name] = layers + 1 if embeds else 0
    return below


# ------------------------------------------------------------------------------------------------ freezing


def first_step(name: str, freeze: tuple[FreezeConfig, ...]) -> int:
    """Return the step whose update is the first to train this parameter: the latest one of the patterns it matches."""
    found = (entry.until_step for entry in freeze if re.search(entry.pattern, name))
    return max((NEVER if step is None else step for step in found), default=0)


def unfreezing_steps(optim: OptimConfig) -> tuple[int, ...]:
    """Return the steps at which parameters begin to train, in order."""
    return tuple(sorted({entry.until_step for entry in optim.freeze if entry.until_step is not None}))


def freeze(task: "Task", optim: OptimConfig, step: int) -> None:
    """Let the parameters that are frozen at `step` require no gradient."""
    for name, parameter in task.named_parameters():
        if first_step(name, optim.freeze) > step:
            parameter.requires_grad_(False)


def check_names(task: "Task", optim: OptimConfig) -> None:
    """Raise ConfigError if `freeze` or `layer_decay` do not fit the names of the task's parameters.

    Refuses a pattern that matches no parameter, a role that has none left to train, a frozen parameter whose gradient
    the loss needs, and layers of a model that numbers none.
    """
    if optim.layer_decay < 1 and not depths_of([name for name, _ in task.named_parameters()]):
        raise ConfigError(
            f"optim.layer_decay={optim.layer_decay:g}: this model has no numbered blocks to decay the rate over; "
            "leave it out"
        )
    names = [name for name, parameter in task.named_parameters() if parameter.requires_grad]
    for entry in optim.freeze:
        if not any(re.search(entry.pattern, name) for name in names):
            raise ConfigError(
                f"optim.freeze: {entry.pattern!r} matches no parameter of {len(names)}; names are like "
                f"{', '.join(_examples(names))}"
            )
    for role in task.roles:
        if optim.freeze and not any(first_step(n, optim.freeze) == 0 for n in names if task.role_of(n) == role):
            raise ConfigError(
                f"optim.freeze matches every parameter{'' if role == MAIN else f' of the {role}'}, so that nothing "
                "trains from the first step on; leave some out"
            )

    for name, step in task.must_train().items():
        if first_step(name, optim.freeze) > step:
            raise ConfigError(
                f"optim.freeze matches {name}, whose gradient the loss needs from step {step} on; leave it out"
            )


def check_parameters(config: RunConfig) -> None:
    """Call `check_names` with the run's task, built without memory, before the run starts."""
    from pretrain.models import MODELS
    from pretrain.tasks import TASKS
    from pretrain.tasks.collectives import ONE_DEVICE

    with torch.device("meta"):
        task = TASKS[config.task.kind](MODELS[config.model.kind](config.model), config.task, ONE_DEVICE)
    check_names(task, config.optim)


def _examples(names: list[str]) -> list[str]:
    """Return the first name, one from the middle, and the last."""
    return list(dict.fromkeys((names[0], names[len(names) // 2], names[-1])))
