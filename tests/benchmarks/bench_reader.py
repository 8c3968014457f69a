"""Samples read per second of CPU: Stream.read beside webdataset, the same tars, alternating, in the page cache.

python tests/benchmarks/bench_reader.py            30 KB images with .txt and .json, one thread
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import webdataset

from data_pipeline.shards.tar import TarWriter
from data_pipeline.shards.verify import index
from data_pipeline.stream.reader import Stream

SAMPLES, SHARDS, IMAGE_BYTES, ROUNDS = 4000, 4, 30_000, 7


def write_tars(folder: Path) -> list[str]:
    image = np.random.default_rng(0).bytes(IMAGE_BYTES)
    for shard in range(SHARDS):
        with (folder / f"{shard:05d}.tar").open("wb") as file:
            writer = TarWriter(file)
            for row in range(SAMPLES // SHARDS):
                text = f"caption {row}"
                parts = [("jpg", image), ("txt", text.encode()), ("json", f'{{"captions": ["{text}"]}}'.encode())]
                writer.add(f"{row:09d}", parts)
            writer.close()
    return sorted(str(path) for path in folder.glob("*.tar"))


def ours(folder: Path) -> int:
    stream = Stream(folder, seed=0)
    return sum(len(stream.read(start, start + 256)) for start in range(0, SAMPLES, 256))


def theirs(urls: list[str]) -> int:
    return sum(1 for _ in webdataset.WebDataset(urls, shardshuffle=False))


def rate(work: Callable[[], int]) -> float:
    start = time.thread_time()
    count = work()
    return count / (time.thread_time() - start)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        urls = write_tars(folder)
        index([name])
        pairs = [(rate(lambda: ours(folder)), rate(lambda: theirs(urls))) for _ in range(ROUNDS)]
    stream, peer = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(one / other for one, other in pairs)
    print(f"Stream.read {stream:,.0f}/s   webdataset {peer:,.0f}/s   median ratio {ratio:.1f}   ({ROUNDS} rounds)")


if __name__ == "__main__":
    main()
