"""This process's place in the process group. The only reader of RANK, WORLD_SIZE and their Slurm equivalents.

A single process is a mesh of one: it joins a process group of its own, so that all later code is the same.
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
"""Time allowed for peers to join after this process: nodes differ in how long they take to load the program."""
ANSWER_S = 5.0
RETRY_S = 0.5
ATTEMPT, MISSING, OVER = "attempt", "missing", "null"
"""Store keys: the attempt's name, and under it the ranks that did not join; OVER means that a later attempt began."""
NAMED = 8
ASKED_AT_ONCE = 256
PEER_LOST = ("Connection closed by peer", "Connection reset by peer", "gloo/transport", "Broken pipe", "NCCL")
"""Substrings of gloo's and NCCL's messages: gloo raises plain RuntimeErrors."""


@dataclasses.dataclass(frozen=True)
class RankPlace:
    """This process's rank and rendezvous address, as the launcher set them in the environment."""

    rank: int
    local_rank: int
    world: int
    host: str
    port: int
    agent: str = ""
    """torchrun's run id when the ranks use the agent's own store, which outlives attempts; otherwise empty."""


def place_from(environment: Mapping[str, str]) -> RankPlace:
    """Read torchrun's variables or srun's; without either, a world of one. Raises ConfigError if some are missing."""
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
    """Return this process's rank, known before it joins the process group."""
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
        """Join the process group (nccl with CUDA, gloo without).

        Raises NodeFault naming the peers that do not join within `join_s`, or when rank 0's address does not resolve
        within the shorter of the two timeouts.
        """
        place = place_from(os.environ)
        on_cuda = torch.cuda.is_available()
        device = torch.device("cuda", place.local_rank) if on_cuda else torch.device("cpu")
        if on_cuda:
            torch.cuda.set_device(device)
        # DeepSpeed reads these variables itself; a process started by srun, or alone, does not have them.
        os.environ.update(RANK=str(place.rank), LOCAL_RANK=str(place.local_rank), WORLD_SIZE=str(place.world))
        os.environ.update(MASTER_ADDR=place.host, MASTER_PORT=str(place.port))
        os.environ.setdefault("DS_ACCELERATOR", "cuda" if on_cuda else "cpu")
        # The watchdog ends a hang after timeout_s and names the ranks to blame; the group's timeout is the fallback.
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
        """Return the same store over a separate connection: a thread that waits on it does not block the others."""
        return self.store.clone()  # type: ignore[attr-defined]  # missing in torch's stubs

    def stop(self) -> None:
        """Leave the process group."""
        if dist.is_initialized():
            dist.destroy_process_group()

    # ------------------------------------------------------------------------------- collectives

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """Gather x [b, ...] of every rank -> [world * b, ...] in rank order, differentiable.

        The backward sums the gradients over ranks. After the engine has averaged the parameters' gradients over ranks,
        they are the gradients of the loss averaged over ranks.
        """
        return _Gather.apply(x) if self.world > 1 else x

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """Return the sum of `x` over ranks, without gradient."""
        total = x.detach().clone()
        if self.world > 1:
            dist.all_reduce(total)
        return total

    def maximum(self, values: list[int]) -> list[int]:
        """Return the element-wise maximum over ranks of a few integers."""
        highest = torch.tensor(values, dtype=torch.int64, device=self.device)
        if self.world > 1:
            dist.all_reduce(highest, op=dist.ReduceOp.MAX)
        return [int(value) for value in highest.tolist()]

    def mean(self, values: list[float]) -> list[float]:
        """Return the element-wise mean over ranks of a few numbers, computed in float64."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.world > 1:
            dist.all_reduce(total)
        return [float(value) for value in (total / self.world).tolist()]

    def exercises(self, elements: int) -> dict[str, tuple[Callable[[], Any], float]]:
        """Return name -> (call, bytes moved through each rank) for every collective that training relies on.

        elements: float32 elements of the full tensor; in gather and scatter every rank holds an equal part of it.
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
        """Exchange `elements` float32 with a peer that makes the same call; return when both transfers are done."""
        out, into = torch.zeros(elements, device=self.device), torch.empty(elements, device=self.device)
        pair = [dist.P2POp(dist.isend, out, peer), dist.P2POp(dist.irecv, into, peer)]
        for request in dist.batch_isend_irecv(pair):
            request.wait()
        self.settle()

    def bind(self) -> None:
        """Make the rank's device current in this thread: CUDA keeps a current device per thread."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    def settle(self) -> None:
        """Wait until the device has finished all queued work."""
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
    """Return the values of existing keys, in batches: one request for 16,384 keys takes several times as long."""
    portions = (keys[at : at + ASKED_AT_ONCE] for at in range(0, len(keys), ASKED_AT_ONCE))
    return [value for portion in portions for value in store.multi_get(portion)]


def peer_lost(error: BaseException) -> bool:
    """Return whether a collective or the store raised this error because another process is gone or unresponsive."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in PEER_LOST)


