"""Preflight checks that run on each rank: program, data, storage, disk, device and the links to its peers.

A probe returns plain values and raises a TesseraError when something is certainly broken. Values that are only
suspicious in comparison with other ranks (a clock, a speed, a version) are judged by the caller that sees all ranks.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import itertools
import os
import platform
import shutil
import subprocess
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from data_pipeline.errors import DataError, NodeFault
from data_pipeline.settings import digest
from data_pipeline.shards.manifest import open_dataset
from data_pipeline.storage import open_storage
from pretrain.config import RunConfig
from pretrain.models import MODELS
from pretrain.runtime.mesh import Mesh

PACKAGES = ("torch", "deepspeed", "numpy", "safetensors")
NOT_VISIBLE = "not visible"
SMI_S = 10
SMI_FIELDS = (
    "driver_version", "ecc.errors.uncorrected.volatile.total", "clocks_throttle_reasons.active", "temperature.gpu",
)  # fmt: skip
HARMFUL_THROTTLES = {0x08: "hardware slowdown", 0x20: "software thermal", 0x40: "hardware thermal", 0x80: "power brake"}
PROBE_BYTES = 1 << 20
SHARDS_LOOKED_AT = 8
REPEATS = 3
"""Repetitions of a speed measurement, of which the fastest counts."""
BYTES_A_WEIGHT = 12
"""Checkpoint bytes per parameter: float32 master and two moments."""

Values = dict[str, Any]


# --------------------------------------------------------------------------------------- this rank alone


def program(config: RunConfig | None, mesh: Mesh) -> Values:
    """Return what must be equal on all ranks: versions, code, configuration."""
    values: Values = {name: importlib.metadata.version(name) for name in PACKAGES}
    values |= {"python": platform.python_version(), "code": _code()[:12], "device": "cpu"}
    if mesh.device.type == "cuda":
        values["device"] = torch.cuda.get_device_name(mesh.device)
        values["cuda"], values["nccl"] = torch.version.cuda, ".".join(map(str, torch.cuda.nccl.version()))
    return values | ({"configuration": digest(config)} if config else {})


def _code() -> str:
    """Return one sha256 over the program's own files."""
    root, total = Path(__file__).parents[2], hashlib.sha256()
    for package in ("data_pipeline", "pretrain", "launchers"):
        for path in sorted((root / package).rglob("*.py")):
            total.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return total.hexdigest()


def data(config: RunConfig, mesh: Mesh, opened: Callable[[RunConfig], object]) -> Values:
    """Return fingerprints of datasets and text tokenizer; check size and first bytes of some shards.

    opened: opens the data as the run will.
    """
    values: Values = {}
    for address in _datasets(config):
        storage, manifest = open_dataset(address)
        values[address] = manifest.fingerprint[:12]
        for number in range(min(SHARDS_LOOKED_AT, len(manifest.shards))):
            shard = manifest.shards[(mesh.rank * SHARDS_LOOKED_AT + number) % len(manifest.shards)]
            size, _ = storage.stat(shard.name)
            if size != shard.bytes:
                raise DataError(f"{address}/{shard.name}: {size} bytes, the manifest has {shard.bytes}; copy it again")
            storage.get_range(shard.name, 0, min(size, PROBE_BYTES))
    for path in filter(None, [config.data.text_tokenizer]):
        file = Path(path)
        content = open_storage(path.rpartition("/")[0] or ".").get(file.name)
        values[path] = hashlib.sha256(content).hexdigest()[:12]
    opened(config)  # as the run will: text and image tokenizer exist and fit the model
    return values


def _datasets(config: RunConfig) -> list[str]:
    named = [config.data.dataset, *(source.path for source in config.data.datasets)]
    named += config.data.evaluations.values()
    return list(dict.fromkeys(path for path in named if path))


def storage(config: RunConfig, mesh: Mesh) -> Values:
    """Check create, read, exclusive create and remove in the run folder and the checkpoint root -> seconds by root."""
    return {root: _try_storage(root, mesh.rank) for root in _places(config)}


def absent_places(config: RunConfig) -> list[Path]:
    """Return the folders that storage probes will create, innermost first; call before any rank creates one."""
    local = [Path(root) for root in _places(config) if "://" not in root]
    missing = {path for folder in local for path in (folder, *folder.parents) if not path.exists()}
    return sorted(missing, key=lambda path: len(path.parts), reverse=True)


def remove_places(absent: list[Path]) -> None:
    """Remove these folders if empty, once all ranks are done: the run has not begun."""
    for folder in absent:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _places(config: RunConfig) -> list[str]:
    root = config.checkpoint_root
    return [config.run] if root.startswith(f"{config.run}/") else [config.run, root]


def _try_storage(root: str, rank: int) -> float:
    """Try all operations -> seconds. Raises DataError naming one that fails; leaves nothing but `root` behind."""
    place, began = open_storage(f"{root}/.preflight-{rank:05d}-{uuid.uuid4().hex}"), time.monotonic()
    try:
        content = os.urandom(PROBE_BYTES)
        if not place.put_if_absent("probe", content):
            raise DataError(f"{place.root}/probe: a new name was refused; check the storage")
        if place.get("probe") != content:
            raise DataError(f"{place.root}/probe: read back other bytes than were written; check the storage")
        if place.put_if_absent("probe", content[::-1]) or place.get("probe") != content:
            raise DataError(
                f"{root}: exclusive creation overwrites; two attempts could commit one checkpoint: use "
                "a file system with hard links, or a server with If-None-Match"
            )
        place.remove("probe")
        if place.exists("probe"):
            raise DataError(f"{place.root}/probe: still exists after its removal; grant this user delete access")
    finally:
        with contextlib.suppress(OSError, DataError):  # what cannot be removed could not be written
            place.remove_all()
    return time.monotonic() - began


