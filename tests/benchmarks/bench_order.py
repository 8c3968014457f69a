"""Shuffle quality beside webdataset's own shuffle, and the order at the middle of a billion samples.

python tests/benchmarks/bench_order.py            400 shards of 1000, batches of 256

What it takes to read from there: bench_reader.py huge.
"""

import itertools
import random
import statistics
import time
from collections.abc import Iterator

import numpy as np
from webdataset import filters

from data_pipeline.stream.order import Windows, order

SHARDS, EACH, BATCH = 400, 1000, 256
ROUNDS = 7

# ---------------------------------------------------------------------------------------- shuffle quality


def ours() -> np.ndarray:
    return order(np.arange(SHARDS * EACH), SHARDS * EACH, 1)[1]


def perfect() -> np.ndarray:
    return np.random.default_rng(0).permutation(SHARDS * EACH)


def theirs(buffer: int, workers: int) -> np.ndarray:
    """Shards shuffled and dealt to the workers, each with a buffer and batches of its own, taken in turn."""
    shards = list(range(SHARDS))
    random.Random(0).shuffle(shards)
    parts = [_shuffled(shards[worker::workers], buffer, worker) for worker in range(workers)]
    whole = len(shards) // workers * EACH // BATCH
    batches = [list(itertools.islice(part, BATCH)) for _ in range(whole) for part in parts]
    return np.concatenate(batches)


def _shuffled(shards: list[int], buffer: int, worker: int) -> Iterator[int]:
    samples = (shard * EACH + row for shard in shards for row in range(EACH))
    return iter(filters._shuffle(samples, buffer, min(buffer, 100), random.Random(worker)))


def quality(ids: np.ndarray) -> str:
    """Distinct shards of a batch (mean, least), pairs of neighbouring samples in a batch, and one after the other."""
    batches = ids[: len(ids) // BATCH * BATCH].reshape(-1, BATCH)
    distinct = [len(np.unique(batch // EACH)) for batch in batches]
    pairs = (np.diff(np.sort(batches, axis=1), axis=1) == 1).sum(1).mean()
    return (
        f"{statistics.mean(distinct):6.1f} distinct shards a batch (least {min(distinct)}), {pairs:6.2f} pairs of "
        f"neighbours a batch, {100 * (np.diff(ids) == 1).mean():.3f} % one after the other"
    )


def main() -> None:
    for name, ids in (
        ("ours", ours()), ("perfect", perfect()),
        ("webdataset buffer 1000", theirs(1000, 1)), ("webdataset buffer 5000, 8 workers", theirs(5000, 8)),
    ):  # fmt: skip
        print(f"{name:34s}{quality(ids)}")
    middle = np.arange(5 * 10**8, 5 * 10**8 + BATCH)
    times = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        order(middle, 10**9, 1)
        times.append(time.perf_counter() - began)
    print(f"positions -> ids at the middle of 10^9: {1000 * statistics.median(times):.2f} ms for {BATCH}")
    windows, began = Windows(10**9, 1), time.perf_counter()
    for start in range(0, 1 << 18, BATCH):
        windows.order(middle + start)
    print(f"the same by a reader that goes on: {(time.perf_counter() - began) / (1 << 18) * 1e6:.2f} us a sample")


if __name__ == "__main__":
    main()