def _check_resolves(place: RankPlace, seconds: float) -> None:
    """Raise NodeFault naming rank 0's address if it does not resolve within `seconds`.

    The name may be new, and one call of the system's resolver may take longer: a thread calls it repeatedly.
    """
    resolved, why = threading.Event(), ["no answer"]

    def ask() -> None:
        until = time.monotonic() + seconds
        while not resolved.is_set() and time.monotonic() < until:
            try:
                socket.getaddrinfo(place.host, place.port)
                resolved.set()
            except (OSError, UnicodeError) as error:  # UnicodeError: not a valid host name
                why[0] = str(error)
                time.sleep(min(RETRY_S, seconds))

    threading.Thread(target=ask, name="name of rank 0", daemon=True).start()
    if not resolved.wait(seconds):
        raise NodeFault(
            f"rank {place.rank}: the address of rank 0, {place.host!r}, does not resolve on {socket.gethostname()} "
            f"within {seconds:g} s ({why[0]}); correct --master-addr (MASTER_ADDR), or name resolution on this node"
        )


def _join(place: RankPlace, join_s: float) -> dist.Store:
    """Return the store of the attempt that all ranks joined. Raises NodeFault if there is none within `join_s`."""
    while True:
        store = _attempt_store(place, join_s)
        if _meet(store, place, join_s):  # waits as long as rank 0, which may start later: it names the missing
            return store


def _attempt_store(place: RankPlace, join_s: float) -> dist.Store:
    """Return the rendezvous store, prefixed with the name of this attempt, which rank 0 chooses.

    The server may hold an earlier attempt with addresses of dead peers: gloo would fail to connect its mesh. Restart
    counts cannot identify an attempt, since every node has its own: torchrun counts a worker's death on its node, but
    not the membership change that the other nodes see. A rank that has already joined the attempt it finds, or whose
    rendezvous is over there, waits for the next one.
    """
    is_server = place.rank == 0 and not place.agent
    until, why = time.monotonic() + join_s, "it serves an attempt that does not end, or a process of this rank"
    while time.monotonic() < until:
        left = datetime.timedelta(seconds=max(1.0, until - time.monotonic()))
        try:
            server = dist.TCPStore(place.host, place.port, place.world, is_server, timeout=left, wait_for_workers=False)
            here = dist.PrefixStore(place.agent, server)
            found = _new_attempt(here) if place.rank == 0 else _its_attempt(here, place.rank)
            if found is not None:
                server.set_timeout(datetime.timedelta(seconds=JOIN_TIMEOUT_S))  # for all later requests
                return found
        except (RuntimeError, dist.DistError) as error:
            why = str(error)
            if is_server:
                break
        time.sleep(RETRY_S)
    raise NodeFault(f"rank {place.rank} found no store at {place.host}:{place.port}: {why}")


def _new_attempt(store: dist.Store) -> dist.Store:
    """Rank 0: publish a new attempt's name, then tell ranks that may still wait in the previous one that it is over."""
    before = store.get(ATTEMPT).decode() if store.check([ATTEMPT]) else ""
    name = uuid.uuid4().hex
    store.set(ATTEMPT, name)
    if before:
        dist.PrefixStore(before, store).set(MISSING, OVER)
    return dist.PrefixStore(name, store)


def _its_attempt(store: dist.Store, rank: int) -> dist.Store | None:
    """Other ranks: return the current attempt's store, or None if it is an attempt that this rank cannot join."""
    attempt = dist.PrefixStore(store.get(ATTEMPT).decode(), store)
    new = not attempt.check([MISSING]) and attempt.add(f"came/{rank}", 1) == 1
    return attempt if new else None


def _meet(store: dist.Store, place: RankPlace, join_s: float) -> bool:
    """Wait until all ranks have joined; return False if the attempt was over before that.

    Only rank 0 checks every rank: if all N ranks did, they would request N * N keys.
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
            f"{len(missing)} of {place.world} ranks did not join {place.host}:{place.port} within {join_s:g} s: "
            f"rank {names}; check their nodes and the network",
            blamed=tuple(missing),
        )
    return missing is not None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
