"""Several datasets as one stream: position -> dataset and position within it, in closed form.

Rational weights repeat after as many positions as their reduced integers sum to. Within that period the sources are
laid out by Tijdeman's rule (The chairman assignment problem, Discrete Mathematics 32, 1980): at every prefix each of K
sources has its exact share to within 1 - 1 / (2 K - 2) of a sample. A change of weights begins a segment at a position;
every source continues from its own position, in its own epochs.
"""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
import itertools
import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from data_pipeline.errors import ConfigError, DataError
from data_pipeline.schema import Sample
from data_pipeline.stream.order import share
from data_pipeline.stream.state import check_state
from data_pipeline.stream.weights import MOST_SOURCES, Weight, check_changes
from data_pipeline.stream.weights import reduce_weights as reduce_weights

if TYPE_CHECKING:
    from data_pipeline.stream.reader import Stream

_DIGITS = 12  # of a fingerprint, in the state


class Schedule:
    """Maps positions to sources. `changes`: (first position, weights), the first at position 0.

    Raises ConfigError for weights that are negative, all 0, not one per source, or without a short common period, and
    for changes out of order.
    """

    def __init__(self, changes: Sequence[tuple[int, Sequence[Weight]]]) -> None:
        self.starts = [start for start, _ in changes]
        self.weights = check_changes(changes)
        self.sources = len(self.weights[0])
        self._tables = [_period(weights) for weights in self.weights]
        self._bases = [np.zeros(self.sources, np.int64)]
        for number, start in enumerate(self.starts[1:]):
            self._bases.append(self._count(number, start))

    def assign(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Map positions: int64 [n] -> (source, position within that source), int64 [n] each."""
        segments = np.searchsorted(self.starts, positions, side="right") - 1
        sources, places = np.empty_like(positions), np.empty_like(positions)
        for number in np.unique(segments).tolist():
            chosen = np.flatnonzero(segments == number)
            table, before = self._tables[number]
            turns, slots = np.divmod(positions[chosen] - self.starts[number], len(table))
            found = sources[chosen] = table[slots]
            turn = np.array(self.weights[number], np.int64)[found]
            places[chosen] = self._bases[number][found] + turns * turn + before[slots, found]
        return sources, places

    def counts(self, position: int) -> list[int]:
        """Return how many samples of each source come before `position`."""
        return [int(count) for count in self._count(self.segment(position), position)]

    def segment(self, position: int) -> int:
        """Return the number of the segment that contains a position."""
        return bisect.bisect_right(self.starts, position) - 1

    def _count(self, number: int, position: int) -> np.ndarray:
        table, before = self._tables[number]
        turns, slot = divmod(position - self.starts[number], len(table))
        return self._bases[number] + turns * np.array(self.weights[number], np.int64) + before[slot]


def _period(weights: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return the source of each slot, int64 [period], and the count of each source before it, int64 [period, K]."""
    live = [source for source, weight in enumerate(weights) if weight]
    period, scale = sum(weights), max(2, 2 * len(live) - 2)
    counts = [0] * len(weights)
    table = np.empty(period, np.int64)
    before = np.empty((period, len(weights)), np.int64)
    for slot in range(period):
        before[slot] = counts
        late = {source: (slot + 1) * weights[source] - period * counts[source] for source in live}
        time_left = {  # slots until the source falls behind, for those that are not too early now
            source: Fraction((scale - 1) * period - scale * late[source], weights[source])
            for source in live
            if scale * late[source] >= period
        }
        table[slot] = min(live, key=lambda source: time_left.get(source, math.inf))
        counts[table[slot]] += 1
    return table, before


# ------------------------------------------------------------------------------------------------- streams


class Mixture:
    """Several streams as one, in the proportions of a schedule, with the interface of `Stream`.

    A sample's id counts through the datasets in their order; its epoch is that of its own dataset, its position that of
    the mixture. Raises ConfigError when the numbers of streams and weights differ, or there are too many.
    """

    def __init__(self, streams: Sequence[Stream], schedule: Schedule, seed: int) -> None:
        if len(streams) != schedule.sources or not 1 <= len(streams) <= MOST_SOURCES:
            raise ConfigError(
                f"{len(streams)} datasets, {schedule.sources} weights; give one each, at most {MOST_SOURCES}"
            )
        self.streams = list(streams)
        self.schedule = schedule
        self.seed = seed
        self.dataset = " + ".join(stream.dataset for stream in streams)
        self.samples = sum(stream.samples for stream in streams)
        self._firsts = [0, *itertools.accumulate(stream.samples for stream in streams)]

    def read(self, start: int, stop: int) -> list[Sample]:
        """Return the samples of positions [start, stop), in that order."""
        return self.take(np.arange(start, stop, dtype=np.int64))

    def take(self, positions: np.ndarray) -> list[Sample]:
        """Return the samples of any positions, int64 [n], in the given order."""
        sources, places = self.schedule.assign(positions)
        found: dict[int, Sample] = {}
        for source in np.unique(sources).tolist():
            rows = np.flatnonzero(sources == source)
            for row, sample in zip(rows.tolist(), self.streams[source].take(places[rows]), strict=True):
                found[row] = self._ours(sample, source, int(positions[row]))
        return [found[row] for row in range(len(positions))]

    def fetch(self, sample_id: int) -> Sample:
        """Return one sample by its id, 0 <= sample_id < samples."""
        if not 0 <= sample_id < self.samples:
            raise DataError(f"sample id {sample_id}: {self.dataset} has ids 0 to {self.samples - 1}")
        source = bisect.bisect_right(self._firsts, sample_id) - 1
        return self._ours(self.streams[source].fetch(sample_id - self._firsts[source]), source, -1)

    def locate(self, position: int) -> tuple[int, int, range]:
        """Return the epoch and id of the sample at a position, and the id range of its dataset."""
        sources, places = self.schedule.assign(np.array([position]))
        source = int(sources[0])
        epoch, sample_id, ids = self.streams[source].locate(int(places[0]))
        first = self._firsts[source]
        return epoch, sample_id + first, range(first, first + len(ids))

    def batches(self, start: int, size: int, shard: tuple[int, int] = (0, 1)) -> Iterator[list[Sample]]:
        """Yield the share of rank `shard[0]`, by lanes, of endless global batches of `size` positions from `start`."""
        while True:
            positions = np.arange(start, start + size, dtype=np.int64)
            yield self.take(share(positions, self.lanes(positions), shard))
            start += size

    def lanes(self, positions: np.ndarray) -> np.ndarray:
        """Return the lane, in its own source's order, that reads each position: int64 [n] -> int64 [n]."""
        sources, places = self.schedule.assign(positions)
        lanes = np.empty_like(positions)
        for source in np.unique(sources).tolist():
            lanes[sources == source] = self.streams[source].lanes(places[sources == source])
        return lanes

    def state(self, position: int) -> dict[str, Any]:
        """Return what must match to resume at `position`, as JSON below 1 KB: the last weights and what was read."""
        number = self.schedule.segment(max(0, position - 1))  # segment of the last sample: the next may begin another
        first = self.streams[0].state(position)
        del first["dataset"], first["samples"]
        return first | {
            "seed": self.seed,
            "datasets": [f"{stream.fingerprint[:_DIGITS]}:{stream.samples}" for stream in self.streams],
            "weights": list(self.schedule.weights[number]),
            "weights_from": self.schedule.starts[number],
            "read": self.schedule.counts(position),
        }

    def check(self, state: dict[str, Any]) -> None:
        """Raise DataError with a line for each field in which `state` differs from this mixture at its position."""
        check_state(state, self.state(state.get("position", 0)), self.dataset)

    def _ours(self, sample: Sample, source: int, position: int) -> Sample:
        return dataclasses.replace(sample, id=sample.id + self._firsts[source], position=position)


Source: TypeAlias = "Stream | Mixture"


def seed_of_source(seed: int, source: int) -> int:
    """Return the seed of a source's own order, so that datasets of equal size are not shuffled alike."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{source}".encode()).digest()[:8], "little")
