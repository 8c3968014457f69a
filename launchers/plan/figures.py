"""The results of a trace as plain numbers: parameters, FLOPs, and bytes saved for the backward, held and moved."""

import dataclasses
from collections.abc import Callable

FP32 = 4


@dataclasses.dataclass(frozen=True)
class Weight:
    """One parameter. low: of a plain linear or convolution, which DeepSpeed communicates in autocast's dtype; trains:
    False if it is frozen throughout the run.
    """

    numel: int
    low: bool = False
    trains: bool = True


@dataclasses.dataclass(frozen=True)
class Figures:
    """Costs of one forward and, if there is one, its backward.

    FLOPs, of matmuls, attention and convolutions. forward, backward: of the model; repeated: recomputed in the
    backward; outside: of the task around the model.

    Bytes. layers, loss: saved for the backward by the model and by the task around it; copies, copies_low: saved casts
    of weights to autocast's dtype, low if DeepSpeed communicates the weight in it; cast, cast_low: the peaks of these,
    as autocast holds the casts of a recomputed block until the end of the forward; temporary: the peak beside all
    these; batch: the inputs. moved, moved_back: read and written by the operations of the forward and of the backward.
    gathered, returned: gathered from all ranks in the forward, and summed over them in the backward.

    tokens: number of tokens in the largest embedding look-up.
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
        """All FLOPs, recomputation included."""
        return self.forward + self.backward + self.repeated + self.outside

    @property
    def kept(self) -> float:
        """Bytes saved for the backward, without the batch."""
        return self.layers + self.loss + self.copies + self.copies_low

    @property
    def most(self) -> float:
        """Peak bytes, without the batch and the gradients of parameters."""
        return self.layers + self.loss + self.cast + self.cast_low + self.temporary

    def then(self, other: "Figures") -> "Figures":
        """Return the costs of both in sequence: work adds up, memory is that of the larger one."""
        larger = max(self, other, key=lambda one: one.most)
        summed = {name: getattr(self, name) + getattr(other, name) for name in WORK}
        return dataclasses.replace(larger, **summed)

    def towards(self, other: "Figures", share: float) -> "Figures":
        """Interpolate linearly between these figures (share 0) and the others (share 1)."""
        return self._with(other, lambda mine, theirs: mine + share * (theirs - mine))

    def _with(self, other: "Figures", both: Callable[[float, float], float]) -> "Figures":
        names = [field.name for field in dataclasses.fields(self)]
        return Figures(**{name: both(getattr(self, name), getattr(other, name)) for name in names})


WORK = ("forward", "backward", "repeated", "outside", "moved", "moved_back", "gathered", "returned")
"""The fields that add up over forwards and backwards in sequence."""


@dataclasses.dataclass(frozen=True)
class Traced:
    """Costs of a step of one rank.

    micro: forward and backward of each micro-batch. If the gradient of a micro-batch depends on the whole batch
    (gradient caching), first: the earlier forward of each micro-batch; whole: the work then done once for all of them;
    cached: bytes cached of them. rows: samples per micro-batch. low: bytes per element under autocast, 4 without it.
    later: roles that have no turn in this step, but later in the run.
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

    @property
    def trained(self) -> int:
        """Parameters that are not frozen in the end."""
        return sum(weight.numel for weight in self.weights if weight.trains)

    def at(self, rows: int, other: "Traced") -> "Traced":
        """Interpolate a step in micro-batches of `rows` between this one and another of the same batch.

        Bytes and FLOPs are affine in rows. Temporary bytes are the maximum of several such functions, for which
        interpolation between two points is an upper bound.
        """
        share = (rows - self.rows) / (other.rows - self.rows)
        between = {
            name: getattr(self, name).towards(getattr(other, name), share) for name in ("micro", "first", "whole")
        }
        return dataclasses.replace(self, rows=rows, **between)
