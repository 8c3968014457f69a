"""Collective operations for tasks. The training loop passes them in, so that tasks do not depend on ranks."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Collectives:
    """`gather`: [b, ...] -> [b * world, ...] in rank order, with gradient; `sum`: over ranks, no gradient."""

    gather: Callable[[Tensor], Tensor]
    sum: Callable[[Tensor], Tensor]
    world: int


ONE_DEVICE = Collectives(gather=lambda x: x, sum=lambda x: x, world=1)
