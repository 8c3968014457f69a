"""Peak memory of one device in a step, item by item, each with the error that its check allows."""

import dataclasses
from typing import Any

from launchers.plan.clusters import GIB
from launchers.plan.figures import FP32, Figures, Traced
from launchers.plan.traffic import released_share

STATE, WORKING, ACTIVATION, FIXED = "states", "working set", "activations", "fixed"
ERRORS = {STATE: 0.02, WORKING: 0.3, ACTIVATION: 0.1, FIXED: 0.35}
"""Relative error by kind of item. tests/benchmarks/bench_planner.py measures the first three, on a CPU."""
FLAT_REDUCTION = 500_000_000  # elements that stage 0 flattens at once
CONTEXT = 1.5 * GIB  # CUDA's context, its libraries and NCCL's buffers; a guess from reports, not measured here
SLACK = 0.05  # share of the activations that the allocator cannot reuse


@dataclasses.dataclass(frozen=True)
class Item:
    """`bytes` used by `what`; kind: a key of ERRORS."""

    what: str
    kind: str
    bytes: float


@dataclasses.dataclass(frozen=True)
class Memory:
    """The items of one device."""

    items: tuple[Item, ...]

    @property
    def used(self) -> float:
        return sum(item.bytes for item in self.items)

    @property
    def error(self) -> float:
        """Bytes by which `used` may be off if all items err in the same direction."""
        return sum(item.bytes * ERRORS[item.kind] for item in self.items)


def memory_of(traced: Traced, settings: dict[str, Any], world: int, accumulation: int, ema: bool = False) -> Memory:
    """Return the memory of a step.

    Its peak is near the end of a forward, or at the update, when activations are freed and gradients are flattened.
    """
    size, zero = traced.trained, settings["zero_optimization"]
    held = [*states(size, world, zero["stage"], accumulation, traced.parameters - size), *working_set(traced, zero)]
    if ema:
        held.append(Item("average of the weights", STATE, FP32 * size / (world if zero["stage"] else 1)))
    flat = flattened(size, world, zero["stage"])
    held += max(activations(traced, zero), flat, key=lambda items: sum(item.bytes for item in items))
    if traced.on_gpu:
        loose = sum(item.bytes for item in held if item.kind == ACTIVATION) * SLACK
        held += [Item("allocator", ACTIVATION, loose), Item("CUDA and NCCL", FIXED, CONTEXT)]
    return Memory(tuple(item for item in held if item.bytes))


def states(size: int, world: int, stage: int, accumulation: int, frozen: int = 0) -> list[Item]:
    """Return weights, gradients and optimizer states of `size` parameters that train, and weights of `frozen` others.

    Weights are float32 at every precision: autocast casts copies. Stages 1 to 3 keep master weights beside the working
    weights, a duplicate as both are float32. Stage 1 reduces gradients once per step, so accumulated gradients are not
    sharded.
    """
    part = size / world
    whole_gradients = stage == 0 or (stage == 1 and accumulation > 1)
    sizes = {
        "weights": FP32 * ((size + frozen) / world if stage == 3 else size + frozen),
        "master weights": FP32 * part if stage else 0.0,
        "Adam's moments": 2 * FP32 * (part if stage else size),
        "gradients": FP32 * (size if whole_gradients else part),
    }
    return [Item(what, STATE, float(number)) for what, number in sizes.items()]


def flattened(size: int, world: int, stage: int) -> list[Item]:
    """Return a flat copy of the gradients: for the reduction of stage 0, for the update of stages 1 and 2."""
    number = {0: min(size, FLAT_REDUCTION) if world > 1 else 0, 1: size / world, 2: size / world, 3: 0}[stage]
    return [Item("flat gradients", WORKING, float(FP32 * number))]


def working_set(traced: Traced, zero: dict[str, Any]) -> list[Item]:
    """Return the buckets and, under stage 3, the gathered weights."""
    if zero["stage"] == 0:
        return []
    precisions = len({weight.low for weight in traced.weights}) if traced.low != FP32 else 1
    buffers = zero["reduce_bucket_size"] * FP32 * precisions
    if zero["stage"] < 3:
        return [Item("buckets", WORKING, float(buffers * (2 if zero["overlap_comm"] else 1)))]
    return [Item("buckets", WORKING, float(buffers)), Item("gathered weights", WORKING, gathered(traced, zero))]


def gathered(traced: Traced, zero: dict[str, Any]) -> float:
    """Return the bytes of stage 3's gathered weights: persistent ones, and the greater of retained and prefetched."""
    sizes = [(weight.numel, traced.low if weight.low else FP32) for weight in traced.weights]
    threshold = zero["stage3_param_persistence_threshold"]
    kept = sum(numel * width for numel, width in sizes if numel <= threshold)
    rest = sum(numel * width for numel, width in sizes if numel > threshold)
    stays = 1 - released_share(traced.weights, zero)
    ahead = min(rest, zero["stage3_prefetch_bucket_size"] * traced.low + max(n * w for n, w in sizes))
    return kept + max(rest * stays, ahead)


def activations(traced: Traced, zero: dict[str, Any]) -> list[Item]:
    """Return what is saved for the backward, and the peak of what is held beside it.

    With gradient caching, the loss of the whole batch is computed before a micro-batch has activations: the greater of
    the two counts, and the cached features of all micro-batches are held beside either.
    """
    moments = [_items(figures, zero) for figures in (traced.micro, traced.whole)]
    greater = max(moments, key=lambda items: sum(item.bytes for item in items))
    return [*greater, Item("cached features", ACTIVATION, traced.cached)]


def _items(figures: Figures, zero: dict[str, Any]) -> list[Item]:
    # stage 3 already gathers linear layers in autocast's dtype
    copies = figures.cast + (0 if zero["stage"] == 3 else figures.cast_low)
    spares = zero["stage"] == 3 and zero.get("memory_efficient_linear", False)
    named = {"layers": figures.layers, "loss": figures.loss, "batch": figures.batch}
    named |= {"copies of weights": 0 if spares else copies, "temporary": figures.temporary}
    return [Item(name, ACTIVATION, float(size)) for name, size in named.items()]
