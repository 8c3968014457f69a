"""Who am I among the processes of a run. The only reader of RANK, WORLD_SIZE and their Slurm twins.

A single process is a mesh of one: it joins a process group of its own, so that every later line is the same.
"""

import dataclasses
import datetime
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist

from data_pipeline.errors import ConfigError, NodeFault

KeyValues = dist.Store


JOIN_TIMEOUT_S = 300.0
"""Peers may start this much later than oneself: nodes differ in how long they take to read a program."""
ANSWER_S = 5.0
RETRY_S = 0.5
ATTEMPT, MISSING, OVER = "attempt", "missing", "null"
"""Keys of the store: the attempt's name, and in it the ranks that did not come; `null` says that the next one began."""
NAMED = 8
ASKED_AT_ONCE = 256
PEER_LOST = ("Connection closed by peer", "Connection reset by peer", "gloo/transport", "Broken pipe", "NCCL")
"""gloo raises plain RuntimeErrors; these are its words, and NCCL's."""


@dataclasses.dataclass(frozen=True)
class RankPlace:
    """This process among its peers, as the launcher put it into the environment."""

    rank: int
    local_rank: int
    world: int
    host: str
    port: int
    agent: str = ""
    """torchrun's name of the job, where its own store serves the ranks: one that outlives attempts."""


