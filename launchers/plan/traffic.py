"""What a step sends: the collectives of each ZeRO stage as our engine and DeepSpeed run them.

Wire bytes are those of rings: with W ranks a gather or a scatter of n bytes passes (W - 1) / W of them through every
rank, a reduction to all twice that. gloo scatters by reducing to all, NCCL does not.
"""

import dataclasses
from typing import Any

from launchers.plan.figures import FP32, Traced, Weight

PASSES = {"all_gather": 1, "reduce_scatter": 1, "all_reduce": 2, "reduce_scatter by gloo": 2}
REUSE_DISTANCE = 1_000_000_000  # DeepSpeed's own, in elements: what is used again sooner stays gathered


@dataclasses.dataclass(frozen=True)
class Transfer:
    """A collective over all ranks: `bytes` of the whole tensor, `times` a step."""

    what: str
    kind: str
    bytes: float
    times: int

    def sent(self, world: int) -> float:
        """Bytes that each rank sends in a step."""
        return PASSES[self.kind] * self.bytes * self.times * (world - 1) / world


def transfers_of(traced: Traced, settings: dict[str, Any], accumulation: int) -> list[Transfer]:
    """All of a step, but for a few hundred bytes of metrics and agreements."""
    weights, low = traced.weights, traced.low
    zero = settings["zero_optimization"]
    stage, size = zero["stage"], traced.parameters
    reduced = sum(weight.numel * (low if weight.low else FP32) for weight in weights)
    if stage == 0:
        found = [Transfer("gradients", "all_reduce", size * FP32, 1)]
    elif stage < 3:
        found = [Transfer("gradients", "all_reduce", reduced, accumulation if stage == 2 else 1)]
        found.append(Transfer("weights", "all_gather", size * FP32, 1))
    else:
        kind = "reduce_scatter" if traced.on_gpu else "reduce_scatter by gloo"
        found = [Transfer("gradients", kind, reduced, accumulation)]
        found += _gathers(weights, zero, low, accumulation)
    return found + _features(traced, accumulation)


def _gathers(weights: tuple[Weight, ...], zero: dict[str, Any], low: int, accumulation: int) -> list[Transfer]:
    """Stage 3: small weights once a step, others in every forward, and in every backward where they did not stay.

    A block that is computed again has its backward right behind, before its weights are let go: nothing is added.
    """
    threshold = zero["stage3_param_persistence_threshold"]
    kept = sum(w.numel * (low if w.low else FP32) for w in weights if w.numel <= threshold)
    rest = [w for w in weights if w.numel > threshold]
    found = [Transfer("kept weights", "all_gather", kept, 1)]
    if rest:
        size = sum(weight.numel * (low if weight.low else FP32) for weight in rest)
        again = released_share(weights, zero)
        found.append(Transfer("weights, forward", "all_gather", size, accumulation))
        found.append(Transfer("weights, backward", "all_gather", size * again, accumulation))
    return found


def released_share(weights: tuple[Weight, ...], zero: dict[str, Any]) -> float:
    """Of the weights, how many are let go after the forward: those used again only after `reuse distance` elements.

    From the forward of a layer to its backward lie, twice, all the layers behind it. What the prefetch has looked at
    already stays too.
    """
    size = sum(weight.numel for weight in weights)
    stays = max(zero.get("stage3_max_reuse_distance", REUSE_DISTANCE) / 2, zero["stage3_prefetch_bucket_size"])
    return max(0.0, (size - stays) / size)


def _features(traced: Traced, accumulation: int) -> list[Transfer]:
    """What a loss of the global batch gathers from all ranks, and its gradients back."""
    found = []
    for figures, times in ((traced.micro, accumulation), (traced.whole, 1)):
        if figures.gathered:
            found.append(Transfer("features", "all_gather", figures.gathered, times))
            found.append(Transfer("their gradients", "all_reduce", figures.returned, times))
    return found
