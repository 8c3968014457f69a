"""Accumulation 1 and k have the same loss and the same gradient, for every family, in float32 and under bf16 autocast.

What a step makes of its micro-batches is `train.Run`'s own; the engine is torch alone: autocast around the forward,
gradients averaged over micro-batches.
"""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pretrain.config import RunConfig
from pretrain.runtime.mesh import Mesh, place_from
from pretrain.train import Run, Turn
from tests.families import FAMILIES, batch_of, task_of

BATCH, STEP = 8, 3
VARIANTS: dict[str, dict[str, Any]] = {
    "bert, one text": {"nsp": False},
    "vqgan": {"discriminator_weight": 0.0, "revive_after_steps": 2},
    "vqgan, discriminator": {"discriminator_start_step": 0, "revive_after_steps": 2},
}
"""Settings of the task in which a family is tried, instead of those of its row."""


def config_of(name: str) -> RunConfig:
    """A run of the row NAME, or of a variant of it; its losses do not depend on a draw of dropout."""
    family = FAMILIES[name if name in FAMILIES else name.partition(",")[0]]
    return family.config(family.dropping(0.0), VARIANTS.get(name))


class Plain:
    """An engine of torch alone, with the calls that a step makes."""

    def __init__(self, task: nn.Module, precision: str) -> None:
        self.task, self.low = task, precision == "bf16"

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """One micro-batch -> named losses."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.low):
            return dict(self.task(batch))


def built(name: str) -> nn.Module:
    """The task, with weights larger than at the start, so that logits lie apart."""
    task = task_of(config_of(name))
    for parameter_name, parameter in task.named_parameters():
        if parameter.ndim > 1:
            std = 0.3 if "embedding" in parameter_name else parameter[0].numel() ** -0.5
            nn.init.normal_(parameter, std=std)
    return task


def turn_of(task: nn.Module, name: str, precision: str, parts: int, number: int) -> tuple[float, dict[str, Tensor]]:
    """One turn of a step in so many micro-batches -> its loss and the gradient of every parameter."""
    run: Any = object.__new__(Run)
    run.task, run.step = task, STEP
    run.engine = Plain(task, precision)
    run.mesh = Mesh(place_from({}), torch.device("cpu"), torch.distributed.HashStore())
    turn = Turn("", torch.tensor(number), last=True)
    size, config = BATCH // parts, config_of(name)
    batches = [batch_of(config, size, part * size) for part in range(parts)]
    losses = []
    for batch in run.with_whole_step(batches, turn):
        losses.append(run.engine.forward(batch | {"step": torch.tensor(STEP), "turn": turn.number})["loss"])
        (losses[-1] / parts).backward()
    found = {name: p.grad.clone() for name, p in task.named_parameters() if p.grad is not None}
    task.zero_grad()
    return float(torch.stack(losses).detach().double().mean()), found


@pytest.mark.parametrize("accumulation", [2, 4, 8])
@pytest.mark.parametrize(("precision", "off", "apart"), [("fp32", 1e-6, 1e-5), ("bf16", 1e-5, 4e-3)])
@pytest.mark.parametrize("name", sorted({*FAMILIES, *VARIANTS}))
def test_accumulation_has_the_loss_and_the_gradient_of_the_whole_batch(
    name: str, precision: str, off: float, apart: float, accumulation: int
) -> None:
    """off: of the loss, relatively. apart: of the whole gradient; every micro-batch rounds its part to bf16.

    The loss with a discriminator holds lambda, the ratio of two such gradients.
    """
    task, turns = built(name), 2 if name == "vqgan, discriminator" else 1
    if (turns, precision) == (2, "bf16"):
        off, apart = 2e-4, 1e-2
    for number in range(turns):
        loss, whole = turn_of(copy.deepcopy(task), name, precision, 1, number)
        found, cut = turn_of(copy.deepcopy(task), name, precision, accumulation, number)
        assert found == pytest.approx(loss, rel=off)
        assert cut.keys() == whole.keys()
        flat = [torch.cat([grads[name].flatten() for name in whole]).double() for grads in (cut, whole)]
        assert float((flat[0] - flat[1]).norm() / flat[1].norm()) < apart


@pytest.mark.parametrize("accumulation", [2, 4])
def test_codes_are_revived_from_the_latents_of_the_whole_batch(accumulation: int) -> None:
    tables = []
    for parts in (1, accumulation):
        task = built("vqgan")
        with torch.no_grad():
            task.model.quantize.embedding.weight[10:] = 9.0  # far from every latent
        turn_of(task, "vqgan", "fp32", parts, 0)
        task.after_step(STEP + 1)
        tables.append(task.model.quantize.embedding.weight.detach())
    torch.testing.assert_close(tables[1], tables[0], rtol=1e-5, atol=1e-6)
