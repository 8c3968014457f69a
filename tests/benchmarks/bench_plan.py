"""What a build costs before it makes anything, and whether its memory grows with its rows.

python -m tests.benchmarks.bench_plan plan [--rows 100000000] [--rounds 5]
    time and memory to plan a csv and a parquet
python -m tests.benchmarks.bench_plan memory [--rows 10000 100000 1000000] [--rounds 1] [--kept 1.0]
    peak memory of a whole build of small images, all processes together, Ray's included; where --kept is below 1, a
    filter on a column refuses the others before they are decoded, so that ten million rows take minutes
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.images import encode
from tests.benchmarks.processes import REPOSITORY, Cost, measure

PLAN = """
import json, resource, sys, time
from data_pipeline.ingest.plan import make_plan
from data_pipeline.config import BuildConfig
from data_pipeline.settings import check_settings
start = time.monotonic()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
plan = make_plan(check_settings(BuildConfig, json.loads(sys.argv[1]), "bench"))
planned = time.monotonic() - start
start = time.monotonic()
last = [row.url for row in __import__("data_pipeline.ingest.sources", fromlist=["x"]).open_source(
    plan.config.source, plan.layout).rows(plan.rows - 1000, plan.rows)]
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps([planned, time.process_time(), (peak - before) / 1024, time.monotonic() - start]))
"""
BUILD = """
import sys
from data_pipeline.ingest.run import build
from data_pipeline.config import BuildConfig
from data_pipeline.settings import check_settings
source = dict(kind="parquet", path=sys.argv[1])
rules = dict(filters={"score": f"score < {sys.argv[3]}"})
build(check_settings(BuildConfig, dict(source=source, output=sys.argv[2], workers=2, **rules), "bench"), progress=False)
"""
BLOCK = 100_000
SHARD = 1000


def write_tables(folder: Path, rows: int) -> None:
    """The same rows as csv and parquet, an address and a caption each."""
    schema = pa.schema([("URL", pa.string()), ("TEXT", pa.string())])
    with (folder / "x.csv").open("w") as text, pq.ParquetWriter(folder / "x.parquet", schema) as table:
        text.write("URL,TEXT\n")
        for start in range(0, rows, BLOCK):
            urls = [f"http://example.org/{row}.jpg" for row in range(start, min(start + BLOCK, rows))]
            text.write("".join(f"{url},a caption\n" for url in urls))
            table.write_table(pa.table({"URL": urls, "TEXT": ["a caption"] * len(urls)}, schema=schema))


def plan(rows: int, rounds: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        write_tables(Path(name), rows)
        for kind in ("parquet", "csv"):
            source = {"kind": kind, "path": f"{name}/x.{kind}", "image": "URL", "captions": ["TEXT"]}
            command = [sys.executable, "-c", PLAN, json.dumps({"source": source, "output": f"{name}/out"})]
            found = []
            for _ in range(rounds):
                done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
                found.append(json.loads(done.stdout))
                print(f"{kind:8} {found[-1]}", flush=True)
            planned, cpu, more, last = (statistics.median(one[place] for one in found) for place in range(4))
            print(
                f"{kind:8} {rows:,} rows planned in {planned:.1f} s, {cpu:.1f} s of CPU in all, {more:.0f} MB more "
                f"than before; the last 1000 rows read in {last:.2f} s (medians of {rounds})"
            )


def write_images(path: Path, rows: int) -> None:
    """Small JPEGs in the table itself, in row groups as such files have them; every tenth is no image."""
    chance = np.random.default_rng(0)
    images = [encode(chance.integers(0, 256, (16, 16, 3), dtype=np.uint8), "jpeg", 90) for _ in range(100)]
    images[::10] = [b"<html>"] * 10
    schema = pa.schema([("image", pa.binary()), ("caption", pa.string()), ("score", pa.float64())])
    with pq.ParquetWriter(path, schema) as table:
        for start in range(0, rows, SHARD):
            numbers = range(start, min(start + SHARD, rows))
            part = {"image": [images[n % 100] for n in numbers], "caption": [f"picture number {n}" for n in numbers]}
            part["score"] = list(chance.random(len(numbers)))
            table.write_table(pa.table(part, schema=schema))


def memory(counts: list[int], rounds: int, kept: float) -> None:
    costs: dict[int, list[Cost]] = {rows: [] for rows in counts}
    with tempfile.TemporaryDirectory() as name:
        for rows in counts:
            write_images(Path(name, f"{rows}.parquet"), rows)
        for _ in range(rounds):
            for rows in counts:
                command = [sys.executable, "-c", BUILD, f"{name}/{rows}.parquet", f"{name}/out", str(kept)]
                costs[rows].append(measure(command, timeout_s=3000, OMP_NUM_THREADS="1"))
                shutil.rmtree(f"{name}/out")
    for rows, found in costs.items():
        wall, cpu, peak = (statistics.median(getattr(c, at) for c in found) for at in ("wall_s", "cpu_s", "peak_mb"))
        print(
            f"{rows:,} rows: peak {peak:.0f} MB in all, {rows / wall:.0f} rows/s, {1000 * cpu / rows:.2f} ms CPU a row"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["plan", "memory"])
    parser.add_argument("--rows", type=int, nargs="+")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--kept", type=float, default=1.0)
    options = parser.parse_args()
    if options.what == "plan":
        plan((options.rows or [100_000_000])[0], options.rounds)
    else:
        memory(options.rows or [10_000, 100_000, 1_000_000], options.rounds, options.kept)


if __name__ == "__main__":
    main()
