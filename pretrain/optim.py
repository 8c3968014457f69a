"""AdamW by role: which parameters learn together, and of those which decay and which do not."""

import re
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import nn

from pretrain.config import MAIN, OptimConfig


@runtime_checkable
class TakesTurns(Protocol):
    """An objective whose parameters learn by several optimizers, one after another in every step.

    A step is a sequence of turns, each a forward, a backward and an update of one role's parameters alone. `forward`
    finds the number of its role in `roles` under the batch's key "turn" and returns that turn's "loss"; it sees the
    weights that the turns before have left. Parameters of other roles stand still: they receive no gradient, but
    gradients pass through them.
    """

    roles: ClassVar[tuple[str, ...]]
    """Every role there is, "main" first. Each has an AdamW of its own: `optim`, `optim.roles.ROLE`."""

    def role_of(self, name: str) -> str:
        """The role of the parameter of this name."""
        ...

    def turns(self, step: int) -> tuple[str, ...]:
        """Who learns in this step, in this order: a part of `roles`, the same on every rank."""
        ...


def parameter_groups(module: nn.Module, optim: OptimConfig) -> list[dict[str, Any]]:
    """Trainable parameters as [decay, no_decay] of each role, with `role`, `name`, `names` and AdamW's settings.

    An empty group is left out. Vectors (biases, norm gains, scales) never decay; neither does a name in which a
    pattern of `no_decay` is found. An objective that does not take turns has the one role "main".
    """
    members: dict[tuple[str, bool], list[tuple[str, nn.Parameter]]] = {}
    for role in roles_of(module):
        members |= {(role, True): [], (role, False): []}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            role = module.role_of(name) if isinstance(module, TakesTurns) else MAIN
            spare = parameter.ndim < 2 or any(re.search(pattern, name) for pattern in optim.of(role).no_decay)
            members[role, not spare].append((name, parameter))
    return [_group(role, decays, named, optim) for (role, decays), named in members.items() if named]


def roles_of(module: nn.Module) -> tuple[str, ...]:
    """The roles of an objective's parameters, in the order of their turns."""
    return module.roles if isinstance(module, TakesTurns) else (MAIN,)


def _group(role: str, decays: bool, named: list[tuple[str, nn.Parameter]], optim: OptimConfig) -> dict[str, Any]:
    own, kind = optim.of(role), "decay" if decays else "no_decay"
    return {
        "role": role,
        "name": kind if role == MAIN else f"{role}.{kind}",
        "names": [name for name, _ in named],
        "params": [parameter for _, parameter in named],
        "weight_decay": own.weight_decay if decays else 0.0,
        "lr": own.lr,
        "betas": own.betas,
        "eps": own.eps,
    }


def build_optimizer(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Torch's own fused AdamW: DeepSpeed's would be compiled for minutes on first use."""
    members = [{key: value for key, value in group.items() if key not in ("name", "names")} for group in groups]
    return torch.optim.AdamW(members, fused=True)
