"""The sequence of samples is that of the undisturbed run, whatever worlds, workers and batches a run went through.

A schedule is drawn from a seed: legs of 4, 2, 8 or 3 ranks with 2, 0 or 3 workers, a global batch, a micro-batch and a
prefetch depth each; every leg begins at the state that the last one saved, after it was killed some steps later.
"""

import contextlib
import dataclasses
import functools
import json
import multiprocessing
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline.errors import DataError, NodeFault
from data_pipeline.schema import Sample
from data_pipeline.stream.mixture import Source
from pretrain.config import DataConfig
from pretrain.inputs.feed import Feed, PreparedStep, Preparer
from pretrain.inputs.source import open_stream

WORLDS, WORKERS, BATCHES = (4, 2, 8, 3), (2, 0, 3), (24, 48, 96)
SHUFFLE = {"lanes": 8, "block": 4, "window": 2}
SCHEDULES = int(os.environ.get("TESSERA_SCHEDULES", "45"))  # 210 take two minutes


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, build_scenes: Callable[[Path, int, int], Path]) -> list[Path]:
    """Three datasets of 130, 57 and 23 samples."""
    root = tmp_path_factory.mktemp("sources")
    return [build_scenes(root / str(count), count, count) for count in (130, 57, 23)]


def data_of(folders: list[Path], number: int) -> DataConfig:
    """One dataset, two mixed, three mixed with other weights twice on the way."""
    if number == 0:
        return DataConfig.model_validate({"dataset": str(folders[0]), "shuffle": SHUFFLE})
    weights: list[Any] = [[0.7, "3/10"], [5, 3, 2]][number - 1]
    tree: dict[str, Any] = {"shuffle": SHUFFLE, "datasets": []}
    tree["datasets"] = [{"path": str(f), "weight": w} for f, w in zip(folders, weights, strict=False)]
    if number == 2:
        tree["reweigh"] = [{"position": 170, "weights": [1, 0, 2]}, {"position": 431, "weights": [1, 1, 1]}]
    return DataConfig.model_validate(tree)


@dataclasses.dataclass(frozen=True)
class Leg:
    """One attempt: saved after `saved` steps, killed after `steps`."""

    world: int
    workers: int
    global_batch: int
    micro_batch: int
    ahead: int
    saved: int
    steps: int


def legs_of(seed: int) -> list[Leg]:
    rng = random.Random(seed)
    legs = []
    for number in range(6):
        world = WORLDS[number] if number < len(WORLDS) else rng.choice(WORLDS)
        batch, saved = rng.choice(BATCHES), rng.randint(0, 3)
        part = batch // world
        micro = rng.choice([size for size in range(1, part + 1) if part % size == 0])
        workers = WORKERS[number % 3]
        legs.append(Leg(world, workers, batch, micro, rng.randint(1, 5), saved, saved + rng.randint(0, 2)))
    return legs


def identities(samples: list[Sample]) -> dict[str, torch.Tensor]:
    """Which samples, and a number of each one's own randomness would give: (position, id, epoch)."""
    return {"samples": torch.tensor([(s.position, s.id, s.epoch) for s in samples])}


def prepare(preparer: Preparer, position: int, size: int) -> PreparedStep:
    """What a worker process of the shared pool does."""
    return preparer.at(position, size)


class Lent(Feed):
    """A feed whose workers are processes that all feeds of this module share: starting some takes seconds."""

    pool: Executor

    def _pool(self) -> contextlib.AbstractContextManager[Executor]:
        return contextlib.nullcontext(self.pool) if self.workers else super()._pool()

    def _submit(self, pool: Executor, position: int, size: int) -> "Future[PreparedStep]":
        return (
            pool.submit(prepare, self.preparer, position, size)
            if self.workers
            else super()._submit(pool, position, size)
        )

    def _wait(self, future: "Future[PreparedStep]") -> PreparedStep:
        return future.result(250)


@pytest.fixture(scope="module")
def feed_of() -> Iterator[Callable[..., Feed]]:
    with ProcessPoolExecutor(3, get_context("spawn")) as pool:

        def make(*arguments: Any) -> Feed:
            feed = Lent(*arguments)
            feed.pool = pool
            return feed

        yield make


def played(data: DataConfig, legs: list[Leg], feed_of: Callable[..., Feed]) -> list[tuple[int, int, int]]:
    """The saved part of every leg, all ranks in a row: (position, id, epoch)."""
    state: dict[str, Any] = open_stream(data, 5).state(0)
    consumed: list[tuple[int, int, int]] = []
    for leg in legs:
        stream = open_stream(data, 5)
        stream.check(state)
        start = state["position"]
        feeds = [
            feed_of(stream, identities, leg.global_batch, (rank, leg.world), leg.micro_batch, leg.ahead, leg.workers)
            for rank in range(leg.world)
        ]
        ranks = [list(feed.steps(100, 100 + leg.steps, start)) for feed in feeds]
        for step in range(leg.saved):
            first = start + step * leg.global_batch
            assert {rank[step][0] for rank in ranks} == {(first, first + leg.global_batch)}
            rows = [row for rank in ranks for batch in rank[step][1] for row in batch["samples"].tolist()]
            assert rows == one_process(stream, first, leg.global_batch)
            consumed += sorted(map(tuple, rows))
        state = json.loads(json.dumps(stream.state(start + leg.saved * leg.global_batch)))
        assert len(json.dumps(state)) < 1024
    return consumed


