"""What a run tells: metrics.jsonl, system-NODE.jsonl and samples/ are the truth, MLflow is fed from them.

An MLflow server that is slow or gone never holds up a step: a thread reads what was written and sends it on; what could
not be sent stays where it is and goes with the next try, in this process or in a later one. RUN/mlflow.json remembers
the MLflow run and how far it has come; where that was lost, the tag `tessera.run` finds the MLflow run again.
"""

import json
import logging
import os
import re
import resource
import threading
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
from PIL import Image
from torch import Tensor

from data_pipeline.settings import digest, flatten
from pretrain.config import FINGERPRINTS, RunConfig
from pretrain.goodput import ATTEMPTS, METRICS, append_line, goodput, lines_of, whole
from pretrain.metrics import ProgressLine, save_grid

RECORD = "mlflow.json"
SYSTEM = "system-{node}.jsonl"
INTERVAL_S = 3.0
SYSTEM_INTERVAL_S = 10.0
CLOSE_TIMEOUT_S = 60.0
NOT_CURVES = ("step", "attempt", "loss_hex", "positions", "time_ms")
RUN_TAG = "tessera.run"
IMPATIENT = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}
"""MLflow's client would try for minutes before it says that a server is gone."""

# ------------------------------------------------------------------------------------------ what is written


