"""A run's human-readable outputs: metrics.jsonl, system-NODE.jsonl and samples/, which are also sent to MLflow."""

import json
import os
import re
import resource
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import psutil
from PIL import Image
from torch import Tensor

from data_pipeline.errors import storage_errors
from data_pipeline.outputs import write_whole
from pretrain.config import FINGERPRINTS, RunConfig
from pretrain.runtime.goodput import ATTEMPTS, METRICS, append_line, raw_lines_back
from pretrain.runtime.mlflow_feed import CLOSE_TIMEOUT_S, SYSTEM, MlflowFeed, replace_file
from pretrain.runtime.show import ProgressLine, png, save_grid

FIRST_INTERVAL_S = 3.0
SYSTEM_INTERVAL_S = 10.0


class Writer:
    """Writes rank 0's metrics, pictures and progress lines, and feeds MLflow."""

    def __init__(
        self,
        config: RunConfig,
        attempt: int,
        step: int,
        world: int,
        fingerprints: Mapping[str, str] | None = None,
        changes: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """fingerprints: of the run's dependencies. changes: settings changed by this attempt, {"from", "to"} by key."""
        self.config = config
        self.attempt = attempt
        self.folder = Path(config.run)
        with storage_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        tree = config.model_dump(mode="json") | ({FINGERPRINTS: dict(fingerprints)} if fingerprints else {})
        replace_file(self.folder / "config.json", json.dumps(tree, indent=1, ensure_ascii=False) + "\n")
        self.metrics = MetricsLog(self.folder)
        self.stepped_s = 0.0
        line: dict[str, Any] = {"attempt": attempt, "from_step": step, "world": world, "time": time.time()}
        line |= {"changes": dict(changes)} if changes else {}
        line |= {"started": psutil.Process().create_time(), "metrics_at": (self.folder / METRICS).stat().st_size}
        append_line(self.folder / ATTEMPTS, line)
        self.progress = ProgressLine(config.train.steps, step, config.train.log_every_steps)
        self.mlflow = MlflowFeed(self.folder, config) if config.tracking.uri else None
        if self.mlflow:
            self.mlflow.start()
        self.say(f"{config.model.kind}: steps {step} to {config.train.steps}, {world} processes, attempt {attempt}")
        for key, change in (changes or {}).items():
            self.say(f"from step {step} on {key}={change['to']}, was {change['from']}")

    def step(
        self,
        step: int,
        positions: tuple[int, int],
        means: dict[str, float],
        seconds: dict[str, float],
        told: dict[str, str],
    ) -> None:
        """Write one line of metrics.jsonl: metrics, times, and the guards' decision `told`; print progress."""
        row: dict[str, Any] = {"step": step, "attempt": self.attempt, "loss": means["loss"]}
        row |= {"loss_hex": means["loss"].hex(), "positions": list(positions)}
        row |= {key: value for key, value in means.items() if key != "loss"}
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        self.stepped_s += seconds["step_s"]
        row |= seconds | {"stepped_s": self.stepped_s, "peak_memory_gib": peak, "time_ms": int(time.time() * 1000)}
        self.metrics.write(row | told)
        self.progress.step(step, means)
        if told:
            self.say(f"step {step}: {told['guard']}")

    def evaluation(
        self,
        step: int,
        figures: Mapping[str, float],
        seconds: Mapping[str, float],
        pictures: Iterable[tuple[str, Image.Image]],
    ) -> None:
        """Write the line of an evaluation to metrics.jsonl, and its pictures; print the figures."""
        row: dict[str, Any] = {"step": step, "attempt": self.attempt, **figures, **seconds}
        self.metrics.write(row | {"stepped_s": self.stepped_s, "time_ms": int(time.time() * 1000)})
        for name, picture in pictures:
            path = self.folder / "samples" / f"{name}-step-{step:08d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, png(picture))
        shown = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
        self.say(f"step {step} evaluated in {seconds['evaluate_s']:.1f} s  {shown}")

    def picture(self, pixels: Tensor, name: str, step: int) -> None:
        """Write pixels float32 [n, 3, S, S] in [-1, 1] to samples/NAME-step-SSSSSSSS.png."""
        save_grid(pixels, self.folder / "samples" / f"{name}-step-{step:08d}.png")

    def say(self, text: str) -> None:
        print(text, flush=True)

    def close(self, status: str) -> None:
        """Close all outputs. status: the attempt's MLflow status; empty if the run belongs to a later attempt."""
        self.metrics.close()
        if self.mlflow:
            self.mlflow.close(status)


class MetricsLog:
    """Appends one line per step to metrics.jsonl, each flushed: a killed process loses no line that it wrote."""

    def __init__(self, run: Path, name: str = METRICS) -> None:
        run.mkdir(parents=True, exist_ok=True)
        _end_last_line(run / name)
        self._file = (run / name).open("a", encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        """Append one line."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class SystemLog(threading.Thread):
    """Appends one node's CPU, memory, disk, network and GPU metrics to RUN/system-NODE.jsonl at intervals.

    The last line is written at the end, so that even a run shorter than the first interval has one.

    Names are those of MLflow's own system metrics, under the node's name, so that its page shows them.
    """

    def __init__(self, run: Path, node: str) -> None:
        super().__init__(name="system", daemon=True)
        self.node = re.sub(r"[^\w.-]+", "-", node, flags=re.ASCII)
        self.log = MetricsLog(run, SYSTEM.format(node=self.node))
        self._ending = threading.Event()

    def run(self) -> None:
        psutil.cpu_percent()  # the first call only sets the reference for the next one
        count, ending = 0, False
        while not ending:
            ending = self._ending.wait(SYSTEM_INTERVAL_S if count else FIRST_INTERVAL_S)
            row = {f"system/{self.node}/{name}": value for name, value in system_figures().items()}
            self.log.write({"step": count, "time_ms": int(time.time() * 1000)} | row)
            count += 1

    def close(self) -> None:
        """Write the last line."""
        self._ending.set()
        self.join(CLOSE_TIMEOUT_S)


def system_figures() -> dict[str, float]:
    """Return this machine's current system metrics; for CUDA devices only the memory in use."""
    memory, network = psutil.virtual_memory(), psutil.net_io_counters()
    figures = {
        "cpu_utilization_percentage": psutil.cpu_percent(),
        "system_memory_usage_megabytes": memory.used / 1e6,
        "system_memory_usage_percentage": memory.percent,
        "disk_usage_percentage": psutil.disk_usage("/").percent,
        "network_receive_megabytes": network.bytes_recv / 1e6,
        "network_transmit_megabytes": network.bytes_sent / 1e6,
    }
    import torch

    for device in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, total = torch.cuda.mem_get_info(device)
        figures[f"gpu_{device}_memory_usage_percentage"] = 100 * (1 - free / total)
    return figures


def _end_last_line(path: Path) -> None:
    """Truncate an incomplete last line that a killed process left behind."""
    last = next(raw_lines_back(path), b"\n")
    if not last.endswith(b"\n"):
        os.truncate(path, path.stat().st_size - len(last))
