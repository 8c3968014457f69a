"""Modules that stand for a task in tests of the engine."""

from typing import ClassVar

from torch import nn

from pretrain.tasks.task import Task


class Plain(Task):
    """A task without model and settings: its layers are its own; by default it has one optimizer."""

    roles: ClassVar[tuple[str, ...]] = ("main",)  # type: ignore[assignment]

    def __init__(self) -> None:
        nn.Module.__init__(self)
