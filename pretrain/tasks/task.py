"""What every task is: a model with what it reads and its loss. What a task does not override, it does not need."""

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn

from pretrain.schema.common import MAIN, ModelSettings
from pretrain.schema.tasks import TaskSettings
from pretrain.tasks.collectives import Collectives

Batch = dict[str, Tensor]
PREVIEWED = 16
"""Samples of a preview: the first of the stream."""


class Task(nn.Module):
    """A model under its loss.

    `forward(batch)` returns named scalars []: the mean over ranks of "loss" is the loss of the global batch, the others
    are detached metrics. The batch holds the tensors of `keys`, "step" int64 [] (updates made) and "turn" int64 [].
    """

    inputs: ClassVar[Any]
    """Inputs(config, stream, text tokenizer): turns a list of samples into the tensors of a batch."""
    keys: ClassVar[tuple[str, ...]] = ()
    """What `forward` reads of a batch."""
    compares_batch: ClassVar[bool] = False
    """Does the gradient of a part of the batch depend on the whole of it? `slopes` is called then."""
    model: nn.Module

    def __init__(self, model: nn.Module, config: TaskSettings, collectives: Collectives) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.collectives = collectives

    @property
    def trains(self) -> tuple[type[ModelSettings], ...]:
        """The models, by their settings, that the task trains."""
        return self.config.trains

    @property
    def replicated(self) -> bool:
        """Does every rank need the whole weights (ZeRO stage 0)?"""
        return self.config.replicated

    @property
    def roles(self) -> tuple[str, ...]:
        """One name for each optimizer, MAIN first; each has an AdamW of its own: `optim`, `optim.roles.ROLE`."""
        return self.config.roles

    def role_of(self, name: str) -> str:
        """The role of the parameter of this name."""
        return MAIN

    def turns(self, step: int) -> tuple[str, ...]:
        """Whose optimizers update in this step, one after another: a part of `roles`, the same on every rank.

        Each turn is a forward, a backward and an update of one role's parameters. `forward` finds the number of the
        role under "turn", returns that turn's "loss" and sees the weights that the turns before have left. Parameters
        of other roles receive no gradient, but gradients pass through them.
        """
        return (MAIN,)

    def counts(self, batch: Batch) -> Batch:
        """What this micro-batch's sums are divided by, each [].

        With accumulation `forward` gets their means over micro-batches and ranks, under the same names.
        """
        return {}

    def slopes(self, rows: list[Batch]) -> list[Batch]:
        """What to add to each micro-batch of this rank so that its gradient is that of the whole batch.

        rows: what `forward` returned for each of them with the key "embed" in the batch.
        """
        raise NotImplementedError(f"{type(self).__name__} compares the batch and has no slopes")

    def after_step(self, step: int) -> None:
        """What follows an update, on every rank alike."""

    def preview(self, first: Callable[[int], Batch]) -> Tensor | None:
        """Pictures to look at, float32 [n, 3, S, S] in [-1, 1]. first(n): the first n samples of the stream."""
        return None
