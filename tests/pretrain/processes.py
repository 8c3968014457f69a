"""Start the ranks of a test as real processes on this machine, and read what each says."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from launchers.local import free_port

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 400
RUNNER = """
import os, runpy, sys
del sys.argv[0]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
sys.stdout.flush()
sys.stdin.read()
os._exit(0)
"""
"""A rank that said its result leaves at once, rank 0, whose store the others use, after them: on a busy machine the end
of torch's own threads aborts now and then.
"""


def run_ranks(
    script: Path, arguments: Sequence[str], world: int, timeout_s: int = TIMEOUT_S, **environment: str
) -> list[dict[str, Any]]:
    """Run `script` as `world` ranks -> the JSON object in each one's last line of output; fails when one fails."""
    with start_ranks(script, arguments, world, **environment) as processes:
        outputs = [process.communicate(timeout=timeout_s)[0] for process in reversed(processes)][::-1]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output[-3000:]
    return [json.loads(output.splitlines()[-1]) for output in outputs]


@contextlib.contextmanager
def start_ranks(
    script: Path, arguments: Sequence[str], world: int, **environment: str
) -> "Iterator[list[subprocess.Popen[str]]]":
    """`script` as `world` ranks, which are killed in the end."""
    port = str(free_port())
    processes = [_start(script, arguments, rank, world, port, environment) for rank in range(world)]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait(timeout=30)


def _start(
    script: Path, arguments: Sequence[str], rank: int, world: int, port: str, environment: dict[str, str]
) -> "subprocess.Popen[str]":
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    extra = {name: str(value) for name, value in ranks.items()}
    path = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    return subprocess.Popen(
        [sys.executable, "-c", RUNNER, str(script), *arguments],
        env=os.environ | extra | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path} | environment,
        stdin=subprocess.DEVNULL if rank else subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
