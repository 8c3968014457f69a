"""AdamW with two groups of parameters: those that decay and those that do not."""

import re
from typing import Any

import torch
from torch import nn

from pretrain.config import OptimConfig


def parameter_groups(module: nn.Module, optim: OptimConfig) -> list[dict[str, Any]]:
    """Trainable parameters as [decay, no_decay], each with its `name` and `names`; an empty group is left out.

    Vectors (biases, norm gains, scales) never decay; neither does a name in which a pattern of `no_decay` is found.
    """
    decay: list[tuple[str, nn.Parameter]] = []
    spared: list[tuple[str, nn.Parameter]] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            spare = parameter.ndim < 2 or any(re.search(pattern, name) for pattern in optim.no_decay)
            (spared if spare else decay).append((name, parameter))
    groups = [("decay", decay, optim.weight_decay), ("no_decay", spared, 0.0)]
    return [
        {"name": name, "params": [p for _, p in members], "names": [n for n, _ in members], "weight_decay": rate}
        for name, members, rate in groups
        if members
    ]


def build_optimizer(groups: list[dict[str, Any]], optim: OptimConfig) -> torch.optim.Optimizer:
    """Torch's own fused AdamW: DeepSpeed's would be compiled for minutes on first use."""
    members = [{key: value for key, value in group.items() if key not in ("name", "names")} for group in groups]
    return torch.optim.AdamW(members, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)
