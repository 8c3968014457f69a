"""Shuffle quality beside webdataset's own shuffle, and a seek into the middle of a billion samples.

python tests/benchmarks/bench_order.py            400 shards of 1000, batches of 256; 100,000 shards of 10,000
"""

import itertools
import json
import random
import resource
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from webdataset import filters

from data_pipeline.shards.manifest import Index, Manifest, Shard, pack_index
from data_pipeline.shards.tar import TarWriter, scan_samples
from data_pipeline.stream.order import order
from data_pipeline.stream.reader import Stream

SHARDS, EACH, BATCH = 400, 1000, 256
MANY, LARGE, ROUNDS = 100_000, 10_000, 7

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


# --------------------------------------------------------------------------------------------------- seek


def write_billion(folder: Path) -> None:
    """One tar under 100,000 names: the names, the index and the manifest of 10^9 samples without their bytes."""
    with (folder / "tar").open("wb") as file:
        writer = TarWriter(file)
        for row in range(LARGE):
            writer.add(f"{row:09d}", [("jpg", b"image"), ("txt", b"caption")])
        writer.close()
    offsets, xxh3 = scan_samples(folder / "tar")
    size = (folder / "tar").stat().st_size
    (folder / "idx").write_bytes(pack_index(Index(size, xxh3, np.array(offsets, np.uint32))))
    names = [f"{number:06d}.tar" for number in range(MANY)]
    for name in names:
        (folder / name).symlink_to("tar")
        (folder / f"{name}.idx").symlink_to("idx")
    manifest = Manifest(tuple(Shard(name, LARGE, size, f"{number:064x}") for number, name in enumerate(names)))
    (folder / "manifest.json").write_bytes(manifest.to_json())


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
    with tempfile.TemporaryDirectory() as name:
        write_billion(Path(name))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        began = time.perf_counter()
        stream = Stream(name, seed=1)
        opened = time.perf_counter()
        count = len(stream.take(middle))
        done = time.perf_counter()
    state = json.dumps(stream.state(5 * 10**8))
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(
        f"{stream.samples:,} samples: opened in {opened - began:.2f} s, {count} samples from the middle "
        f"{done - opened:.3f} s later, {(after - before) / 1024:.0f} MiB more at the peak; state {len(state)} bytes"
    )


if __name__ == "__main__":
    main()
