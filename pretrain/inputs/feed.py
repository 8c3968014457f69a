"""Preparation of a rank's batches, step by step, ahead of the training thread.

A step consumes the positions [P, P + G) of the stream; each rank takes its share of them, by the lanes of the order, in
micro-batches. The content of a step depends on P and G alone: preparing it early, late, again or in another process
gives the same batches.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import TYPE_CHECKING

import cv2
import numpy as np
import torch
from torch import Tensor

from data_pipeline.errors import NodeFault
from data_pipeline.schema import Sample
from data_pipeline.stream.order import share
from pretrain.inputs.bad import Ledger, Replaced, Usable
from pretrain.runtime.signals import ignore_stop_signals, stop_signals_held

if TYPE_CHECKING:
    from data_pipeline.stream.mixture import Source

Batch = dict[str, Tensor]
Inputs = Callable[[list[Sample]], Batch]


@dataclasses.dataclass
class PreparedStep:
    """One prepared step of a rank."""

    batches: list[Batch]
    replaced: list[Replaced]


@dataclasses.dataclass(frozen=True)
class Preparer:
    """Position and size -> this rank's micro-batches of the global batch that begins there. Stateless."""

    stream: Source
    inputs: Inputs
    shard: tuple[int, int]
    micro_batch: int

    def at(self, position: int, size: int) -> PreparedStep:
        """Prepare the step [position, position + size)."""
        positions = np.arange(position, position + size, dtype=np.int64)
        mine = share(positions, self.stream.lanes(positions), self.shard)
        usable = Usable(self.stream, self.inputs)
        samples = usable.take(mine)
        parts = (samples[at : at + self.micro_batch] for at in range(0, len(samples), self.micro_batch))
        return PreparedStep([usable.batch(part) for part in parts], usable.replaced)


class Feed:
    """Prepares steps ahead and yields (positions [start, stop) of the whole step, this rank's micro-batches).

    workers: number of processes that prepare steps; 0 uses a thread. ledger, previews: records of the samples replaced
    in steps and in previews. batch_at: step -> number of its samples, at most `global_batch`; by default that.
    """

    def __init__(
        self,
        stream: Source,
        inputs: Inputs,
        global_batch: int,
        shard: tuple[int, int],
        micro_batch: int,
        prefetch_steps: int,
        workers: int = 0,
        ledger: Ledger | None = None,
        previews: Ledger | None = None,
        batch_at: Callable[[int], int] | None = None,
    ) -> None:
        self.preparer = Preparer(stream, inputs, shard, micro_batch)
        self.global_batch = global_batch
        self.batch_at = batch_at or (lambda _step: global_batch)
        self.ahead = max(prefetch_steps, workers)
        self.workers = workers
        self.ledger = ledger or Ledger(None, 0.0)
        self.previews = previews or Ledger(None)
        self.waited_s = 0.0
        """Total seconds that the training thread has waited for data."""

    def steps(
        self, start: int, stop: int, position: int | None = None
    ) -> Iterator[tuple[tuple[int, int], list[Batch]]]:
        """Yield the steps [start, stop), in order. position: of the first step; start * G if the batch never changed.

        Raises DataError when too many samples cannot be used, NodeFault when a worker dies.
        """
        end = start * self.global_batch if position is None else position
        with self._pool() as pool, _worker_death_told():
            ahead: collections.deque[tuple[int, int, Future[PreparedStep]]] = collections.deque()
            try:
                for step in range(start, stop):
                    while len(ahead) <= self.ahead and step + len(ahead) < stop:
                        first, end = end, end + self.batch_at(step + len(ahead))
                        ahead.append((first, end, self._submit(pool, first, end - first)))
                    first, last, future = ahead.popleft()
                    prepared = self._wait(future)
                    self.ledger.note(prepared.replaced, (last - first) // self.preparer.shard[1])
                    yield (first, last), prepared.batches
            finally:
                for _, _, future in ahead:
                    future.cancel()

    def prepared_by(self, position: int, least: int) -> np.ndarray:
        """Return this rank's share of the positions that may be in preparation, int64 [n], once `position` is reached.

        They start at `position` and extend at least to `least`; n is the same on every rank.
        """
        rank, world = self.preparer.shard
        count = max((self.ahead + 2) * self.global_batch, least - position)
        return position + rank + world * np.arange(-(-count // world), dtype=np.int64)

    def preview(self, samples: int) -> Batch:
        """Return the stream's first samples, the same at every call; each replacement is noted once."""
        usable = Usable(self.preparer.stream, self.preparer.inputs)
        batch: Batch = usable.batch(usable.take(np.arange(samples, dtype=np.int64)))
        self.previews.note([entry for entry in usable.replaced if entry not in self.previews.entries], samples)
        return batch

    def _wait(self, future: Future[PreparedStep]) -> PreparedStep:
        began = time.monotonic()
        try:
            return tensors(future.result()) if self.workers else future.result()
        finally:
            self.waited_s += time.monotonic() - began

    def _submit(self, pool: Executor, position: int, size: int) -> Future[PreparedStep]:
        with stop_signals_held():  # the first submit starts the workers
            return pool.submit(_prepare_here if self.workers else self.preparer.at, position, size)

    def _pool(self) -> contextlib.AbstractContextManager[Executor]:
        if not self.workers:
            return ThreadPoolExecutor(1, thread_name_prefix="feed")
        context = multiprocessing.get_context("spawn")  # fork would copy held locks and s3 clients into the worker
        return ProcessPoolExecutor(self.workers, context, _start_worker, (self.preparer,))


@contextlib.contextmanager
def _worker_death_told() -> Iterator[None]:
    """Raise NodeFault when a worker dies: the pool then fails on waiting for a result or on submitting a step."""
    try:
        yield
    except BrokenProcessPool as fault:
        raise NodeFault(
            f"a data worker died ({fault}); the same command resumes from the last checkpoint and looks for an image "
            "that crashes its decoder; lower data.workers if memory ran out"
        ) from None


# ------------------------------------------------------------------------------------------------- workers

_preparer: Preparer | None = None


def _start_worker(preparer: Preparer) -> None:
    """Set up this process as a data worker. Single-threaded; ignores stop signals; exits with the trainer."""
    global _preparer
    _preparer = preparer
    ignore_stop_signals()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _prepare_here(position: int, size: int) -> PreparedStep:
    """Prepare a step in a worker. Tensors are piped as arrays, because /dev/shm is small in containers."""
    assert _preparer is not None
    prepared = _preparer.at(position, size)
    arrays = [{name: tensor.numpy() for name, tensor in batch.items()} for batch in prepared.batches]
    return PreparedStep(arrays, prepared.replaced)  # type: ignore[arg-type]


def tensors(prepared: PreparedStep) -> PreparedStep:
    """Convert the arrays of a worker's step to tensors."""
    batches = [{name: torch.from_numpy(array) for name, array in batch.items()} for batch in prepared.batches]
    return PreparedStep(batches, prepared.replaced)
