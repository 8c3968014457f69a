"""What a run tells: metrics.jsonl and samples/ are the truth, MLflow is fed from them beside the training.

An MLflow server that is slow or gone never holds up a step: a thread reads what was written and sends it on; what could
not be sent stays where it is and goes with the next try, in this process or in a later one. RUN/mlflow.json remembers
the MLflow run and how far it has come.
"""

import json
import logging
import re
import threading
import time
from pathlib import Path
from typing import Any

from PIL import Image

from data_pipeline.settings import digest, flatten
from pretrain.config import RunConfig

METRICS = "metrics.jsonl"
RECORD = "mlflow.json"
INTERVAL_S = 3.0
CLOSE_TIMEOUT_S = 60.0
NOT_CURVES = ("step", "attempt", "loss_hex", "positions")


class MetricsLog:
    """Appends to metrics.jsonl, a line a step, each flushed: a killed process loses none that it wrote."""

    def __init__(self, run: Path) -> None:
        run.mkdir(parents=True, exist_ok=True)
        _end_last_line(run / METRICS)
        self._file = (run / METRICS).open("a", encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        """One step."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class MlflowFeed(threading.Thread):
    """Sends a run folder's metrics and pictures to MLflow every few seconds, until `close`."""

    def __init__(self, run: Path, config: RunConfig) -> None:
        super().__init__(name="mlflow", daemon=True)
        self.folder = run
        self.config = config
        self.fault = ""
        self._ending = threading.Event()

    def run(self) -> None:
        while True:
            ending = self._ending.wait(INTERVAL_S)
            try:
                send(self.folder, self.config)
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


def send(run: Path, config: RunConfig, figures: dict[str, float] | None = None) -> None:
    """Send what MLflow does not have yet: lines of metrics.jsonl, pictures in samples/, and `figures` if given."""
    from mlflow import MlflowClient  # seconds to import, so not before it is needed
    from mlflow.entities import Metric

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    _make_room(config.tracking.uri)

    client = MlflowClient(config.tracking.uri)
    record = _record(run, client, config)
    lines, end = _new_lines(run / METRICS, record["sent_bytes"])
    rows = [json.loads(line) for line in lines]
    now = int(time.time() * 1000)
    metrics = [
        Metric(key, float(value), int(row.get("time_ms", now)), row["step"])
        for row in rows
        for key, value in row.items()
        if key not in NOT_CURVES and key != "time_ms" and isinstance(value, int | float)
    ]
    metrics += [Metric(f"final/{key}", float(value), now, 0) for key, value in (figures or {}).items()]
    for at in range(0, len(metrics), 1000):
        client.log_batch(record["run_id"], metrics=metrics[at : at + 1000])
    if rows:
        client.set_tag(record["run_id"], "attempt", str(rows[-1]["attempt"]))
    _write_record(run, record | {"sent_bytes": end})
    for picture in sorted((run / "samples").glob("*.png")):
        if picture.name not in record["pictures"]:
            key, step = picture_key(picture.name)
            with Image.open(picture) as image:
                client.log_image(record["run_id"], image.convert("RGB"), key=key, step=step)
            record["pictures"].append(picture.name)
            _write_record(run, record | {"sent_bytes": end})


def picture_key(name: str) -> tuple[str, int]:
    """ "grid-step-00000100.png" -> ("grid", 100); without a step, 0. MLflow wants plain characters in keys."""
    match = re.fullmatch(r"(.*?)(?:-step-(\d+))?\.png", name)
    assert match is not None
    return re.sub(r"[^\w.-]+", "-", match[1], flags=re.ASCII) or "picture", int(match[2] or 0)


def _record(run: Path, client: Any, config: RunConfig) -> dict[str, Any]:
    path = run / RECORD
    if path.is_file():
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["uri"] == config.tracking.uri:
            return dict(record)
    from mlflow.entities import Param

    experiment = client.get_experiment_by_name(config.tracking.experiment)
    experiment_id = (
        experiment.experiment_id
        if experiment
        else client.create_experiment(
            config.tracking.experiment, artifact_location=pictures_beside(config.tracking.uri)
        )
    )
    created = client.create_run(experiment_id, run_name=run.name, tags={"config": digest(config)})
    params = [Param(key, str(value)[:500]) for key, value in flatten(config.model_dump(mode="json")).items()]
    for at in range(0, len(params), 100):
        client.log_batch(created.info.run_id, params=params[at : at + 100])
    record = {"uri": config.tracking.uri, "run_id": created.info.run_id, "sent_bytes": 0, "pictures": []}
    _write_record(run, record)
    return record


def _make_room(uri: str) -> None:
    path = uri.removeprefix("sqlite:///")
    if path != uri:
        Path(path).absolute().parent.mkdir(parents=True, exist_ok=True)


def pictures_beside(uri: str) -> str | None:
    """Where a database file keeps its pictures: beside itself, not in whatever folder the process runs in."""
    path = uri.removeprefix("sqlite:///")
    return None if path == uri else (Path(path).absolute().parent / "mlflow-artifacts").as_uri()


def _write_record(run: Path, record: dict[str, Any]) -> None:
    draft = run / f".{RECORD}"
    draft.write_text(json.dumps(record), encoding="utf-8")
    draft.replace(run / RECORD)


def _new_lines(path: Path, start: int) -> tuple[list[str], int]:
    """Complete lines from byte `start` on, and where they end."""
    if not path.is_file():
        return [], start
    with path.open("rb") as file:
        file.seek(start)
        data = file.read()
    data = data[: data.rfind(b"\n") + 1]
    return data.decode().splitlines(), start + len(data)


def _end_last_line(path: Path) -> None:
    """Cut a last line that a killed process left half written."""
    if path.is_file():
        data = path.read_bytes()
        if data and not data.endswith(b"\n"):
            with path.open("r+b") as file:
                file.truncate(data.rfind(b"\n") + 1)
