"""Samples read per second of CPU, beside webdataset (and mosaicml-streaming, Energon where they import), one thread.

python tests/benchmarks/bench_reader.py            the same samples, in the page cache, alternating, medians
python tests/benchmarks/bench_reader.py huge       the first batch at the middle of 10^9 samples, and what it takes

raw: 30 KB images with .txt and .json. decode: 640 x 480 JPEG, decoded and cropped to 224. codes: 256 codes a sample
against decoding the JPEG. CPU seconds are the thread's; bytes a second are those of the samples.
"""

import io
import json
import multiprocessing
import os
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import webdataset
from PIL import Image

from data_pipeline.images import decode_rgb
from data_pipeline.shards.codes import codes_name, meta_name
from data_pipeline.shards.manifest import Manifest, Shard, canonical_json, read_manifest
from data_pipeline.shards.tar import TarWriter
from data_pipeline.shards.verify import index
from data_pipeline.storage import open_storage
from data_pipeline.stream.reader import Stream

SAMPLES, SHARDS, IMAGE_BYTES, ROUNDS, BATCH = 20_000, 20, 30_000, 7, 256
HUGE_SHARDS, HUGE_ROWS, LINKS = 100_000, 10_000, 50_000
TOKENIZER = "0123456789ab"
Work = Callable[[], int]


def write_tars(folder: Path, image: bytes, samples: int = SAMPLES, shards: int = SHARDS) -> list[str]:
    """Shards of equal images -> their paths."""
    for shard in range(shards):
        with (folder / f"{shard:05d}.tar").open("wb") as file:
            writer = TarWriter(file)
            for row in range(samples // shards):
                text = f"caption {row}"
                parts = [("jpg", image), ("txt", text.encode()), ("json", f'{{"captions": ["{text}"]}}'.encode())]
                writer.add(f"{row:09d}", parts)
            writer.close()
    index([str(folder)], workers=1)
    return sorted(str(path) for path in folder.glob("*.tar"))


def write_codes(folder: Path) -> None:
    """256 codes a sample beside the shards."""
    manifest = read_manifest(open_storage(folder))
    entries = []
    for shard in manifest.shards:
        name = codes_name(shard.name, TOKENIZER)
        (folder / name).write_bytes(np.zeros((shard.n, 256), "<u2").tobytes())
        entries.append({"name": name, "bytes": 512 * shard.n, "digest": ""})
    meta = {"dataset": manifest.fingerprint, "codes_per_image": 256, "codebook_size": 16, "shards": entries}
    (folder / meta_name(TOKENIZER)).write_bytes(canonical_json(meta))


def photo() -> bytes:
    """A smooth 640 x 480 JPEG with some texture, about 60 KB."""
    rng = np.random.default_rng(0)
    pixels = cv2.resize(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8), (640, 480), interpolation=cv2.INTER_CUBIC)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "jpeg", quality=92)
    return file.getvalue()


def crop(pixels: np.ndarray) -> np.ndarray:
    """The centre square, 224 x 224."""
    side = min(pixels.shape[:2])
    top, left = (pixels.shape[0] - side) // 2, (pixels.shape[1] - side) // 2
    return cv2.resize(pixels[top : top + side, left : left + side], (224, 224), interpolation=cv2.INTER_AREA)


# ------------------------------------------------------------------------------------------------- works


def ours(folder: Path, decode: bool = False) -> Work:
    def work() -> int:
        stream, count = Stream(folder, seed=0), 0
        for start in range(0, stream.samples, BATCH):
            for sample in stream.read(start, start + BATCH):
                count += 1 if not decode or crop(decode_rgb(sample.image)).size else 0
        return count

    return work


def theirs(urls: list[str], decode: bool = False) -> Work:
    def work() -> int:
        dataset = webdataset.WebDataset(urls, shardshuffle=False)
        if decode:
            dataset = dataset.decode("rgb8").map(lambda sample: crop(sample["jpg"]))
        return sum(1 for _ in dataset)

    return work


def codes(folder: Path) -> Work:
    """Codes by position, from the side-cars alone."""

    def work() -> int:
        stream, count = Stream(folder, seed=0, codes=TOKENIZER), 0
        for start in range(0, stream.samples, BATCH):
            count += len(stream.read_codes(start, start + BATCH))
        return count

    return work


def mosaic(folder: Path, image: bytes) -> Work | None:
    """The same samples as MDS, in the order of the file; None where the package does not import."""
    try:
        from streaming import MDSWriter, StreamingDataset
    except Exception:
        return None
    target = folder / "mds"
    with MDSWriter(out=str(target), columns={"jpg": "bytes", "txt": "str", "json": "json"}) as writer:
        for row in range(SAMPLES):
            writer.write({"jpg": image, "txt": f"caption {row}", "json": {"captions": [f"caption {row}"]}})
    dataset = StreamingDataset(local=str(target), shuffle=True, batch_size=BATCH)
    return lambda: sum(1 for number in range(len(dataset)) if dataset[number])