def one_process(stream: Source, start: int, size: int) -> list[list[int]]:
    return [[s.position, s.id, s.epoch] for s in next(stream.batches(start, size))]


@functools.cache
def undisturbed(data: DataConfig, stop: int) -> list[tuple[int, int, int]]:
    """The reference: one position after the other."""
    stream = open_stream(data, 5)
    return [(at, stream.locate(at)[1], stream.locate(at)[0]) for at in range(stop)]


@pytest.mark.slow
@pytest.mark.parametrize("mixture", [0, 1, 2])
def test_any_schedule_of_worlds_workers_batches_and_kills_reads_the_undisturbed_sequence(
    mixture: int, folders: list[Path], feed_of: Callable[..., Feed]
) -> None:
    data = data_of(folders, mixture)
    for seed in range(mixture, SCHEDULES, 3):
        found = played(data, legs_of(seed), feed_of)
        assert found == undisturbed(data, 6 * 3 * max(BATCHES))[: len(found)], f"schedule {seed}"


@pytest.mark.slow
@pytest.mark.parametrize("mixture", [0, 1, 2])
def test_batches_of_another_size_go_on_at_the_same_position(mixture: int, folders: list[Path]) -> None:
    data = data_of(folders, mixture)
    legs = [Leg(2, 0, size, 4, 2, 2, 3) for size in (24, 48, 8, 16)]
    found = played(data, legs, Feed)
    assert found == undisturbed(data, 6 * 3 * max(BATCHES))[: len(found)] and len(found) == 192


@pytest.mark.slow
@pytest.mark.real
def test_worker_processes_prepare_what_the_thread_prepares_and_leave_with_the_feed(folders: list[Path]) -> None:
    data = data_of(folders, 2)
    stream, shown = open_stream(data, 5), []
    for workers in (2, 0):
        feed = Feed(stream, identities, 24, (1, 2), 4, 2, workers)
        shown.append([(where, torch.cat([b["samples"] for b in bs]).tolist()) for where, bs in feed.steps(0, 8, 30)])
    assert shown[0] == shown[1] and len(shown[0]) == 8
    assert {where for where, _ in shown[0]} == {(30 + 24 * step, 54 + 24 * step) for step in range(8)}


@pytest.mark.slow
@pytest.mark.real
def test_stop_signals_end_no_worker_not_even_one_that_is_being_started(folders: list[Path]) -> None:
    """A scheduler sends them to every process of the job, also in the seconds in which a worker imports its program."""
    feed = Feed(open_stream(data_of(folders, 0), 5), identities, 24, (0, 1), 4, 2, 2)
    struck: set[tuple[int, int]] = set()
    done, others = threading.Event(), set(multiprocessing.active_children())  # of tests before this one

    def strike() -> None:
        while not done.wait(0.01):
            for worker in set(multiprocessing.active_children()) - others:
                for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
                    os.kill(worker.pid or 0, number)
                    struck.add((worker.pid or 0, number))

    thread = threading.Thread(target=strike)
    thread.start()
    try:
        assert len(list(feed.steps(0, 8))) == 8
    finally:
        done.set()
        thread.join(timeout=30)
    assert len(struck) == 6  # two workers, three signals


def leave(samples: list[Sample]) -> dict[str, torch.Tensor]:
    os._exit(9)


@pytest.mark.slow
@pytest.mark.real
def test_a_worker_that_dies_is_a_node_fault(folders: list[Path]) -> None:
    feed = Feed(open_stream(data_of(folders, 0), 5), leave, 24, (0, 1), 4, 2, 1)
    with pytest.raises(NodeFault, match="a data worker died"):
        next(feed.steps(0, 1))


def test_a_state_of_other_shuffling_is_refused(folders: list[Path]) -> None:
    data = data_of(folders, 0)
    state = open_stream(data, 5).state(30)
    other = data.model_copy(update={"shuffle": data.shuffle.model_copy(update={"block": 8})})
    with pytest.raises(DataError, match="block: 4 saved, 8 now"):
        open_stream(other, 5).check(state)


@pytest.mark.slow
def test_a_seek_into_a_mixture_of_a_billion_is_immediate(folders: list[Path]) -> None:
    stream = open_stream(data_of(folders, 2), 5)
    positions = np.arange(10**15, 10**15 + 256)
    assert [s.position for s in stream.take(positions)] == positions.tolist()