def place_from(environment: Mapping[str, str]) -> RankPlace:
    """Read torchrun's variables, or srun's, or none (alone). Raises ConfigError when they are incomplete."""
    if "RANK" in environment:
        rank, local, world = (environment.get(name, "0") for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    elif "SLURM_PROCID" in environment and "SLURM_STEP_ID" in environment:
        rank, local, world = (environment[name] for name in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS"))
    else:
        return RankPlace(0, 0, 1, "127.0.0.1", _free_port())
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in environment]
    if missing:
        raise ConfigError(
            f"rank {rank} of {world} has no {' and no '.join(missing)}; start with torchrun or tessera launch"
        )
    shared = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return RankPlace(
        int(rank), int(local), int(world), environment["MASTER_ADDR"], int(environment["MASTER_PORT"]),
        environment.get("TORCHELASTIC_RUN_ID", "torchrun") if shared else "",
    )  # fmt: skip


def own_rank() -> int:
    """This process's rank, known before it has met any other."""
    return place_from(os.environ).rank


@dataclasses.dataclass(frozen=True)
class Mesh:
    """The joined process group, its key-value store and this process's device."""

    place: RankPlace
    device: torch.device
    store: dist.Store

    @property
    def rank(self) -> int:
        return self.place.rank

    @property
    def world(self) -> int:
        return self.place.world

    @classmethod
    def start(cls, timeout_s: float, join_s: float = JOIN_TIMEOUT_S) -> "Mesh":
        """Join the process group (nccl where CUDA is, gloo elsewhere).

        Raises NodeFault naming the peers that do not come within `join_s`, and where rank 0's address does not resolve
        within either time.
        """
        place = place_from(os.environ)
        on_cuda = torch.cuda.is_available()
        device = torch.device("cuda", place.local_rank) if on_cuda else torch.device("cpu")
        if on_cuda:
            torch.cuda.set_device(device)
        # DeepSpeed reads these itself; a process started by srun or alone has none of them.
        os.environ.update(RANK=str(place.rank), LOCAL_RANK=str(place.local_rank), WORLD_SIZE=str(place.world))
        os.environ.update(MASTER_ADDR=place.host, MASTER_PORT=str(place.port))
        os.environ.setdefault("DS_ACCELERATOR", "cuda" if on_cuda else "cpu")
        # The watchdog ends a hang after timeout_s and names who hangs; the group's own deadline is the second line.
        deadline = datetime.timedelta(seconds=2 * timeout_s)
        _check_resolves(place, min(timeout_s, join_s))
        try:
            store = _join(place, join_s)
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

    def exercises(self, elements: int) -> dict[str, tuple[Callable[[], Any], float]]:
        """Name -> (call, bytes that it moves through each rank) of every collective that training relies on.

        elements: float32 in the whole of each; of every rank comes an equal part, where they are put together.
        """
        part = -(-elements // self.world)
        whole = torch.zeros(part * self.world, device=self.device)
        mine = torch.zeros(part, device=self.device)
        size, share = whole.nbytes, (self.world - 1) / self.world
        return {
            "barrier": (dist.barrier, 0.0),
            "broadcast": (lambda: dist.broadcast(whole, 0), size),
            "all-reduce": (lambda: dist.all_reduce(whole), 2 * size * share),
            "all-gather": (lambda: dist.all_gather_single(whole, mine), size * share),
            "reduce-scatter": (lambda: dist.reduce_scatter_single(mine, whole), size * share),
        }

    def swap(self, peer: int, elements: int) -> None:
        """Send `elements` float32 to a peer that does the same, and wait for its own."""
        out, into = torch.zeros(elements, device=self.device), torch.empty(elements, device=self.device)
        pair = [dist.P2POp(dist.isend, out, peer), dist.P2POp(dist.irecv, into, peer)]
        for request in dist.batch_isend_irecv(pair):
            request.wait()
        self.settle()

    def bind(self) -> None:
        """Have this thread use the rank's device: CUDA remembers one for each."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    def settle(self) -> None:
        """Return when the device has done what it was told."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


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


def read_all(store: "KeyValues", keys: list[str]) -> list[bytes]:
    """The values of keys that are there. In portions: one question for 16,384 keys takes several times as long."""
    portions = (keys[at : at + ASKED_AT_ONCE] for at in range(0, len(keys), ASKED_AT_ONCE))
    return [value for portion in portions for value in store.multi_get(portion)]


def peer_lost(error: BaseException) -> bool:
    """Is this what a collective or the store says when another process is gone or does not answer?"""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in PEER_LOST)


def _check_resolves(place: RankPlace, seconds: float) -> None:
    """Raise NodeFault naming rank 0's address where it has not resolved after `seconds`.

    A name may be new, and the system's resolver may take longer than that: it is asked in a thread, again and again.
    """
    resolved, why = threading.Event(), ["no answer"]

    def ask() -> None:
        until = time.monotonic() + seconds
        while not resolved.is_set() and time.monotonic() < until:
            try:
                socket.getaddrinfo(place.host, place.port)
                resolved.set()
            except (OSError, UnicodeError) as error:  # UnicodeError: no name of a host
                why[0] = str(error)
                time.sleep(min(RETRY_S, seconds))

    threading.Thread(target=ask, name="name of rank 0", daemon=True).start()
    if not resolved.wait(seconds):
        raise NodeFault(
            f"rank {place.rank}: the address of rank 0, {place.host!r}, does not resolve on {socket.gethostname()} "
            f"within {seconds:g} s ({why[0]}); mend --master-addr (MASTER_ADDR), or the name service of this node"
        )


def _join(place: RankPlace, join_s: float) -> dist.Store:
    """The store of the attempt that all ranks came to. Raises NodeFault where there is none within `join_s`."""
    while True:
        store = _attempt_store(place, join_s)
        if _meet(store, place, join_s):  # as long as rank 0 waits, which may have come later: it names who is missing
            return store


def _attempt_store(place: RankPlace, join_s: float) -> dist.Store:
    """The rendezvous store under the name of this attempt, which rank 0 gives it.

    The server may be of an earlier attempt, with addresses of dead peers in it: gloo would fail to connect its mesh.
    Nobody's count tells attempts apart, for every node has its own: torchrun on one node counts a worker's death, on
    the others a change of members, which it does not count. A rank that was in an attempt before, or comes to one that
    all others came to, waits for the next.
    """
    is_server = place.rank == 0 and not place.agent
    until, why = time.monotonic() + join_s, "it holds an attempt that does not end, or a process of this rank"
    while time.monotonic() < until:
        left = datetime.timedelta(seconds=max(1.0, until - time.monotonic()))
        try:
            server = dist.TCPStore(place.host, place.port, place.world, is_server, timeout=left, wait_for_workers=False)
            here = dist.PrefixStore(place.agent, server)
            found = _new_attempt(here) if place.rank == 0 else _its_attempt(here, place.rank)
            if found is not None:
                server.set_timeout(datetime.timedelta(seconds=JOIN_TIMEOUT_S))  # for all that is asked later
                return found
        except (RuntimeError, dist.DistError) as error:
            why = str(error)
            if is_server:
                break
        time.sleep(RETRY_S)
    raise NodeFault(f"rank {place.rank} found no store at {place.host}:{place.port}: {why}")


def _new_attempt(store: dist.Store) -> dist.Store:
    """Rank 0 names its attempt, then tells who may wait in the one before that it is over."""
    before = store.get(ATTEMPT).decode() if store.check([ATTEMPT]) else ""
    name = uuid.uuid4().hex
    store.set(ATTEMPT, name)
    if before:
        dist.PrefixStore(before, store).set(MISSING, OVER)
    return dist.PrefixStore(name, store)


def _its_attempt(store: dist.Store, rank: int) -> dist.Store | None:
    """The attempt as another rank finds it; None where it is one that this rank cannot be meant by."""
    attempt = dist.PrefixStore(store.get(ATTEMPT).decode(), store)
    new = not attempt.check([MISSING]) and attempt.add(f"came/{rank}", 1) == 1
    return attempt if new else None


def _meet(store: dist.Store, place: RankPlace, join_s: float) -> bool:
    """Wait until all ranks are here; False where the attempt was over before they were.

    Only rank 0 looks for each: N ranks that all do would ask for N * N keys.
    """
    store.set(f"here/{place.rank}", "")
    keys = [f"here/{rank}" for rank in range(place.world)]
    if place.rank == 0:
        missing: list[int] | None = []
        try:
            store.wait(keys, datetime.timedelta(seconds=join_s))
        except (RuntimeError, dist.DistError):
            missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
        store.set(MISSING, json.dumps(missing))
    else:
        store.wait([MISSING], datetime.timedelta(seconds=join_s + ANSWER_S))
        missing = json.loads(store.get(MISSING))
    if missing:
        names = ", ".join(map(str, missing[:NAMED])) + (" ..." if len(missing) > NAMED else "")
        raise NodeFault(
            f"{len(missing)} of {place.world} ranks did not come to {place.host}:{place.port} within {join_s:g} s: "
            f"rank {names}; look at their nodes and at the network between",
            blamed=tuple(missing),
        )
    return missing is not None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
