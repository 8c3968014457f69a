"""A dataset read from S3 in the order of training, beside one streaming GET of the same bytes: rate and requests.

python tests/benchmarks/bench_s3.py            a gateway of its own on loopback; alternating, medians

The GET's bytes are thrown away; the Stream's go through the cache on the disk, in the order of training, are checked
and taken apart. The gateway shares the cores.
"""

import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from data_pipeline.remote import S3Storage
from data_pipeline.shards.tar import TarWriter
from data_pipeline.shards.verify import index
from data_pipeline.storage import open_storage
from data_pipeline.stream.cache import FOLDER
from data_pipeline.stream.reader import Stream
from tests.gateway import CREDENTIALS, start_gateway

SAMPLES, SHARDS, IMAGE_BYTES, ROUNDS, BATCH, WORKERS = 24_000, 24, 30_000, 7, 256, (1, 2)
stream: Stream


def upload(bucket: str, folder: Path) -> int:
    """-> bytes of the tars."""
    image = np.random.default_rng(0).bytes(IMAGE_BYTES)
    for shard in range(SHARDS):
        with (folder / f"{shard:05d}.tar").open("wb") as file:
            writer = TarWriter(file)
            for row in range(SAMPLES // SHARDS):
                writer.add(f"{row:09d}", [("jpg", image), ("txt", b"caption")])
            writer.close()
    index([str(folder)], workers=1)
    storage = open_storage(bucket)
    paths = sorted(path for path in folder.iterdir() if path.is_file())
    for path in paths:
        storage.put_file_if_absent(path.name, path)
    return sum(path.stat().st_size for path in paths if path.suffix == ".tar")


def by_stream(bucket: str, workers: int) -> tuple[float, float, int]:
    """One epoch through an empty cache, by so many data workers in turn -> seconds, CPU seconds, requests."""
    cache = tempfile.mkdtemp()
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(workers, context, open_worker, (bucket, cache)) as pool:
            before = dict(pool.map(used, [0.5] * workers))
            began = time.perf_counter()
            for _ in pool.map(read_batch, range(0, SAMPLES, BATCH)):
                pass
            took = time.perf_counter() - began
            after = dict(pool.map(used, [0.1] * 4 * workers))
    finally:
        shutil.rmtree(cache, ignore_errors=True)
    cpu, requests = (sum(after[pid][row] - before[pid][row] for pid in after) for row in (0, 1))
    return took, cpu, int(requests)


def open_worker(bucket: str, cache: str) -> None:
    global stream
    os.environ[FOLDER] = cache
    stream = Stream(bucket, seed=0)


def read_batch(start: int) -> int:
    return len(stream.read(start, min(start + BATCH, SAMPLES)))


def used(pause: float) -> tuple[int, tuple[float, int]]:
    """-> this worker and what it used: CPU seconds, requests."""
    time.sleep(pause)  # so that each of them answers
    storage = stream._storage
    assert isinstance(storage, S3Storage)
    return os.getpid(), (time.process_time(), storage.requests)


def by_get(bucket: str) -> tuple[float, float]:
    """Each tar by one streaming GET, one after another -> seconds, CPU seconds."""
    client = S3Storage(bucket).client
    name, _, prefix = bucket.removeprefix("s3://").partition("/")
    began, cpu = time.perf_counter(), time.process_time()
    for shard in range(SHARDS):
        body = client.get_object(Bucket=name, Key=f"{prefix}/{shard:05d}.tar")["Body"]
        for _ in body.iter_chunks(1 << 20):
            pass
    return time.perf_counter() - began, time.process_time() - cpu


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        gateway = start_gateway(Path(name) / "ceph")
        try:
            os.environ.update(CREDENTIALS, AWS_ENDPOINT_URL=gateway.endpoint)
            bucket, local = f"s3://{gateway.make_bucket()}/set", Path(name) / "local"
            local.mkdir()
            megabytes = upload(bucket, local) / 1e6
            rounds = [(by_get(bucket), *(by_stream(bucket, count) for count in WORKERS)) for _ in range(ROUNDS)]
        finally:
            gateway.stop()
    seconds, cpu = (statistics.median(get[row] for get, *_ in rounds) for row in (0, 1))
    print(f"one streaming GET     {megabytes / seconds:6.0f} MB/s, {1e6 * cpu / SAMPLES:.0f} CPU us a sample")
    for place, count in enumerate(WORKERS, 1):
        seconds, cpu, requests = (statistics.median(row[place][part] for row in rounds) for part in range(3))
        ratios = sorted(row[0][0] / row[place][0] for row in rounds)
        print(f"Stream, {count} process{'es' * (count > 1):2}   {megabytes / seconds:6.0f} MB/s, "
              f"{1e6 * cpu / SAMPLES:.0f} CPU us a sample, {1000 * requests / SAMPLES:.1f} requests per 1,000; ratio "
              f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}, {ROUNDS} rounds)")  # fmt: skip


if __name__ == "__main__":
    main()
