"""What a build costs before it makes anything, and whether its memory grows with its rows.

python tests/benchmarks/bench_plan.py plan [--rows 100000000]   time and memory to plan a csv and a parquet
python tests/benchmarks/bench_plan.py memory [--rows 10000 100000] peak memory of a whole build of small images
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

REPOSITORY = Path(__file__).resolve().parents[2]
PLAN = """
import json, resource, sys, time
from data_pipeline.build.plan import make_plan
from data_pipeline.config import BuildConfig
from data_pipeline.settings import check_settings
start = time.monotonic()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
plan = make_plan(check_settings(BuildConfig, json.loads(sys.argv[1]), "bench"))
planned = time.monotonic() - start
start = time.monotonic()
last = [row.url for row in __import__("data_pipeline.build.sources", fromlist=["x"]).open_source(
    plan.config.source, plan.layout).rows(plan.rows - 1000, plan.rows)]
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(f"{plan.rows:,} rows planned in {planned:.1f} s, {(peak - before) / 1024:.0f} MB more than before; "
      f"the last shard's 1000 rows read in {time.monotonic() - start:.2f} s")
"""
BUILD = """
import sys
from data_pipeline.build.run import build
from data_pipeline.config import BuildConfig
from data_pipeline.settings import check_settings
source = dict(kind="scenes", count=int(sys.argv[1]), image_size=16)
build(check_settings(BuildConfig, dict(source=source, output=sys.argv[2], workers=2), "bench"), progress=False)
"""
BLOCK = 100_000


def write_tables(folder: Path, rows: int) -> None:
    """The same rows as csv and parquet, an address and a caption each."""
    schema = pa.schema([("URL", pa.string()), ("TEXT", pa.string())])
    with (folder / "x.csv").open("w") as text, pq.ParquetWriter(folder / "x.parquet", schema) as table:
        text.write("URL,TEXT\n")
        for start in range(0, rows, BLOCK):
            urls = [f"http://example.org/{row}.jpg" for row in range(start, min(start + BLOCK, rows))]
            text.write("".join(f"{url},a caption\n" for url in urls))
            table.write_table(pa.table({"URL": urls, "TEXT": ["a caption"] * len(urls)}, schema=schema))


def plan(rows: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        write_tables(Path(name), rows)
        for kind in ("parquet", "csv"):
            source = {"kind": kind, "path": f"{name}/x.{kind}", "image": "URL", "captions": ["TEXT"]}
            tree = json.dumps({"source": source, "output": f"{name}/out"})
            done = subprocess.run(
                [sys.executable, "-c", PLAN, tree], cwd=REPOSITORY, capture_output=True, text=True, check=True
            )
            print(f"{kind:8} {done.stdout.strip()}")


def resident_mb(pid: int) -> float:
    """Proportional memory of a process and all that it started; shared pages count once."""
    total = 0.0
    for one in [pid, *below(pid)]:
        try:
            lines = Path(f"/proc/{one}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += next((int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0) / 1024
    return total


def below(pid: int) -> list[int]:
    try:
        tasks = [task.read_text().split() for task in Path(f"/proc/{pid}/task").glob("*/children")]
    except OSError:
        return []
    children = [int(child) for task in tasks for child in task]
    return children + [grandchild for child in children for grandchild in below(child)]


def memory(counts: list[int]) -> None:
    for rows in counts:
        with tempfile.TemporaryDirectory() as name:
            start, peak, ended = time.monotonic(), 0.0, threading.Event()
            env = {**os.environ, "OMP_NUM_THREADS": "1"}
            build = subprocess.Popen([sys.executable, "-c", BUILD, str(rows), f"{name}/out"], cwd=REPOSITORY, env=env)
            while build.poll() is None:
                peak = max(peak, resident_mb(build.pid))
                ended.wait(0.5)
            print(f"{rows:,} rows: peak {peak:.0f} MB with Ray, {rows / (time.monotonic() - start):.0f} rows/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["plan", "memory"])
    parser.add_argument("--rows", type=int, nargs="+")
    options = parser.parse_args()
    if options.what == "plan":
        plan((options.rows or [100_000_000])[0])
    else:
        memory(options.rows or [10_000, 100_000])


if __name__ == "__main__":
    main()