class Writer:
    """What rank 0 writes for people and for MLflow."""

    def __init__(
        self,
        config: RunConfig,
        attempt: int,
        step: int,
        world: int,
        fingerprints: Mapping[str, str] | None = None,
        changes: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """fingerprints: of what the run depends on. changes: settings that were changed here, {"from", "to"} by key."""
        self.config = config
        self.attempt = attempt
        self.folder = Path(config.run)
        self.folder.mkdir(parents=True, exist_ok=True)
        tree = config.model_dump(mode="json") | ({FINGERPRINTS: dict(fingerprints)} if fingerprints else {})
        _replace(self.folder / "config.json", json.dumps(tree, indent=1, ensure_ascii=False) + "\n")
        line: dict[str, Any] = {"attempt": attempt, "from_step": step, "world": world, "time": time.time()}
        line |= {"changes": dict(changes)} if changes else {}
        append_line(self.folder / ATTEMPTS, line | {"started": psutil.Process().create_time()})
        self.metrics = MetricsLog(self.folder)
        self.progress = ProgressLine(config.train.steps, step, config.train.log_every_steps)
        self.mlflow = MlflowFeed(self.folder, config) if config.tracking.uri else None
        if self.mlflow:
            self.mlflow.start()
        self.say(f"{config.model.kind}: steps {step} to {config.train.steps}, {world} processes, attempt {attempt}")
        for key, change in (changes or {}).items():
            self.say(f"from step {step} on {key}={change['to']}, it was {change['from']}")

    def step(
        self,
        step: int,
        positions: tuple[int, int],
        means: dict[str, float],
        seconds: dict[str, float],
        told: dict[str, str],
    ) -> None:
        """One line of metrics.jsonl: numbers, times, and `told` by the guards."""
        row: dict[str, Any] = {"step": step, "attempt": self.attempt, "loss": means["loss"]}
        row |= {"loss_hex": means["loss"].hex(), "positions": list(positions)}
        row |= {key: value for key, value in means.items() if key != "loss"}
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        self.metrics.write(row | seconds | {"peak_memory_gib": peak, "time_ms": int(time.time() * 1000)} | told)
        self.progress.step(step, means)
        if told:
            self.say(f"step {step}: {told['guard']}")

    def picture(self, pixels: Tensor, name: str, step: int) -> None:
        """pixels float32 [n, 3, S, S] in [-1, 1] -> samples/NAME-step-S.png"""
        save_grid(pixels, self.folder / "samples" / f"{name}-step-{step:08d}.png")

    def say(self, text: str) -> None:
        print(text, flush=True)

    def close(self) -> None:
        self.metrics.close()
        if self.mlflow:
            self.mlflow.close()


class MetricsLog:
    """Appends to metrics.jsonl, a line a step, each flushed: a killed process loses none that it wrote."""

    def __init__(self, run: Path, name: str = METRICS) -> None:
        run.mkdir(parents=True, exist_ok=True)
        _end_last_line(run / name)
        self._file = (run / name).open("a", encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        """One step."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class SystemLog(threading.Thread):
    """Appends what one node's processor, memory, disk, network and devices do to RUN/system-NODE.jsonl, at times.

    A run shorter than the first interval has one line too, from its end.

    Names are those of MLflow's own system metrics, under the node's name, so that its page shows them.
    """

    def __init__(self, run: Path, node: str) -> None:
        super().__init__(name="system", daemon=True)
        self.node = re.sub(r"[^\w.-]+", "-", node, flags=re.ASCII)
        self.log = MetricsLog(run, SYSTEM.format(node=self.node))
        self._ending = threading.Event()

    def run(self) -> None:
        psutil.cpu_percent()  # the first call only sets the mark from which the next one counts
        count, ending = 0, False
        while not ending:
            ending = self._ending.wait(SYSTEM_INTERVAL_S if count else INTERVAL_S)
            row = {f"system/{self.node}/{name}": value for name, value in system_figures().items()}
            self.log.write({"step": count, "time_ms": int(time.time() * 1000)} | row)
            count += 1

    def close(self) -> None:
        """Write the last line."""
        self._ending.set()
        self.join(CLOSE_TIMEOUT_S)


def system_figures() -> dict[str, float]:
    """What this machine does now; of CUDA devices the memory in use."""
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


# --------------------------------------------------------------------------------------- what MLflow is told


class MlflowFeed(threading.Thread):
    """Sends a run folder's metrics and pictures to MLflow every few seconds, until `close`."""

    def __init__(self, run: Path, config: RunConfig) -> None:
        super().__init__(name="mlflow", daemon=True)
        self.folder = run
        self.config = config
        self.fault = ""
        self._ending = threading.Event()

    def run(self) -> None:
        for name, value in IMPATIENT.items():  # what failed is tried again soon anyway, and the end shall not wait
            os.environ.setdefault(name, value)
        while True:
            ending = self._ending.wait(INTERVAL_S)
            try:
                send(self.folder, self.config, ended=ending)
                self.fault = ""
            except Exception as error:  # whatever MLflow or its transport raises: tracking must not end a run
                self.fault = f"{type(error).__name__}: {error}"
            if ending:
                return

    def close(self) -> None:
        """Send the rest, for at most a minute; say so when it did not work."""
        self._ending.set()
        self.join(CLOSE_TIMEOUT_S)
        if self.fault or self.is_alive():
            why = self.fault.splitlines()[0] if self.fault else f"no answer within {CLOSE_TIMEOUT_S:g} s"
            print(
                f"MLflow at {self.config.tracking.uri} did not take everything ({why}); it is in {self.folder}",
                flush=True,
            )


def send(run: Path, config: RunConfig, figures: dict[str, float] | None = None, ended: bool = True) -> None:
    """Send what MLflow does not have yet: lines of metrics.jsonl and of the nodes, goodput, pictures, and `figures`.

    `ended`: whether the newest attempt's goodput is final.
    """
    from mlflow import MlflowClient  # seconds to import, so not before it is needed
    from mlflow.entities import Metric

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    _make_room(config.tracking.uri)

    client = MlflowClient(config.tracking.uri)
    record = _record(run, client, config)
    rows, record["sent_bytes"] = _send_lines(run / METRICS, record["sent_bytes"], client, record)
    if rows:
        client.set_tag(record["run_id"], "attempt", str(rows[-1]["attempt"]))
    for path in sorted(run.glob(SYSTEM.format(node="*"))):
        _, record["nodes"][path.name] = _send_lines(path, record["nodes"].get(path.name, 0), client, record)
    _write_record(run, record)
    started = list(lines_of(run / ATTEMPTS))
    attempts = [line["attempt"] for line in started]
    if ended or len(attempts) != record.get("attempts"):  # not every few seconds: all lines are read for it
        _tag_changes(client, record["run_id"], started, config)
        known = [row for row in _goodput_rows(run) if ended or row["step"] != attempts[-1]]
        _log(client, record, [point for row in known for point in _points(row)])
        record["attempts"] = len(attempts)
        _write_record(run, record)
    now = int(time.time() * 1000)
    _log(client, record, [Metric(f"final/{key}", float(value), now, 0) for key, value in (figures or {}).items()])
    _send_pictures(run, client, record)


def _tag_changes(client: Any, run_id: str, started: list[dict[str, Any]], config: RunConfig) -> None:
    """Settings that were changed on the way, a tag for each step of it: MLflow never changes a parameter."""
    for line in started:
        if changes := line.get("changes"):
            told = ", ".join(f"{key}: {change['from']} -> {change['to']}" for key, change in changes.items())
            client.set_tag(run_id, f"tessera.change.step-{line['from_step']}", told)
            client.set_tag(run_id, "config", digest(config))


def _send_lines(path: Path, start: int, client: Any, record: dict[str, Any]) -> tuple[list[dict[str, Any]], int]:
    """Send the complete lines from byte `start` on -> (the lines, where they end)."""
    lines, end = _new_lines(path, start)
    rows = list(whole(lines))
    _log(client, record, [point for row in rows for point in _points(row)])
    return rows, end


def _points(row: dict[str, Any]) -> list[Any]:
    """The numbers of a line as MLflow's points; one that it has already it takes for the same."""
    from mlflow.entities import Metric

    numbers = {key: value for key, value in row.items() if key not in NOT_CURVES and isinstance(value, int | float)}
    return [Metric(key, float(value), int(row["time_ms"]), row["step"]) for key, value in numbers.items()]


def _goodput_rows(run: Path) -> list[dict[str, Any]]:
    """Where each attempt's time went; the attempt stands where a curve has its step."""
    return [
        {"step": row["attempt"], "time_ms": row["end_ms"]}
        | {f"goodput/{key}": value for key, value in row.items() if key not in ("attempt", "end_ms")}
        for row in goodput(run)["attempts"]
    ]


def _log(client: Any, record: dict[str, Any], metrics: list[Any]) -> None:
    for at in range(0, len(metrics), 1000):
        client.log_batch(record["run_id"], metrics=metrics[at : at + 1000])


def _send_pictures(run: Path, client: Any, record: dict[str, Any]) -> None:
    for picture in sorted((run / "samples").glob("*.png")):
        if picture.name not in record["pictures"]:
            key, step = picture_key(picture.name)
            with Image.open(picture) as image:
                client.log_image(record["run_id"], image.convert("RGB"), key=key, step=step)
            record["pictures"].append(picture.name)
            _write_record(run, record)


def picture_key(name: str) -> tuple[str, int]:
    """ "grid-step-00000100.png" -> ("grid", 100); without a step, 0. MLflow wants plain characters in keys."""
    match = re.fullmatch(r"(.*?)(?:-step-(\d+))?\.png", name)
    assert match is not None
    return re.sub(r"[^\w.-]+", "-", match[1], flags=re.ASCII) or "picture", int(match[2] or 0)


def _record(run: Path, client: Any, config: RunConfig) -> dict[str, Any]:
    """What MLflow has of this run; its MLflow run is made at the first call, and only once.

    The tag is written down before the MLflow run is made: a process killed in between finds that run by it.
    """
    path = run / RECORD
    record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if record.get("uri") == config.tracking.uri and "run_id" in record:
        return {"nodes": {}} | record
    fresh = {
        "uri": config.tracking.uri,
        "tag": record.get("tag", uuid.uuid4().hex),
        "sent_bytes": 0,
        "nodes": {},
        "pictures": [],
    }
    _write_record(run, fresh)
    experiment_id = _experiment(client, config)
    found = client.search_runs([experiment_id], f"tags.`{RUN_TAG}` = '{fresh['tag']}'")
    tags = {"config": digest(config), RUN_TAG: fresh["tag"]}
    run_id = (found[0] if found else client.create_run(experiment_id, run_name=run.name, tags=tags)).info.run_id
    _log_settings(client, run_id, config)
    _write_record(run, fresh | {"run_id": run_id})
    return fresh | {"run_id": run_id}


def _experiment(client: Any, config: RunConfig) -> str:
    name, uri = config.tracking.experiment, config.tracking.uri
    experiment = client.get_experiment_by_name(name)
    return str(experiment.experiment_id if experiment else client.create_experiment(name, pictures_beside(uri)))


def _log_settings(client: Any, run_id: str, config: RunConfig) -> None:
    from mlflow.entities import Param

    there = client.get_run(run_id).data.params  # of a run found again, whose settings may have changed since
    settings = flatten(config.model_dump(mode="json"))
    params = [Param(key, str(value)[:500]) for key, value in settings.items() if key not in there]
    for at in range(0, len(params), 100):
        client.log_batch(run_id, params=params[at : at + 100])


def _make_room(uri: str) -> None:
    path = uri.removeprefix("sqlite:///")
    if path != uri:
        Path(path).absolute().parent.mkdir(parents=True, exist_ok=True)


def pictures_beside(uri: str) -> str | None:
    """Where a database file keeps its pictures: beside itself, not in whatever folder the process runs in."""
    path = uri.removeprefix("sqlite:///")
    return None if path == uri else (Path(path).absolute().parent / "mlflow-artifacts").as_uri()


def _write_record(run: Path, record: dict[str, Any]) -> None:
    _replace(run / RECORD, json.dumps(record))


def _replace(path: Path, text: str) -> None:
    """Write a file as a whole: who reads it, or is left with it by a kill, has the old or the new one."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


def _new_lines(path: Path, start: int) -> tuple[list[bytes], int]:
    """Complete lines from byte `start` on, and where they end."""
    if not path.is_file():
        return [], start
    with path.open("rb") as file:
        file.seek(start)
        data = file.read()
    data = data[: data.rfind(b"\n") + 1]
    return data.splitlines(keepends=True), start + len(data)


def _end_last_line(path: Path) -> None:
    """Cut a last line that a killed process left half written."""
    if path.is_file():
        data = path.read_bytes()
        if data and not data.endswith(b"\n"):
            with path.open("r+b") as file:
                file.truncate(data.rfind(b"\n") + 1)