def energon(folder: Path) -> Work | None:
    """Energon's own sequential reader of an indexed tar; None where the package does not import."""
    try:
        from megatron.energon.flavors.webdataset.itar import open_itar
    except Exception:
        return None

    def work() -> int:
        count = 0
        for path in sorted(folder.glob("*.tar")):
            with open_itar(str(path)) as tar:
                for member in tar:
                    if member.name.endswith(".jpg"):
                        count += 1
                    tar.extractfile(member).read()
        return count

    return work


# ------------------------------------------------------------------------------------------------ figures


def rate(work: Work) -> float:
    """Samples per second of this thread's CPU."""
    start = time.thread_time()
    count = work()
    return count / (time.thread_time() - start)


def compare(title: str, work: Work, peers: dict[str, Work | None], rounds: int = ROUNDS) -> None:
    """Alternating rounds; the median ratio against each peer; memory in a process of its own."""
    there = {name: peer for name, peer in peers.items() if peer is not None}
    rows = [(rate(work), {name: rate(peer) for name, peer in there.items()}) for _ in range(rounds)]
    print(f"{title:8} {'Stream':18} {told([row[0] for row in rows])}, {memory(work):4.0f} MiB")
    for name, peer in there.items():
        ratios = sorted(row[0] / row[1][name] for row in rows)
        print(f"{'':8} {name:18} {told([row[1][name] for row in rows])}, {memory(peer):4.0f} MiB"
              f"   ratio {statistics.median(ratios):.2f}   ({ratios[0]:.2f} to {ratios[-1]:.2f}, {rounds} rounds)",
              flush=True)  # fmt: skip


def told(rates: list[float]) -> str:
    found = statistics.median(rates)
    return f"{found:9,.0f}/s, {1e6 / found:7.1f} CPU us a sample"


def memory(work: Work) -> float:
    """MiB that a forked process needs more at its peak."""
    receiver, sender = multiprocessing.Pipe(duplex=False)

    def measure() -> None:
        before = peak_mib()
        work()
        sender.send(peak_mib() - before)

    process = multiprocessing.get_context("fork").Process(target=measure)
    process.start()
    try:
        return receiver.recv() if receiver.poll(120) else float("nan")
    finally:
        process.kill()
        process.join()


def side_by_side() -> None:
    cv2.setNumThreads(1)  # another thread's work would not be counted
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        image = np.random.default_rng(0).bytes(IMAGE_BYTES)
        urls = write_tars(folder, image)
        compare("raw", ours(folder), {
            "webdataset": theirs(urls), "mosaicml-streaming": mosaic(folder, image), "energon (itar)": energon(folder),
        })  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        urls = write_tars(folder, photo(), samples=400, shards=2)
        write_codes(folder)
        compare("decode", ours(folder, decode=True), {"webdataset": theirs(urls, decode=True)}, rounds=5)
        compare("codes", codes(folder), {"ours, decoding": ours(folder, decode=True)}, rounds=5)


# --------------------------------------------------------------------------------------------- huge epochs


def huge() -> None:
    """Epochs of 10^6 and 10^9 samples, all of whose shards are links to a few tars of 10,000 small samples."""
    for shards in (HUGE_SHARDS // 1000, HUGE_SHARDS):
        with tempfile.TemporaryDirectory() as name, ProcessPoolExecutor(1) as process:
            link_shards(Path(name), shards)
            print(process.submit(middle, name).result())


def link_shards(folder: Path, count: int) -> None:
    write_tars(folder, b"x" * 200, samples=HUGE_ROWS, shards=1)
    [shard] = read_manifest(open_storage(folder)).shards
    tar, idx = folder / shard.name, folder / f"{shard.name}.idx"
    names = [f"{number:06d}.tar" for number in range(count)]
    for number, entry in enumerate(names):
        if number % LINKS == LINKS - 1:  # a file has so many names
            tar, idx = (Path(shutil.copy(path, folder / f".{number}{path.suffix}")) for path in (tar, idx))
        os.link(tar, folder / entry)
        os.link(idx, folder / f"{entry}.idx")
    shards = tuple(Shard(entry, shard.n, shard.bytes, shard.digest) for entry in names)
    (folder / "manifest.json").write_bytes(Manifest(shards).to_json())


def middle(folder: str) -> str:
    """The first batch at the middle of an epoch, in a process that has read nothing yet."""
    before = peak_mib()
    began = time.perf_counter()
    stream = Stream(folder, seed=1)
    opened, held = time.perf_counter() - began, peak_mib() - before
    batch = stream.read(stream.samples // 2, stream.samples // 2 + BATCH)
    took = time.perf_counter() - began
    for start in range(0, 40 * BATCH, BATCH):
        stream.read(start, start + BATCH)
    return (f"{stream.samples:13,} samples: {len(batch)} of the middle after {took:.2f} s, {opened:.2f} s of them to "
            f"open; state {len(json.dumps(stream.state(1)))} bytes; {held:.0f} MiB to open, "
            f"{peak_mib() - before:.0f} MiB after 10,240 more")  # fmt: skip


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    huge() if sys.argv[1:] == ["huge"] else side_by_side()