def disk(config: RunConfig, mesh: Mesh) -> Values:
    """Compare free disk space with the size of all kept checkpoints plus the one being written.

    Raises DataError when it is not enough.
    """
    del mesh
    with torch.device("meta"):
        model = MODELS[config.model.kind](config.model)
    size = BYTES_A_WEIGHT * sum(parameter.numel() for parameter in model.parameters())
    needed = size * (config.train.keep_checkpoints + 1)
    root = config.checkpoint_root
    if "://" in root:
        return {"needed": needed, "free": None}
    there = next(path for path in (Path(root).absolute(), *Path(root).absolute().parents) if path.exists())
    total, _, free = shutil.disk_usage(there)
    if not total:
        raise DataError(
            f"{root}: {there} is a kernel file system and keeps no files; set run or train.checkpoints to another path"
        )
    if free < needed:
        raise DataError(
            f"{root}: {free / 1e9:.3g} GB free, {config.train.keep_checkpoints + 1} checkpoints need "
            f"{needed / 1e9:.3g} GB; free space, or set train.keep_checkpoints or train.checkpoints"
        )
    return {"needed": needed, "free": free}


def health(mesh: Mesh) -> Values:
    """Return the driver's report on this rank's GPU. Raises NodeFault for memory errors and harmful throttling."""
    if mesh.device.type != "cuda":
        return {"gpu": NOT_VISIBLE}
    identity = f"GPU-{torch.cuda.get_device_properties(mesh.device).uuid}"
    command = ["nvidia-smi", f"--id={identity}", f"--query-gpu={','.join(SMI_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=SMI_S, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {"gpu": NOT_VISIBLE}
    return read_health(answer)


def read_health(line: str) -> Values:
    """Parse one line of nvidia-smi with the values of SMI_FIELDS. Raises NodeFault as `health` does."""
    driver, errors, throttles, temperature = (field.strip() for field in line.strip().split(","))
    if errors.isdigit() and int(errors):
        raise NodeFault(f"{errors} uncorrected memory errors since the driver was loaded; remove the GPU from service")
    active = int(throttles, 16) if throttles.startswith("0x") else 0
    held = [why for bit, why in HARMFUL_THROTTLES.items() if active & bit]
    if held:
        raise NodeFault(
            f"the GPU's clock is throttled at {temperature} degrees C: {', '.join(held)}; check its cooling"
        )
    return {"driver": driver, "ecc": errors if errors.isdigit() else NOT_VISIBLE, "temperature": temperature}


# ------------------------------------------------------------------------------------------------ speeds


def matmul(mesh: Mesh) -> Values:
    """Time a matrix product -> seconds, TFLOP/s."""
    size, times, dtype = (8192, 10, torch.bfloat16) if mesh.device.type == "cuda" else (384, 20, torch.float32)
    a = torch.ones(size, size, device=mesh.device, dtype=dtype)

    def work() -> None:
        for _ in range(times):
            torch.mm(a, a)
        mesh.settle()

    seconds = best(work)
    return {"seconds": seconds, "tflops": 2 * size**3 * times / seconds / 1e12}


def collective(mesh: Mesh, name: str) -> Values:
    """Time one of `Mesh.exercises` -> seconds, GB/s through this rank."""
    call, moved = mesh.exercises(_elements(mesh))[name]

    def work() -> None:
        call()
        mesh.settle()

    seconds = best(work)
    return {"seconds": seconds, "gb_s": moved / seconds / 1e9}


def link(mesh: Mesh, peers: list[int | None]) -> Values:
    """Time an exchange with each peer by round (None: this rank is idle) -> seconds of the fastest, GB/s each way."""
    if not any(peer is not None for peer in peers):
        return {}
    elements = _elements(mesh)
    seconds = min(best(functools.partial(mesh.swap, peer, elements)) for peer in peers if peer is not None)
    return {"seconds": seconds, "gb_s": 4 * elements / seconds / 1e9}


def peers_of(rank: int, ranks_by_host: dict[str, list[int]]) -> list[int | None]:
    """Return a rank's peer in each round: the same local rank on the adjacent nodes, else the adjacent ranks.

    Peers form a ring, and each adjacent pair has its round. A node with a slow link is slow in all its rounds, its
    neighbours in only one: the fastest round tells them apart.
    """
    groups = list(ranks_by_host.values())
    if len(groups) == 1 or len({len(group) for group in groups}) != 1:
        ring = list(itertools.chain.from_iterable(groups))
    else:
        ring = next(list(places) for places in zip(*groups, strict=True) if rank in places)
    count = len(ring)
    edges = [(ring[at], ring[(at + 1) % count]) for at in range(count if count > 2 else count - 1)]
    paired = len(edges) - len(edges) % 2
    turns = [edges[0:paired:2], edges[1:paired:2], edges[paired:]]
    return [next((a + b - rank for a, b in turn if rank in (a, b)), None) for turn in turns]


def best(work: Callable[[], None]) -> float:
    """Return the seconds of the fastest of REPEATS calls, after one warm-up call."""
    work()
    seconds = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def _elements(mesh: Mesh) -> int:
    return 1 << (26 if mesh.device.type == "cuda" else 19)
