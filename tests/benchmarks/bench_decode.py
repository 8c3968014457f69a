"""Decode, scale and store an image, in thread CPU time: ours, exact and scaled, beside what img2dataset does.

python tests/benchmarks/bench_decode.py      1024 x 768 and 640 x 480 photographs to 256 pixels, JPEG quality 95

img2dataset 1.47 (resizer.py, keep_ratio): cv2.imdecode, INTER_AREA, imencode. The limit is libjpeg's decoding alone,
at the fraction that suffices. PSNR of scaled is taken beside exact, both before they are stored.
"""

import statistics
import time
from collections.abc import Callable

import cv2
import numpy as np
import simplejpeg

from data_pipeline.build.images import decode_rgb, encode, prepare
from data_pipeline.config import ImageRules

ROUNDS, IMAGES = 7, 40


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


def rate(work: Callable[[bytes], object], files: list[bytes]) -> float:
    start = time.thread_time()
    for data in files:
        work(data)
    return len(files) / (time.thread_time() - start)


def psnr(files: list[bytes]) -> float:
    errors = []
    for data in files:
        exact, scaled = (
            decode_rgb(prepare(data, ImageRules(mode="keep_ratio", size=256, format="png", decode=way)).data).astype(
                float
            )
            for way in ("exact", "scaled")
        )
        errors.append(np.mean((exact - scaled) ** 2))
    return float(10 * np.log10(255**2 / np.mean(errors)))


def main() -> None:
    cv2.setNumThreads(1)
    rules = {way: ImageRules(mode="keep_ratio", size=256, format="jpeg", decode=way) for way in ("exact", "scaled")}
    for width, height in ((1024, 768), (640, 480)):
        files = [photograph(width, height, seed) for seed in range(IMAGES)]
        works: dict[str, Callable[[bytes], object]] = {
            "img2dataset's path": theirs,
            "exact": lambda data: prepare(data, rules["exact"]),
            "scaled": lambda data: prepare(data, rules["scaled"]),
            "libjpeg alone": lambda data: simplejpeg.decode_jpeg(
                data, "RGB", min_height=256, min_width=256, min_factor=1
            ),
        }
        rounds = [{name: rate(work, files) for name, work in works.items()} for _ in range(ROUNDS)]
        for name in works:
            median = statistics.median(one[name] for one in rounds)
            ratio = statistics.median(one[name] / one["img2dataset's path"] for one in rounds)
            print(f"{width} x {height}  {name:18} {median:7.0f} images/s of CPU   ratio {ratio:.2f}")
        print(f"{width} x {height}  scaled beside exact: {psnr(files[:8]):.1f} dB")


if __name__ == "__main__":
    main()
