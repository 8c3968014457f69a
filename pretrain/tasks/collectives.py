"""What a task may ask of the other ranks; the loop hands one in, so that tasks know no ranks."""

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
