"""A dataset read from S3 in the order of training, beside one streaming GET of the same bytes: rate and requests.

python tests/benchmarks/bench_s3.py            a gateway of its own on loopback; alternating, medians
"""

import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from data_pipeline.remote import S3Storage
from data_pipeline.shards.tar import TarWriter
from data_pipeline.shards.verify import index
from data_pipeline.storage import open_storage
from data_pipeline.stream.cache import FOLDER
from data_pipeline.stream.reader import Stream
from tests.gateway import CREDENTIALS, start_gateway

SAMPLES, SHARDS, IMAGE_BYTES, ROUNDS, BATCH = 12_000, 12, 30_000, 5, 256


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


def by_stream(bucket: str) -> tuple[float, float, int]:
    """One epoch through an empty cache -> seconds, CPU seconds, requests."""
    with tempfile.TemporaryDirectory() as cache:
        os.environ[FOLDER] = cache
        stream = Stream(bucket, seed=0)
        began, cpu = time.perf_counter(), time.process_time()
        for start in range(0, SAMPLES, BATCH):
            stream.read(start, min(start + BATCH, SAMPLES))
        storage = stream._storage
        assert isinstance(storage, S3Storage)
        return time.perf_counter() - began, time.process_time() - cpu, storage.requests


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
            rounds = [(by_stream(bucket), by_get(bucket)) for _ in range(ROUNDS)]
        finally:
            gateway.stop()
    stream, get = (statistics.median(row[side][0] for row in rounds) for side in (0, 1))
    cpu, peer_cpu = (statistics.median(row[side][1] for row in rounds) for side in (0, 1))
    ratio = statistics.median(get_row[0] / stream_row[0] for stream_row, get_row in rounds)
    print(f"Stream over S3   {megabytes / stream:6.0f} MB/s, {1e3 * cpu / SAMPLES:.3f} CPU ms a sample, "
          f"{1000 * rounds[0][0][2] / SAMPLES:.1f} requests per 1,000 samples")  # fmt: skip
    print(f"streaming GET    {megabytes / get:6.0f} MB/s, {1e3 * peer_cpu / SAMPLES:.3f} CPU ms a sample")
    print(f"median ratio     {ratio:.2f}   ({ROUNDS} rounds, {megabytes:.0f} MB)")


if __name__ == "__main__":
    main()
