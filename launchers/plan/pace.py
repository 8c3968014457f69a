"""Predict the time of a step: matmuls at a share of peak, the rest at a share of the memory rate, then the network.

    step = products / (peak x share) + moved / (rate x share) + update + exposed transfers

The result is three times, for low, usual and high shares; the true one should lie between the outer two.
"""

import dataclasses

from launchers.plan.clusters import Cluster
from launchers.plan.figures import FP32, Traced
from launchers.plan.traffic import Transfer


@dataclasses.dataclass(frozen=True)
class Shares:
    """Shares of the vendors' figures that products (matmuls), memory and links reach.

    hidden: share of the backward's time in which transfers overlap with it.
    """

    products: float
    memory: float
    links: float
    hidden: float


SHARES = {
    "gpu": (Shares(0.3, 0.5, 0.5, 0.3), Shares(0.6, 0.6, 0.7, 0.7), Shares(0.8, 0.85, 0.85, 0.95)),
    "cpu": (Shares(0.4, 0.3, 0.3, 0.0), Shares(0.7, 0.6, 0.6, 0.0), Shares(0.95, 1.2, 1.0, 0.0)),
}
"""Low, usual, high. Published runs on GPUs lie between (tests/launchers/plan/test_published.py). CPU shares are set by
the recipes of configs/demo and configs/small (bench_planner.py), whose tensors fit in cache, faster than memory copies.
"""
UPDATE_BYTES = 7 * FP32
"""Bytes per parameter: AdamW reads weight, gradient and two moments, and writes all but the gradient."""


@dataclasses.dataclass(frozen=True)
class Pace:
    """Seconds of one step, by part. exposed: the part of `network` that does not overlap with computation."""

    products: float
    moved: float
    update: float
    network: float
    exposed: float

    @property
    def step(self) -> float:
        return self.products + self.moved + self.update + self.exposed

    @property
    def bound_by(self) -> str:
        parts = {"products": self.products, "memory": self.moved + self.update, "network": self.exposed}
        return max(parts, key=lambda name: parts[name])


@dataclasses.dataclass(frozen=True)
class Work:
    """The work of a rank in a step: FLOPs, bytes moved outside the products, parameters updated."""

    flops: float
    moved: float
    updated: float

    @classmethod
    def of(cls, traced: Traced, accumulation: int, updated: float) -> "Work":
        """Sum the work over all micro-batches of a step."""
        parts = ((traced.micro, accumulation), (traced.first, accumulation), (traced.whole, 1))
        flops = sum(times * figures.flops for figures, times in parts)
        moved = sum(times * (figures.moved + figures.moved_back) for figures, times in parts)
        return cls(flops, moved, updated)


def paces(work: Work, transfers: list[Transfer], cluster: Cluster, precision: str) -> tuple[Pace, Pace, Pace]:
    """Return the paces at low, usual and high shares."""
    found = []
    for share in SHARES["gpu" if cluster.device.on_gpu else "cpu"]:
        products = work.flops / (cluster.device.peaks[precision] * share.products)
        elements = work.moved / (cluster.device.memory_rate * share.memory)
        update = UPDATE_BYTES * work.updated / (cluster.device.memory_rate * share.memory)
        network = network_seconds(transfers, cluster) / share.links
        exposed = max(0.0, network - share.hidden * (products + elements) * 2 / 3)
        found.append(Pace(products, elements, update, network, exposed))
    low, usual, high = found
    return low, usual, high


def network_seconds(transfers: list[Transfer], cluster: Cluster) -> float:
    """Return the seconds at full rate: over links within a node, over one ring per device of a node between nodes."""
    sent = sum(transfer.sent(cluster.world) for transfer in transfers)
    if cluster.nodes == 1:
        return sent / cluster.device.link
    return max(sent / cluster.device.link, sent / cluster.network)


def sent_by_node(transfers: list[Transfer], cluster: Cluster) -> float:
    """Return the bytes that leave each node in a step: the traffic of one ring over all ranks."""
    return sum(transfer.sent(cluster.world) for transfer in transfers) if cluster.nodes > 1 else 0.0
