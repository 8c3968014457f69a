"""Decode, scale and store an image, in thread CPU time: ours, exact and scaled, beside what img2dataset does.

python -m tests.benchmarks.bench_decode [--peer .venv-peers/bin/python]     to 256 pixels, JPEG quality 95

img2dataset 1.47 (resizer.py, keep_ratio): cv2.imdecode, INTER_AREA, imencode at 4:2:0; ours stores 4:4:4. With --peer
its own Resizer runs too, in its interpreter. Limits: libjpeg's decoding alone, of the source as a whole and at the
fraction that suffices, and of a JPEG of 256 pixels. PSNR is that of scaled beside exact, before they are stored, of
drawn photographs here; of real ones see tests/data_pipeline/ingest/test_images.py.
"""

import argparse
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import simplejpeg

from data_pipeline.config import ImageRules
from data_pipeline.images import decode, decode_rgb, encode, prepare, resize

ROUNDS, IMAGES = 7, 12
SIZES = ((1600, 1200), (1024, 768), (640, 480))
PEER = """
import io, sys, time
from img2dataset.resizer import Resizer
work = Resizer(256, "keep_ratio", False, encode_quality=95)
for line in sys.stdin:
    files = [open(path, "rb").read() for path in line.split()]
    start = time.thread_time()
    assert all(work(io.BytesIO(data))[5] is None for data in files)
    print(len(files) / (time.thread_time() - start), flush=True)
"""


def photograph(width: int, height: int, seed: int) -> bytes:
    chance = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = [chance.uniform(20, 60) * np.sin(x / chance.uniform(9, 90) + y / chance.uniform(9, 90)) for _ in "rgb"]
    pixels = 128 + np.stack(waves, -1) + chance.normal(0, 6, (height, width, 1))
    return encode(np.clip(pixels, 0, 255).astype(np.uint8), "jpeg", 90)


def theirs(data: bytes) -> None:
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    height, width = pixels.shape[:2]
    scale = 256 / min(height, width)
    pixels = cv2.resize(pixels, (round(width * scale), round(height * scale)), interpolation=cv2.INTER_AREA)
    cv2.imencode(".jpg", pixels, [int(cv2.IMWRITE_JPEG_QUALITY), 95])


def pixels_of(data: bytes, rules: ImageRules) -> np.ndarray:
    """Decoded and scaled, not stored."""
    decoded = decode(data, rules.max_pixels, rules if rules.decode == "scaled" else None)
    return resize(decoded.pixels, rules.mode, 256, (decoded.width, decoded.height))


def works(width: int, height: int) -> dict[str, Callable[[bytes], object]]:
    """What is measured on sources of one size."""
    rules = {way: ImageRules(mode="keep_ratio", size=256, format="jpeg", decode=way) for way in ("exact", "scaled")}
    return {
        "img2dataset's path": theirs,
        "exact": lambda data: prepare(data, rules["exact"]),
        "scaled": lambda data: prepare(data, rules["scaled"]),
        "exact, not stored": lambda data: pixels_of(data, rules["exact"]),
        "scaled, not stored": lambda data: pixels_of(data, rules["scaled"]),
        "libjpeg, whole": lambda data: simplejpeg.decode_jpeg(data, "RGB"),
        "libjpeg, fraction": lambda data: decode(data, rules["scaled"].max_pixels, rules["scaled"]),
    }


def rate(work: Callable[[bytes], object], files: list[bytes]) -> float:
    """Images a second of this thread's CPU time."""
    start = time.thread_time()
    for data in files:
        work(data)
    return len(files) / (time.thread_time() - start)


def psnr(files: list[bytes]) -> float:
    """dB; infinite where nothing was scaled."""
    errors = []
    for data in files:
        exact, scaled = (
            decode_rgb(prepare(data, ImageRules(mode="keep_ratio", size=256, format="png", decode=way)).data).astype(
                float
            )
            for way in ("exact", "scaled")
        )
        errors.append(np.mean((exact - scaled) ** 2))
    return float(10 * np.log10(255**2 / np.mean(errors))) if any(errors) else float("inf")


def asked(peer: "subprocess.Popen[str]", paths: list[Path]) -> float:
    """The peer's rate over the same files."""
    assert peer.stdin is not None and peer.stdout is not None
    peer.stdin.write(" ".join(map(str, paths)) + "\n")
    peer.stdin.flush()
    return float(peer.stdout.readline())


def compare(folder: Path, peer: "subprocess.Popen[str] | None", width: int, height: int) -> None:
    files = [photograph(width, height, seed) for seed in range(IMAGES)]
    paths = [folder / f"{width}-{number}.jpg" for number in range(IMAGES)]
    for path, data in zip(paths, files, strict=True):
        path.write_bytes(data)
    rounds = []
    for _ in range(ROUNDS):
        one = {name: rate(work, files) for name, work in works(width, height).items()}
        rounds.append({**one, "img2dataset itself": asked(peer, paths)} if peer else one)
    base = "img2dataset itself" if peer else "img2dataset's path"
    for name in rounds[0]:
        median = statistics.median(one[name] for one in rounds)
        ratio = statistics.median(one[name] / one[base] for one in rounds)
        print(f"{width} x {height}  {name:19} {median:7.0f} images/s of CPU   ratio {ratio:.2f}")
    print(f"{width} x {height}  scaled beside exact: {psnr(files[:8]):.1f} dB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="interpreter that has img2dataset")
    options = parser.parse_args()
    cv2.setNumThreads(1)
    square = ImageRules(mode="center_crop", size=256, format="jpeg")
    small = [prepare(photograph(1024, 768, seed), square).data for seed in range(IMAGES)]
    limit = statistics.median(rate(simplejpeg.decode_jpeg, small) for _ in range(ROUNDS))
    print(f"256 x 256    libjpeg, whole      {limit:7.0f} images/s of CPU")
    peer = None
    if options.peer:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        peer = subprocess.Popen([options.peer, "-c", PEER], text=True, **pipes)
    with tempfile.TemporaryDirectory() as folder:
        for size in SIZES:
            compare(Path(folder), peer, *size)
    if peer is not None:
        peer.kill()


if __name__ == "__main__":
    main()
