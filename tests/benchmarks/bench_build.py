"""A whole build over a local HTTP server beside img2dataset, alternating: rows a second, CPU a row, memory, account.

python tests/benchmarks/bench_build.py --peer .venv-peers/bin/python [--rows 2000] [--rounds 5]

Of the addresses 5 % are 404, 1 % cut short, 0.2 % stall and 0.1 % are decompression bombs, as in real lists. Both store
256 pixels on the shorter side as JPEG 95 with two workers, wait 2 s for an answer and ask once.
"""

import argparse
import json
import os
import resource
import statistics
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from data_pipeline.build.images import encode
from data_pipeline.shards.verify import verify

OURS = """
import sys
from data_pipeline.build.run import build
from data_pipeline.config import BuildConfig
from data_pipeline.settings import load_settings
build(load_settings(BuildConfig, sys.argv[1], sys.argv[2:]), progress=False)
"""
THEIRS = """
import sys
from img2dataset import download
download(url_list=sys.argv[1], output_folder=sys.argv[2], input_format="parquet", url_col="URL", caption_col="TEXT",
         output_format="webdataset", image_size=256, resize_mode="keep_ratio", resize_only_if_bigger=False,
         encode_quality=95, processes_count=2, thread_count=64, number_sample_per_shard=int(sys.argv[3]), timeout=2,
         retries=0, enable_wandb=False, disallowed_header_directives=[], incremental_mode="overwrite")
"""
REPOSITORY = Path(__file__).resolve().parents[2]
SHARD = 250


def bomb() -> bytes:
    """A PNG of 60,000 x 60,000 pixels in some hundred KB."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(50_000_000))) + chunk(b"IEND", b"")


def photographs(folder: Path, count: int = 50) -> None:
    """Smooth 1024 x 768 JPEGs with some grain, about 200 KB each."""
    y, x = np.mgrid[:768, :1024]
    for number in range(count):
        chance = np.random.default_rng(number)
        waves = [chance.uniform(20, 60) * np.sin(x / chance.uniform(9, 90) + y / chance.uniform(9, 90)) for _ in "rgb"]
        pixels = 128 + np.stack(waves, -1) + chance.normal(0, 6, (768, 1024, 1))
        (folder / f"{number}.jpg").write_bytes(encode(np.clip(pixels, 0, 255).astype(np.uint8), "jpeg", 90))
    (folder / "bomb.png").write_bytes(bomb())


def addresses(web: str, rows: int) -> list[str]:
    """By thousandths: 50 are 404, 10 cut, 2 stall, 1 is a bomb; spread evenly."""
    ways = ["/file/gone"] * 50 + ["/cut/1.jpg"] * 10 + ["/stall/x"] * 2 + ["/file/bomb.png"]
    order = np.random.default_rng(0).permutation(1000)
    place = {int(order[number]): way for number, way in enumerate(ways)}
    return [web + place.get(row % 1000, f"/file/{row % 50}.jpg") + f"?{row}" for row in range(rows)]


def run(command: list[str], env: dict[str, str]) -> tuple[float, float, float]:
    """-> (wall seconds, CPU seconds of it and all that it started, peak MB of its largest process)."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    subprocess.run(command, check=True, cwd=REPOSITORY, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wall, after = time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return wall, cpu, after.ru_maxrss / 1024


def our_build(folder: Path, number: int, rows: int, env: dict[str, str]) -> tuple[float, float, float, float]:
    tree = {
        "source": {"kind": "parquet", "path": f"{folder}/rows.parquet", "image": "URL", "captions": ["TEXT"]},
        "output": f"{folder}/ours{number}",
        "shard_size": SHARD,
        "images": {"mode": "keep_ratio", "size": 256, "format": "jpeg", "decode": "scaled"},
        "fetch": {"allow_networks": ["127.0.0.0/8"], "timeout_s": 2, "attempts": 1, "per_host": 64},
    }
    (folder / "ours.yaml").write_text(json.dumps(tree))
    measured = run([sys.executable, "-c", OURS, f"{folder}/ours.yaml"], env)
    verify(tree["output"])
    stats = json.loads(Path(tree["output"], "stats.json").read_text())
    return *measured, (stats["out"] + sum(stats["rejected"].values())) / rows


def their_build(
    folder: Path, number: int, rows: int, peer: str, env: dict[str, str]
) -> tuple[float, float, float, float]:
    output = folder / f"theirs{number}"
    measured = run([peer, "-c", THEIRS, f"{folder}/rows.parquet", str(output), str(SHARD)], env)
    accounted = sum(pq.read_metadata(path).num_rows for path in output.glob("*.parquet"))
    return *measured, accounted / rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", required=True, help="interpreter that has img2dataset")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    env = {**os.environ, "OMP_NUM_THREADS": "1", "NO_ALBUMENTATIONS_UPDATE": "1", "WANDB_MODE": "disabled"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "files").mkdir()
        photographs(folder / "files")
        command = [sys.executable, "-m", "tests.data_pipeline.web", str(folder / "files")]
        web = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
        try:
            assert web.stdout is not None
            write_rows(folder, addresses(web.stdout.readline().strip(), options.rows))
            rounds = [
                (our_build(folder, n, options.rows, env), their_build(folder, n, options.rows, options.peer, env))
                for n in range(options.rounds)
            ]
        finally:
            web.kill()
    report(rounds, options.rows)


def write_rows(folder: Path, urls: list[str]) -> None:
    import pyarrow as pa

    table = pa.table({"URL": urls, "TEXT": [f"picture {row}" for row in range(len(urls))]})
    pq.write_table(table, folder / "rows.parquet")


def report(rounds: list[tuple[tuple[float, ...], tuple[float, ...]]], rows: int) -> None:
    for title, column in (("tessera", 0), ("img2dataset", 1)):
        wall, cpu, peak, accounted = (
            statistics.median(values) for values in zip(*(r[column] for r in rounds), strict=True)
        )
        print(
            f"{title:12} {rows / wall:7.1f} rows/s   {1000 * cpu / rows:5.1f} ms of CPU a row   largest process "
            f"{peak:.0f} MB   {100 * accounted:.2f} % accounted for"
        )
    ratio = statistics.median(theirs[0] / ours[0] for ours, theirs in rounds)
    print(f"median ratio of rows a second {ratio:.2f}   ({len(rounds)} rounds)")


if __name__ == "__main__":
    main()
