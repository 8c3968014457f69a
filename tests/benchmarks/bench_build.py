"""A whole build over a local HTTP server beside img2dataset, alternating: images a second, CPU, memory, account.

python -m tests.benchmarks.bench_build --peer .venv-peers/bin/python [--rows 2000] [--rounds 5]

Of the addresses 5 % are 404, 1 % cut short, 0.2 % stall and 0.1 % are decompression bombs, as in real lists. Both store
256 pixels on the shorter side as JPEG 95 with two workers, wait 2 s for an answer and ask once.
"""

import argparse
import json
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from data_pipeline.images import encode
from data_pipeline.shards.verify import verify
from tests.benchmarks.processes import REPOSITORY, Cost, measure

OURS = """
import sys
from data_pipeline.ingest.run import build
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
         retries=0, enable_wandb=False, disallowed_header_directives=[], incremental_mode="incremental")
"""
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "NO_ALBUMENTATIONS_UPDATE": "1", "WANDB_MODE": "disabled"}
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


def our_build(folder: Path, number: int) -> tuple[Cost, int, int]:
    """-> what it cost, images stored, rows accounted for."""
    tree = {
        "source": {"kind": "parquet", "path": f"{folder}/rows.parquet", "image": "URL", "captions": ["TEXT"]},
        "output": f"{folder}/ours{number}",
        "shard_size": SHARD,
        "images": {"mode": "keep_ratio", "size": 256, "format": "jpeg", "decode": "scaled"},
        "fetch": {"allow_networks": ["127.0.0.0/8"], "timeout_s": 2, "attempts": 1, "per_host": 64},
    }
    (folder / "ours.yaml").write_text(json.dumps(tree))
    cost = measure([sys.executable, "-c", OURS, f"{folder}/ours.yaml"], **ENVIRONMENT)
    verify(tree["output"])
    stats = json.loads(Path(tree["output"], "stats.json").read_text())
    shutil.rmtree(tree["output"])
    return cost, stats["out"], stats["out"] + sum(stats["rejected"].values())


def their_build(folder: Path, number: int, peer: str) -> tuple[Cost, int, int]:
    """The same of img2dataset: a row is accounted for where a parquet of its output has it."""
    output = folder / f"theirs{number}"
    cost = measure([peer, "-c", THEIRS, f"{folder}/rows.parquet", str(output), str(SHARD)], **ENVIRONMENT)
    status = [name for path in output.glob("*.parquet") for name in pq.read_table(path).column("status").to_pylist()]
    shutil.rmtree(output)
    return cost, status.count("success"), len(status)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", required=True, help="interpreter that has img2dataset")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "files").mkdir()
        photographs(folder / "files")
        command = [sys.executable, "-m", "tests.data_pipeline.web", str(folder / "files")]
        web = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
        try:
            assert web.stdout is not None
            write_rows(folder, addresses(web.stdout.readline().strip(), options.rows))
            rounds = [(our_build(folder, n), their_build(folder, n, options.peer)) for n in range(options.rounds)]
        finally:
            web.kill()
    report(rounds, options.rows)


def write_rows(folder: Path, urls: list[str]) -> None:
    import pyarrow as pa

    table = pa.table({"URL": urls, "TEXT": [f"picture {row}" for row in range(len(urls))]})
    pq.write_table(table, folder / "rows.parquet")


def report(rounds: list[tuple[tuple[Cost, int, int], tuple[Cost, int, int]]], rows: int) -> None:
    for title, column in (("tessera", 0), ("img2dataset", 1)):
        costs = [one[column][0] for one in rounds]
        images = statistics.median(one[column][1] for one in rounds)
        accounted = min(one[column][2] for one in rounds)
        wall, cpu, peak = (
            statistics.median(getattr(c, name) for c in costs) for name in ("wall_s", "cpu_s", "peak_mb")
        )
        print(
            f"{title:12} {images / wall:6.1f} images/s  {1000 * cpu / images:5.1f} ms of CPU an image  peak {peak:.0f} "
            f"MB in all  {images:.0f} images, {100 * accounted / rows:.2f} % of the rows accounted for"
        )
    ratio = statistics.median((o[1] / o[0].wall_s) / (t[1] / t[0].wall_s) for o, t in rounds)
    print(f"median ratio of images a second {ratio:.2f}   ({len(rounds)} rounds of {rows} rows)")


if __name__ == "__main__":
    main()
