"""The base class of all tasks: a model with its inputs and its loss. A task overrides only what it needs."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pretrain.inputs.shapes import ShapeOf
from pretrain.schema.common import MAIN, ModelSettings, TaskSettings
from pretrain.tasks.collectives import Collectives

Batch = dict[str, Tensor]
PREVIEWED = 16
"""Number of samples in a preview, taken from the start of the stream."""


class Task(nn.Module):
    """A model with its loss.

    `forward(batch)` returns named scalars []: the mean of "loss" over ranks is the loss of the global batch; the others
    are detached metrics. The batch holds the tensors of `keys`, "step" int64 [] (steps made) and "turn" int64 [].
    """

    inputs: ClassVar[Any]
    """Factory: inputs(config, stream, text tokenizer) returns a callable from a list of samples to a batch."""
    keys: ClassVar[tuple[str, ...]] = ()
    """Keys of the batch that `forward` reads."""
    shapes: ClassVar[Mapping[str, ShapeOf]] = {}
    """Shapes of the keys that no other task reads; those of shared keys are in `inputs.shapes.SHAPES`."""
    compares_batch: ClassVar[bool] = False
    """Whether the gradient of a micro-batch depends on the whole batch; `slopes` is called then."""
    model: nn.Module

    def __init__(self, model: nn.Module, config: TaskSettings, collectives: Collectives) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.collectives = collectives

    @property
    def trains(self) -> tuple[type[ModelSettings], ...]:
        """The settings classes of the models that the task trains."""
        return self.config.trains

    @property
    def replicated(self) -> bool:
        """Whether every rank needs the full weights (ZeRO stage 0)."""
        return self.config.replicated

    @property
    def roles(self) -> tuple[str, ...]:
        """Names of the optimizers, MAIN first. Each is an AdamW with its own settings: `optim`, `optim.roles.ROLE`."""
        return self.config.roles

    def role_of(self, name: str) -> str:
        """Return the role of the parameter with this name."""
        return MAIN

    def turns(self, step: int) -> tuple[str, ...]:
        """Return the roles that update in this step, in order: a subset of `roles`, the same on every rank.

        Each turn is a forward, a backward and an update of one role's parameters. `forward` gets the role's index as
        "turn", returns that turn's "loss" and uses the weights as the previous turns left them. Parameters of other
        roles receive no gradient, but gradients flow through them.
        """
        return (MAIN,)

    def must_train(self) -> dict[str, int]:
        """Return the parameters whose gradient the loss itself needs, and from which step on: none may be frozen."""
        return {}

    def counts(self, batch: Batch) -> Batch:
        """Return the divisors of this micro-batch's sums, each [].

        With accumulation, `forward` gets their means over micro-batches and ranks under the same names.
        """
        return {}

    def slopes(self, rows: list[Batch]) -> list[Batch]:
        """Return what to add to each micro-batch of this rank so that the step has the gradient of the whole batch.

        rows: the results of `forward` for the micro-batches with the key "embed" in the batch.
        """
        raise NotImplementedError(f"{type(self).__name__} uses the whole batch and has no slopes")

    def totals(self, batch: Batch) -> Batch:
        """Return sums over the samples of a batch, for an evaluation: float64 [], or [n] for counts.

        The sums of several batches are added; `means` turns the result into figures. By default every sample counts
        equally in each metric of `forward`. The collectives must be those of one device.
        """
        samples = len(batch[self.keys[0]])
        found = type(self).forward(self, batch | {"step": torch.tensor(0)})
        sums = {name: value.double().reshape(()) * samples for name, value in found.items()}
        return sums | {"samples": torch.tensor(samples, dtype=torch.float64)}

    def means(self, totals: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the figures of an evaluation, given the sums of `totals` over all its batches."""
        return {name: float(total / totals["samples"]) for name, total in totals.items() if name != "samples"}

    def after_step(self, step: int) -> None:
        """Called after each step, on every rank in the same way. step: steps made."""

    def preview(self, first: Callable[[int], Batch]) -> Tensor | None:
        """Return preview pictures, float32 [n, 3, S, S] in [-1, 1], or None. first(n): the stream's first n samples."""
        return None
