"""What a command costs with everything that it starts, Ray's processes included: wall and CPU seconds, peak memory."""

import os
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]

_INTERVAL_S = 0.25
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Cost:
    """peak_mb: the most that all processes held together at one time, shared pages counted once (PSS)."""

    wall_s: float
    cpu_s: float
    peak_mb: float


def measure(command: list[str], timeout_s: float = 600, **env: str) -> Cost:
    """Run it in the repository. CPU seconds are those of the processes when they were seen last, so slightly less."""
    start, peak, cpu = time.monotonic(), 0.0, dict[tuple[int, int], float]()
    with tempfile.TemporaryFile() as log:
        child = subprocess.Popen(command, cwd=REPOSITORY, env={**os.environ, **env}, stdout=log, stderr=log)
        while child.poll() is None:
            pids = [child.pid, *below(child.pid)]
            cpu |= dict(filter(None, (cpu_seconds(pid) for pid in pids)))
            peak = max(peak, sum(proportional_mb(pid) for pid in pids))
            if time.monotonic() - start > timeout_s:
                child.kill()
            time.sleep(_INTERVAL_S)
        wall = time.monotonic() - start
        if child.returncode:
            log.seek(0)
            raise SystemExit(f"{command}: left with {child.returncode}\n{log.read().decode()[-3000:]}")
    return Cost(wall, sum(cpu.values()), peak)


def below(pid: int) -> list[int]:
    """The processes that a process started, and those that they did."""
    try:
        tasks = [task.read_text().split() for task in Path(f"/proc/{pid}/task").glob("*/children")]
    except OSError:
        return []
    children = [int(child) for task in tasks for child in task]
    return children + [grandchild for child in children for grandchild in below(child)]


def cpu_seconds(pid: int) -> tuple[tuple[int, int], float] | None:
    """-> ((process, when it started), its CPU seconds); None where it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return (pid, int(fields[19])), (int(fields[11]) + int(fields[12])) / _TICKS


def proportional_mb(pid: int) -> float:
    """Memory of a process, each shared page divided by the number of those that share it."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0) / 1024
