"""AdamW parameter groups: by role, with and without weight decay."""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pretrain.config import OptimConfig
from pretrain.schema.common import MAIN

if TYPE_CHECKING:
    from pretrain.tasks.task import Task


def parameter_groups(task: "Task", optim: OptimConfig) -> list[dict[str, Any]]:
    """Return the groups [decay, no_decay] of each role, with `role`, `name`, `names`, `params` and AdamW's settings.

    Frozen parameters and empty groups are left out. Vectors (biases, norm gains, scales) never decay; neither does a
    parameter whose name matches a pattern of `no_decay` (re.search).
    """
    members: dict[tuple[str, bool], list[tuple[str, nn.Parameter]]] = {}
    for role in task.roles:
        members |= {(role, True): [], (role, False): []}
    for name, parameter in task.named_parameters():
        if parameter.requires_grad:
            role = task.role_of(name)
            spare = parameter.ndim < 2 or any(re.search(pattern, name) for pattern in optim.of(role).no_decay)
            members[role, not spare].append((name, parameter))
    return [_group(role, decays, named, optim) for (role, decays), named in members.items() if named]


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


def regrouped(saved: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Return saved groups under the settings and with the members of `now`, both as in `Engine.scalars`.

    A group takes the update count of its members; one of new members is left out. Returns the groups as saved if they
    had other members than settings can explain: those of different counts together, or more.
    """
    counts = {name: row["updates"] for row in saved.values() for name in row["names"]}
    found = {key: {counts.get(name) for name in row["names"]} for key, row in now.items()}
    if counts.keys() - {name for row in now.values() for name in row["names"]} or any(
        len(c) > 1 for c in found.values()
    ):
        return dict(saved)
    known = {key: count for key, [count] in found.items() if count is not None}
    return {key: {**now[key], "updates": count} for key, count in known.items()}


def build_optimizer(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Return torch's own fused AdamW: DeepSpeed's would take minutes to compile on first use."""
    members = [{key: value for key, value in group.items() if key not in ("name", "names")} for group in groups]
    return torch.optim.AdamW(members, fused=True)
