"""Traffic of a step: the collectives of each ZeRO stage as our engine and DeepSpeed run them.

Bytes are those of ring algorithms: with W ranks, each rank sends n (W - 1) / W bytes in an all-gather or reduce-scatter
of n bytes, twice that in an all-reduce. gloo's reduce-scatter is an all-reduce, NCCL's is not.
"""

import dataclasses
from typing import Any

from launchers.plan.figures import FP32, Traced, Weight

PASSES = {"all_gather": 1, "reduce_scatter": 1, "all_reduce": 2, "reduce_scatter by gloo": 2}
REUSE_DISTANCE = 1_000_000_000  # DeepSpeed's default, in elements: weights reused sooner stay gathered


@dataclasses.dataclass(frozen=True)
class Transfer:
    """A collective over all ranks: `bytes` of the whole tensor, `times` per step."""

    what: str
    kind: str
    bytes: float
    times: int

    def sent(self, world: int) -> float:
        """Return the bytes that each rank sends in a step."""
        return PASSES[self.kind] * self.bytes * self.times * (world - 1) / world


def transfers_of(traced: Traced, settings: dict[str, Any], accumulation: int) -> list[Transfer]:
    """Return the transfers of a step, except for a few hundred bytes of metrics and agreements between ranks."""
    weights, low = traced.weights, traced.low
    zero = settings["zero_optimization"]
    stage, size = zero["stage"], traced.trained
    reduced = sum(weight.numel * (low if weight.low else FP32) for weight in weights if weight.trains)
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
    """Return stage 3's gathers: small weights once per step, others in every forward and, if released, every backward.

    Small weights that are frozen stay as they are. A recomputed block runs its backward right after, before its weights
    are released, and adds nothing.
    """
    threshold = zero["stage3_param_persistence_threshold"]
    kept = sum(w.numel * (low if w.low else FP32) for w in weights if w.numel <= threshold and w.trains)
    rest = [w for w in weights if w.numel > threshold]
    found = [Transfer("kept weights", "all_gather", kept, 1)]
    if rest:
        size = sum(weight.numel * (low if weight.low else FP32) for weight in rest)
        again = released_share(weights, zero)
        found.append(Transfer("weights, forward", "all_gather", size, accumulation))
        found.append(Transfer("weights, backward", "all_gather", size * again, accumulation))
    return found


def released_share(weights: tuple[Weight, ...], zero: dict[str, Any]) -> float:
    """Return the share of the weights released after the forward: those reused after more than the reuse distance.

    Between a layer's forward and its backward, all later layers are used twice. Weights that the prefetch has already
    requested stay too.
    """
    size = sum(weight.numel for weight in weights)
    stays = max(zero.get("stage3_max_reuse_distance", REUSE_DISTANCE) / 2, zero["stage3_prefetch_bucket_size"])
    return max(0.0, (size - stays) / size)


def _features(traced: Traced, accumulation: int) -> list[Transfer]:
    """Return what a loss over the global batch gathers from all ranks, and the reduction of its gradients."""
    found = []
    for figures, times in ((traced.micro, accumulation), (traced.whole, 1)):
        if figures.gathered:
            found.append(Transfer("features", "all_gather", figures.gathered, times))
            found.append(Transfer("their gradients", "all_reduce", figures.returned, times))
    return found
