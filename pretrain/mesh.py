"""Who am I among the processes of a run. The only reader of RANK, WORLD_SIZE and their Slurm twins.

A single process is a mesh of one: it joins a process group of its own, so that every later line is the same.
"""

import dataclasses
import datetime
import os
import socket
from collections.abc import Mapping

import torch
import torch.distributed as dist

from data_pipeline.errors import ConfigError, NodeFault

KeyValues = dist.Store


JOIN_TIMEOUT_S = 300
"""Peers may start this much later than oneself: nodes differ in how long they take to read a program."""
PEER_LOST = ("Connection closed by peer", "Connection reset by peer", "gloo/transport", "Broken pipe", "NCCL")
"""gloo raises plain RuntimeErrors; these are its words, and NCCL's."""


@dataclasses.dataclass(frozen=True)
class Place:
    """This process among its peers, as the launcher put it into the environment."""

    rank: int
    local_rank: int
    world: int
    host: str
    port: int
    attempt: str
    agent_store: bool = False


def place_from(environment: Mapping[str, str]) -> Place:
    """Read torchrun's variables, or srun's, or none (alone). Raises ConfigError when they are incomplete."""
    if "RANK" in environment:
        rank, local, world = (environment.get(name, "0") for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    elif "SLURM_PROCID" in environment and "SLURM_STEP_ID" in environment:
        rank, local, world = (environment[name] for name in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS"))
    else:
        return Place(0, 0, 1, "127.0.0.1", _free_port(), "0")
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in environment]
    if missing:
        raise ConfigError(
            f"rank {rank} of {world} has no {' and no '.join(missing)}; start with torchrun or tessera launch"
        )
    attempts = [
        environment.get(name, "0") for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT", "TESSERA_ATTEMPT")
    ]
    return Place(
        int(rank), int(local), int(world), environment["MASTER_ADDR"], int(environment["MASTER_PORT"]),
        ".".join(attempts), environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Mesh:
    """The joined process group, its key-value store and this process's device."""

    place: Place
    device: torch.device
    store: dist.Store

    @property
    def rank(self) -> int:
        return self.place.rank

    @property
    def world(self) -> int:
        return self.place.world

    @classmethod
    def start(cls, timeout_s: int) -> "Mesh":
        """Join the process group (nccl where CUDA is, gloo elsewhere). Raises NodeFault when the peers do not come."""
        place = place_from(os.environ)
        on_cuda = torch.cuda.is_available()
        device = torch.device("cuda", place.local_rank) if on_cuda else torch.device("cpu")
        if on_cuda:
            torch.cuda.set_device(device)
        # DeepSpeed reads these itself; a process started by srun or alone has none of them.
        os.environ.update(RANK=str(place.rank), LOCAL_RANK=str(place.local_rank), WORLD_SIZE=str(place.world))
        os.environ.update(MASTER_ADDR=place.host, MASTER_PORT=str(place.port))
        os.environ.setdefault("DS_ACCELERATOR", "cuda" if on_cuda else "cpu")
        store = _attempt_store(place)
        # The watchdog ends a hang after timeout_s and names who hangs; the group's own deadline is the second line.
        deadline = datetime.timedelta(seconds=2 * timeout_s)
        try:
            store.set(f"here/{place.rank}", "")
            store.wait([f"here/{rank}" for rank in range(place.world)], datetime.timedelta(seconds=JOIN_TIMEOUT_S))
            dist.init_process_group(
                "nccl" if on_cuda else "gloo", store=store, rank=place.rank, world_size=place.world, timeout=deadline
            )
        except (RuntimeError, dist.DistError) as error:
            raise NodeFault(
                f"rank {place.rank} of {place.world} could not join {place.host}:{place.port}: {error}"
            ) from None
        return cls(place, device, dist.PrefixStore("tessera", store))

    def side_store(self) -> "KeyValues":
        """The same store over a connection of its own: a thread that waits on it does not hold up the others."""
        return self.store.clone()  # type: ignore[attr-defined]  # missing in torch's stubs

    def stop(self) -> None:
        """Leave the process group."""
        if dist.is_initialized():
            dist.destroy_process_group()

    # ------------------------------------------------------------------------------- collectives

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """x [b, ...] of every rank -> [world * b, ...] in rank order, differentiable.

        Its backward sums the gradients of all ranks, so that after the engine has averaged the parameters'
        gradients over ranks they are those of the mean over ranks of the loss.
        """
        return _Gather.apply(x) if self.world > 1 else x

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """Sum of `x` over ranks, without gradient."""
        total = x.detach().clone()
        if self.world > 1:
            dist.all_reduce(total)
        return total

    def maximum(self, values: list[int]) -> list[int]:
        """Element-wise maximum over ranks of a few integers."""
        highest = torch.tensor(values, dtype=torch.int64, device=self.device)
        if self.world > 1:
            dist.all_reduce(highest, op=dist.ReduceOp.MAX)
        return [int(value) for value in highest.tolist()]

    def mean(self, values: list[float]) -> list[float]:
        """Element-wise mean over ranks of a few numbers, in float64."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.world > 1:
            dist.all_reduce(total)
        return [float(value) for value in (total / self.world).tolist()]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: torch.Tensor) -> torch.Tensor:
        total = grads[0].contiguous().clone()
        dist.all_reduce(total)
        return total.chunk(dist.get_world_size())[dist.get_rank()]


def peer_lost(error: BaseException) -> bool:
    """Is this what a collective or the store says when another process is gone or does not answer?"""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in PEER_LOST)


def _attempt_store(place: Place) -> dist.Store:
    """The rendezvous store under a prefix of this attempt.

    After a restart the server may be the old one, with addresses of dead peers in it: gloo then fails to connect its
    mesh. A prefix by attempt hides them.
    """
    is_server = place.rank == 0 and not place.agent_store
    try:
        store = dist.TCPStore(
            place.host, place.port, place.world, is_server,
            timeout=datetime.timedelta(seconds=JOIN_TIMEOUT_S), wait_for_workers=False,
        )  # fmt: skip
    except (RuntimeError, dist.DistError) as error:
        raise NodeFault(f"rank {place.rank} found no store at {place.host}:{place.port}: {error}") from None
    return dist.PrefixStore(f"attempt-{place.attempt}", store)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
