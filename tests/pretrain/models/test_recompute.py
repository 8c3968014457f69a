"""Blocks that are computed again in the backward: the same loss and gradients, with dropout, for every family."""

from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain.models.layers import Block
from pretrain.models.noise import noise_of
from tests.families import FAMILIES, Family, batch_of, task_of

BATCH, LAYERS = 6, 2


def config_of(family: Family, recompute: bool) -> Any:
    """Its run with dropout, where the model has any."""
    return family.config(family.dropping(0.2), recompute=recompute)


def outcome(family: Family, recompute: bool, noise_of_samples: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and the gradients of all parameters."""
    config = config_of(family, recompute)
    task, batch = task_of(config), batch_of(config, BATCH)
    noise = (batch.get("noise"), batch.get("places")) if noise_of_samples else (None, None)
    with noise_of(*noise):
        loss = task(batch)["loss"]
    with noise_of(torch.full((BATCH, 1), 99)):  # the backward comes when the next micro-batch may be there already
        loss.backward()
    return loss.detach(), {name: p.grad for name, p in task.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("noise_of_samples", [True, False], ids=["noise of samples", "torch's noise"])
@pytest.mark.parametrize("name", FAMILIES)
def test_loss_and_gradients_are_bit_for_bit_those_of_kept_activations(name: str, noise_of_samples: bool) -> None:
    plain, gradients = outcome(FAMILIES[name], False, noise_of_samples)
    again, repeated = outcome(FAMILIES[name], True, noise_of_samples)
    assert torch.equal(plain, again)
    assert gradients.keys() == repeated.keys()
    assert [name for name in gradients if not torch.equal(gradients[name], repeated[name])] == []


@pytest.mark.parametrize("name", FAMILIES)
def test_every_block_runs_twice_in_training_and_once_otherwise(name: str) -> None:
    config = config_of(FAMILIES[name], recompute=True)
    task, batch = task_of(config), batch_of(config, BATCH)
    runs = {name: 0 for name, module in task.named_modules() if isinstance(module, Block)}

    def count(name: str) -> Any:
        return lambda *_: runs.update({name: runs[name] + 1})

    for block in runs:
        task.get_submodule(block).register_forward_pre_hook(count(block))
    task(batch)["loss"].backward()
    ran = {name: times for name, times in runs.items() if times}
    assert ran and set(ran.values()) == {2}
    with torch.no_grad():
        task(batch)
    assert {runs[name] for name in ran} == {3}
