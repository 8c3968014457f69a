"""What a trace of the task says, as plain numbers: parameters, FLOPs, and the bytes that it keeps, holds and moves."""

import dataclasses
from collections.abc import Callable

FP32 = 4


@dataclasses.dataclass(frozen=True)
class Weight:
    """One parameter. low: of a plain linear or convolution, which DeepSpeed sends in the precision of the autocast."""

    numel: int
    low: bool = False


@dataclasses.dataclass(frozen=True)
class Figures:
    """One forward, with its backward where it has one. FLOPs: of products, attention, convolutions; the rest in bytes.

    forward, backward: of the model; repeated: computed again in the backward; outside: of the task around the model.
    layers, loss: kept for the backward by the model and by the task around it; copies: of weights in the autocast's
    precision, low: of those that DeepSpeed sends so; cast, cast_low: the most of these at one time, as autocast holds
    those of a block that is computed again to the end of the forward; temporary: the most that lives beside all these.
    moved, moved_back: read and written by the operations of the forward and of the backward. gathered, returned: put
    together over all ranks, and summed over them on the way back. tokens: looked up at once.
    """

    forward: float = 0
    backward: float = 0
    repeated: float = 0
    outside: float = 0
    layers: float = 0
    loss: float = 0
    copies: float = 0
    copies_low: float = 0
    cast: float = 0
    cast_low: float = 0
    temporary: float = 0
    batch: float = 0
    moved: float = 0
    moved_back: float = 0
    gathered: float = 0
    returned: float = 0
    tokens: float = 0

    @property
    def flops(self) -> float:
        """All that is computed, what is computed twice counted twice."""
        return self.forward + self.backward + self.repeated + self.outside

    @property
    def kept(self) -> float:
        """Bytes that wait for the backward, without the batch."""
        return self.layers + self.loss + self.copies + self.copies_low

    @property
    def most(self) -> float:
        """Bytes held at the worst moment, without the batch and the gradients of parameters."""
        return self.layers + self.loss + self.cast + self.cast_low + self.temporary

    def then(self, other: "Figures") -> "Figures":
        """Both, one after the other: work adds up, of memory the greater counts."""
        larger = max(self, other, key=lambda one: one.most)
        summed = {name: getattr(self, name) + getattr(other, name) for name in WORK}
        return dataclasses.replace(larger, **summed)

    def towards(self, other: "Figures", share: float) -> "Figures":
        """On the line from these to the others: 0 is these, 1 the others."""
        return self._with(other, lambda mine, theirs: mine + share * (theirs - mine))

    def _with(self, other: "Figures", both: Callable[[float, float], float]) -> "Figures":
        names = [field.name for field in dataclasses.fields(self)]
        return Figures(**{name: both(getattr(self, name), getattr(other, name)) for name in names})


WORK = ("forward", "backward", "repeated", "outside", "moved", "moved_back", "gathered", "returned")
"""The fields that add up over what is done one after the other."""


@dataclasses.dataclass(frozen=True)
class Traced:
    """A step of one rank.

    micro: forward and backward of each micro-batch. Where the gradient of a micro-batch depends on the whole batch,
    first: the forward of each that goes before, whole: what is then computed once of all, and cached: bytes of what is
    known of them. rows: samples of a micro-batch. low: bytes of an element under autocast, 4 where there is none.
    later: roles of parameters that do not learn in this step, but later in the run.
    """

    weights: tuple[Weight, ...]
    low: int
    on_gpu: bool
    rows: int
    micro: Figures
    first: Figures = Figures()
    whole: Figures = Figures()
    cached: float = 0
    later: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        return sum(weight.numel for weight in self.weights)

    def at(self, rows: int, other: "Traced") -> "Traced":
        """A step in micro-batches of `rows`, on the line from this one to another of the same batch.

        Bytes and FLOPs are proportional to rows but for a constant; of temporary bytes, the most of several such
        lines, the line between two points is the upper bound.
        """
        share = (rows - self.rows) / (other.rows - self.rows)
        between = {
            name: getattr(self, name).towards(getattr(other, name), share) for name in ("micro", "first", "whole")
        }
        return dataclasses.replace(self, rows=rows, **between)
