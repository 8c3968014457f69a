"""The devices and networks that a run is planned for. Figures are the vendors', dense (no sparsity)."""

import dataclasses
import difflib
import os
import time

from data_pipeline.errors import ConfigError

GIB = 2**30
TERA, GIGA = 1e12, 1e9


@dataclasses.dataclass(frozen=True)
class Device:
    """One device: peaks in FLOP/s by precision, memory in bytes after the driver's share, rates in bytes/s.

    link: one-way rate to the devices of its node; network: its share of the node's one-way network rate.
    """

    name: str
    peaks: dict[str, float]
    memory: float
    memory_rate: float
    link: float
    network: float

    @property
    def on_gpu(self) -> bool:
        return self.name != "cpu"


# fp32 is the peak without tensor cores: torch leaves TF32 off.
GPUS = {
    "a100-40": Device("a100-40", {"bf16": 312e12, "fp32": 19.5e12}, 39.4 * GIB, 1.555e12, 300e9, 25e9),
    "a100-80": Device("a100-80", {"bf16": 312e12, "fp32": 19.5e12}, 79.1 * GIB, 2.039e12, 300e9, 25e9),
    "h100": Device("h100", {"bf16": 989e12, "fp32": 67e12}, 78.5 * GIB, 3.35e12, 450e9, 50e9),
    "h200": Device("h200", {"bf16": 989e12, "fp32": 67e12}, 139 * GIB, 4.8e12, 450e9, 50e9),
    "b200": Device("b200", {"bf16": 2250e12, "fp32": 75e12}, 177 * GIB, 7.7e12, 900e9, 50e9),
}
CPU = "cpu"


@dataclasses.dataclass(frozen=True)
class Cluster:
    """nodes x per_node devices; network: one-way bytes/s out of a node."""

    device: Device
    nodes: int
    per_node: int
    network: float

    @property
    def world(self) -> int:
        return self.nodes * self.per_node

    @property
    def memory(self) -> float:
        """Bytes that a process may use; on CPUs, the processes of a node share its memory."""
        return self.device.memory if self.device.on_gpu else self.device.memory / self.per_node


def cluster_of(gpu: str, nodes: int, per_node: int, network_gbits: float | None = None) -> Cluster:
    """Return a cluster of the named GPU or of this CPU. Raise ConfigError for an unknown name, with the nearest one."""
    name = gpu.lower().replace("_", "-")
    device = this_cpu(per_node) if name == CPU else GPUS.get(name)
    if device is None:
        known = [*GPUS, CPU]
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        raise ConfigError(
            f"--gpu {gpu} is unknown" + (f"; did you mean {near[0]!r}?" if near else ";") + f" use {', '.join(known)}"
        )
    network = device.network * (per_node if device.on_gpu else 1)
    return Cluster(device, nodes, per_node, network if network_gbits is None else network_gbits * GIGA / 8)


def this_cpu(processes: int) -> Device:
    """Return one process's share of this machine: the rates of numpy's matmul and copy on all cores, measured here."""
    flops, rate = _timed_product(), _timed_copy()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    peaks = {"fp32": flops / processes, "bf16": flops / processes}
    return Device(CPU, peaks, float(memory), rate / processes, LOOPBACK / processes, LOOPBACK)


LOOPBACK = 2e9
"""Bytes/s of gloo over the loopback of one machine; --network-gbits sets another network."""


def _timed_product(side: int = 1024, tries: int = 5) -> float:
    """Return the FLOP/s of a float32 matmul, the best of a few tries."""
    import numpy as np

    a = np.ones((side, side), np.float32)
    return max(2 * side**3 / _seconds(lambda: a @ a) for _ in range(tries))


def _timed_copy(size: int = 2**25, tries: int = 3) -> float:
    """Return the bytes/s read and written by a copy, the best of a few tries."""
    import numpy as np

    source, target = np.ones(size, np.uint8), np.empty(size, np.uint8)
    return max(2 * size / _seconds(lambda: np.copyto(target, source)) for _ in range(tries))


def _seconds(work: object) -> float:
    began = time.perf_counter()
    assert callable(work)
    work()
    return time.perf_counter() - began
