"""A dataset behind S3 or http is the dataset on the disk: same samples, bounded time and memory, faults or not."""

import collections
import multiprocessing
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import numpy as np
import pytest

from data_pipeline import remote
from data_pipeline.errors import DataError
from data_pipeline.shards.tar import TarWriter
from data_pipeline.shards.verify import index, verify
from data_pipeline.storage import open_storage
from data_pipeline.stream import cache
from data_pipeline.stream.order import Geometry
from data_pipeline.stream.reader import Stream
from launchers.chaos.proxy import CLEAN, fault_proxy

pytestmark = [pytest.mark.real, pytest.mark.slow]
SAMPLES, SHARDS = 600, 6
GEOMETRY = Geometry(lanes=4, block=8, window=4)


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """600 samples of 1 to 40 KB in 6 tars, indexed."""
    folder = tmp_path_factory.mktemp("local")
    rng = np.random.default_rng(0)
    for shard in range(SHARDS):
        with (folder / f"{shard:05d}.tar").open("wb") as file:
            writer = TarWriter(file)
            for row in range(SAMPLES // SHARDS):
                number = shard * (SAMPLES // SHARDS) + row
                writer.add(f"{number:09d}", [("jpg", rng.bytes(1000 + rng.integers(39_000))), ("txt", b"%d" % number)])
            writer.close()
    index([str(folder)], workers=1)
    return folder


@pytest.fixture
def uploaded(local, bucket, tmp_path, monkeypatch):
    """The same dataset in a bucket -> its address; the cache is in a folder of the test."""
    storage = open_storage(f"{bucket}/set")
    for path in sorted(local.iterdir()):
        assert storage.put_file_if_absent(path.name, path)
    monkeypatch.setenv(cache.FOLDER, str(tmp_path / "cache"))
    return storage.root


def contents(samples):
    return [(sample.position, sample.id, sample.key, sample.image, sample.texts) for sample in samples]


def sequence(dataset, steps=20, size=32, start=100):
    batches = Stream(dataset, seed=3, geometry=GEOMETRY).batches(start, size)
    return [contents(next(batches)) for _ in range(steps)]


def read_in_worker(arguments):
    dataset, start = arguments
    return contents(Stream(dataset, seed=3, geometry=GEOMETRY).read(start, start + 32))


def read_with(stream_and_start):
    stream, start = stream_and_start
    return contents(stream.read(start, start + 32))


def test_what_s3_gives_is_what_the_disk_gives(local, uploaded):
    assert sequence(uploaded) == sequence(local)
    assert verify(uploaded)["fingerprint"] == verify(local)["fingerprint"]


def test_an_epoch_costs_every_byte_once_and_few_requests(local, uploaded):
    stream = Stream(uploaded, seed=3, geometry=GEOMETRY)
    before = stream._storage.received
    batches = stream.batches(0, 50)
    for _ in range(SAMPLES // 50):
        next(batches)
    tars = sum(path.stat().st_size for path in local.glob("*.tar"))
    indices = sum(path.stat().st_size for path in local.glob("*.idx"))
    assert stream._storage.received - before <= tars + indices
    assert stream._storage.requests < 60
    again = Stream(uploaded, seed=4, geometry=GEOMETRY)
    before = again._storage.received
    again.read(0, SAMPLES)
    assert again._storage.received - before == indices, "the second run finds its blocks on the disk"


def test_spawned_workers_share_the_cache_and_read_the_same(local, uploaded):
    stream = Stream(uploaded, seed=3, geometry=GEOMETRY)
    stream.read(0, 8)  # connections and threads are open: they must not travel
    starts = [0, 32, 64, 96]
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        assert list(pool.map(read_with, [(stream, start) for start in starts])) == [
            read_in_worker((local, start)) for start in starts
        ]


def received_by_worker(arguments):
    stream, starts = arguments
    before = stream._storage.received
    for start in starts:
        stream.read(start, start + 8)
    return stream._storage.received - before


def test_workers_that_read_at_the_same_time_fetch_every_byte_once(local, uploaded):
    stream = Stream(uploaded, seed=3, geometry=GEOMETRY)
    with ProcessPoolExecutor(3, multiprocessing.get_context("spawn")) as pool:
        jobs = [(stream, range(8 * worker, SAMPLES, 24)) for worker in range(3)]
        received = sum(pool.map(received_by_worker, jobs))
    tars, indices = (sum(path.stat().st_size for path in local.glob(f"*.{kind}")) for kind in ("tar", "idx"))
    assert received <= tars + 3 * indices, "each worker reads each index once"


HOLDER = (
    "import fcntl, sys, time; fcntl.flock(file := open(sys.argv[1]), fcntl.LOCK_EX); print(flush=True); time.sleep(600)"
)


@pytest.mark.parametrize("fate", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lock_of_a_process_that_fetches_no_more_is_not_waited_for(local, uploaded, tmp_path, monkeypatch, fate):
    monkeypatch.setattr(cache, "PATIENCE_S", 1.0)
    stream = Stream(uploaded, seed=3, geometry=GEOMETRY)
    with stream._cache._claim(("00000.tar", 0), patient=True) as ours:
        assert ours
    [lock] = (tmp_path / "cache").glob("*/*.lock")
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, lock], stdout=subprocess.PIPE)
    try:
        assert holder.stdout.read(1)
        with stream._cache._claim(("00000.tar", 1), patient=False) as ours:
            assert not ours
        holder.send_signal(fate)
        began = time.monotonic()
        assert contents(stream.read(0, 96)) == contents(Stream(local, seed=3, geometry=GEOMETRY).read(0, 96))
        assert time.monotonic() - began < 200
    finally:
        holder.kill()
        holder.wait(timeout=10)


def test_a_forked_worker_opens_its_own_connections(local, uploaded):
    stream = Stream(uploaded, seed=3, geometry=GEOMETRY)
    stream.read(0, 32)
    receiver, sender = multiprocessing.Pipe(duplex=False)
    child = os.fork()
    if child == 0:
        sender.send(contents(stream.read(320, 352)))
        os._exit(0)
    try:
        assert receiver.poll(60), "the child hangs"
        assert receiver.recv() == read_in_worker((local, 320))
    finally:
        os.waitpid(child, 0)


def test_threads_read_one_stream_at_once(local, uploaded):
    for dataset in (local, uploaded):
        stream = Stream(dataset, seed=3, geometry=GEOMETRY)
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(read_with, [(stream, start) for start in range(0, 640, 32)]))
        assert found == [read_in_worker((local, start)) for start in range(0, 640, 32)]


def test_without_a_named_folder_the_cache_goes_with_the_stream(local, uploaded, monkeypatch):
    monkeypatch.delenv(cache.FOLDER)
    stream = Stream(uploaded, seed=3)
    stream.read(0, 32)
    folder = stream._cache.folder
    assert any(folder.glob("*/*"))
    pickle.loads(pickle.dumps(stream)).read(0, 1)
    assert folder.is_dir(), "a copy does not take the folder away"
    del stream
    assert not folder.exists()


def test_the_cache_keeps_to_its_limit_and_the_samples_do_not_change(local, uploaded, monkeypatch, tmp_path):
    limit = 12 * (cache.BLOCK_BYTES + 8)
    stream = Stream(uploaded, seed=3, geometry=GEOMETRY)
    stream._cache.limit = limit
    most = 0
    for start in range(0, 960, 32):
        assert contents(stream.read(start, start + 32)) == read_in_worker((local, start))
        most = max(most, sum(path.stat().st_size for path in (tmp_path / "cache").glob("*/*")))
    assert most <= limit + remote.CONNECTIONS * cache.BLOCK_BYTES


def test_a_damaged_block_in_the_cache_is_fetched_again(local, uploaded, tmp_path):
    expected = read_in_worker((local, 0))
    assert read_in_worker((uploaded, 0)) == expected
    blocks = [path for path in (tmp_path / "cache").glob("*/*") if path.suffix != ".lock"]
    for number, path in enumerate(blocks):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data[: len(data) // (1 + number % 2)])
    assert read_in_worker((uploaded, 0)) == expected


# ------------------------------------------------------------------------------------------- faults


KINDS = [("delay", 0.2), ("trickle", 0.002), ("refuse", 0), ("503", 0), ("cut", 60_000), ("short", 70_000),
         ("stall", 50_000), ("cut", 300), ("short", 0)]  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
def test_faults_in_front_of_the_gateway_change_no_sample(local, uploaded, gateway, monkeypatch, seed):
    monkeypatch.setattr(remote, "STALL_S", 0.4)
    draw, lock = random.Random(seed), threading.Lock()

    def script(number, line):
        with lock:
            return draw.choice(KINDS) if draw.random() < 0.4 else CLEAN

    began = time.monotonic()
    with fault_proxy(gateway.port, script) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
        assert sequence(uploaded, steps=25) == sequence(local, steps=25)
        assert sum(proxy.happened.values()) - proxy.happened["clean"] >= 5
    assert time.monotonic() - began < 200


@pytest.mark.parametrize("fault", [("refuse", 0), ("503", 0), ("stall", 400), ("cut", 400)], ids=lambda f: f[0])
def test_a_gateway_that_stays_broken_ends_the_reading_naming_object_and_range(uploaded, gateway, monkeypatch, fault):
    monkeypatch.setattr(remote, "STALL_S", 0.4)
    monkeypatch.setattr(remote, "PATIENCE_S", 5.0)  # as long may the answers for other objects take
    broken = lambda number, line: fault if "00003.tar?" in line or "00003.tar " in line else CLEAN  # noqa: E731
    with fault_proxy(gateway.port, broken) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
        began = time.monotonic()
        with pytest.raises(DataError, match=r"s3://.*/set/00003\.tar bytes \d+\.\.\d+: given up after"):
            Stream(uploaded, seed=3).read(0, SAMPLES)
        assert time.monotonic() - began < 200


def test_an_object_that_goes_away_or_is_replaced_while_reading_is_named(local, uploaded):
    storage = open_storage(uploaded)
    stream = Stream(uploaded, seed=3, geometry=GEOMETRY)
    stream.read(0, 8)
    for name in [path.name for path in local.glob("*.tar")]:
        storage.replace(name, storage.get(name)[::-1])
    with pytest.raises(DataError, match=r"0000\d\.tar: replaced while read|does not match its index"):
        stream.read(8, SAMPLES)
    for name in [path.name for path in local.glob("*.tar")]:
        storage.remove(name)
    with pytest.raises(DataError, match=r"0000\d\.tar: not found"):
        Stream(uploaded, seed=5, geometry=GEOMETRY)._cache.get_ranges([("00001.tar", 0, 3_000_000)])


def test_memory_does_not_grow_with_what_is_read_ahead(local, uploaded, monkeypatch):
    held = collections.Counter()
    original = remote.S3Storage.stream

    def counting(self, *arguments):
        held["now"] += 1
        held["most"] = max(held["most"], held["now"])
        try:
            yield from original(self, *arguments)
        finally:
            held["now"] -= 1

    monkeypatch.setattr(remote.S3Storage, "stream", counting)
    sequence(uploaded, steps=12)
    assert held["most"] <= 2 * remote.CONNECTIONS, "GETs at once, each holding a block and a piece"
