"""Forwards the contents of a run folder to MLflow. Imports no torch.

A slow or unreachable MLflow server never delays a step: a thread reads the written files and sends them. What could not
be sent stays in the run folder and is sent with the next try, by this process or a later one. RUN/mlflow.json records
the MLflow run and how much of each file it has; without a run id there, the run is found by its tag `tessera.run`.
"""

import contextlib
import json
import logging
import os
import re
import sqlite3
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

from PIL import Image
from pydantic import StringConstraints, with_config
from typing_extensions import TypedDict

from data_pipeline import gate
from data_pipeline.errors import Overtaken, Requeue
from data_pipeline.settings import digest, flatten
from pretrain.config import RunConfig
from pretrain.runtime.goodput import ATTEMPTS, METRICS, goodput, lines_of, whole

RECORD = "mlflow.json"
SYSTEM = "system-{node}.jsonl"
INTERVAL_S = 3.0
CLOSE_TIMEOUT_S = 60.0
END_TIMEOUT_S = 30.0
LOCK_TIMEOUT_S = 5.0
AT_ONCE = 4 << 20
"""Bytes of a file that are sent before RUN/mlflow.json is updated."""
NOT_CURVES = ("step", "attempt", "loss_hex", "positions", "time_ms")
RUN_TAG = "tessera.run"
IMPATIENT = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}
"""By default MLflow's client retries for minutes before it reports that a server is unreachable."""

RUNNING, FINISHED, FAILED, KILLED = "RUNNING", "FINISHED", "FAILED", "KILLED"
"""MLflow's names for the state of a run."""

REMEDIES = {
    "code 401|UNAUTHENTICATED": "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN",
    "code 403|PERMISSION_DENIED": "grant this user write access to the experiment",
    "code 404": "tracking.uri must be the address of the MLflow server",
    "valid JSON|code 3[0-9][0-9]": "another service answers, such as a login page; correct tracking.uri",
    "database is locked": "end the program that locks the database, or track with an MLflow server",
    "no such (table|column)|not a database|malformed|Can't locate revision|out-of-date": (
        "the database is damaged, incomplete or of another MLflow version; move it, or try `mlflow db upgrade`"
    ),
    "unable to open|readonly database|disk is full": "tracking.uri must be a writable file",
    "No module named": "install the database's driver",
    "RESOURCE_DOES_NOT_EXIST|not found|active state|No Run with id": (
        "the MLflow run or experiment was deleted; restore it, or remove RUN/mlflow.json to start a new one"
    ),
}
"""Regular expression found in an MLflow error -> remedy."""


def why_not(error: BaseException) -> str:
    """Return an error of MLflow or its transport in one line of at most 200 characters, followed by a remedy."""
    text = f"{getattr(error, 'error_code', '')} {error}"
    remedy = next(
        (remedy for pattern, remedy in REMEDIES.items() if re.search(pattern, text)), "check that the server runs"
    )
    return f"{(str(error).splitlines() or [''])[0][:200] or type(error).__name__}; {remedy}"


def shown(uri: str) -> str:
    """Return a tracking address with user name and password masked."""
    return re.sub(r"//[^/@]*@", "//***@", uri)


def status_of(error: BaseException | None) -> str:
    """Return MLflow's status for the end of an attempt; empty if the MLflow run belongs to a later attempt."""
    if isinstance(error, Overtaken):
        return ""
    if isinstance(error, Requeue | KeyboardInterrupt):
        return KILLED
    return FAILED if error else FINISHED


_HexId = Annotated[str, StringConstraints(pattern="^[0-9a-f]{32}$")]
_Status = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]


@with_config(gate.OPEN)
class _Record(TypedDict):
    """Contents of mlflow.json. sent: bytes by file name; earlier versions wrote `nodes` and `sent_bytes` instead."""

    tag: NotRequired[_HexId]
    uri: NotRequired[str]
    run_id: NotRequired[_HexId]
    sent: NotRequired[dict[str, gate.Count]]
    nodes: NotRequired[dict[str, gate.Count]]
    sent_bytes: NotRequired[gate.Count]
    attempts: NotRequired[gate.Count]
    pictures: NotRequired[list[str]]
    due: NotRequired[_Status]
    status: NotRequired[_Status]


class MlflowFeed(threading.Thread):
    """Sends a run folder's metrics and pictures to MLflow every few seconds, until `close`."""

    def __init__(self, run: Path, config: RunConfig) -> None:
        super().__init__(name="mlflow", daemon=True)
        self.folder = run
        self.config = config
        self.at = f"MLflow at {shown(config.tracking.uri)}"
        self.fault = ""
        self.status = RUNNING
        self._ending = threading.Event()

    def run(self) -> None:
        for name, value in IMPATIENT.items():  # a failed send is retried soon, and the end must not wait
            os.environ.setdefault(name, value)
        while True:
            ending = self._ending.wait(INTERVAL_S)
            try:
                send(self.folder, self.config, ended=ending, status=self.status)
                self._answered()
            except Exception as error:  # whatever MLflow or its transport raises: tracking must not end a run
                self._failed(why_not(error))
            if ending:
                return

    def _answered(self) -> None:
        if self.fault:
            print(f"{self.at} answers again and has all records", flush=True)
        self.fault = ""

    def _failed(self, why: str) -> None:
        """Print a message when an outage begins, but not for each retry."""
        if not self.fault and not self._ending.is_set():
            print(f"{self.at} stores nothing: {why}. Training continues; records are sent later", flush=True)
        self.fault = why

    def close(self, status: str) -> None:
        """Send the rest and the attempt's `status`, waiting at most CLOSE_TIMEOUT_S; print what could not be sent."""
        self.status = status
        self._ending.set()
        self.join(CLOSE_TIMEOUT_S)
        if self.fault or self.is_alive():
            why = self.fault or f"no answer within {CLOSE_TIMEOUT_S:g} s"
            print(f"{self.at} did not store everything ({why}); the records are in {self.folder}", flush=True)


def send(
    run: Path, config: RunConfig, figures: dict[str, float] | None = None, ended: bool = True, status: str = ""
) -> None:
    """Send what MLflow does not have yet: metrics, system metrics of the nodes, goodput, pictures, and `figures`.

    ended: whether the newest attempt's goodput is final. status: the MLflow run's new status; if empty, a status that
    an earlier call could not deliver is sent.
    """
    from mlflow import MlflowClient  # takes seconds to import, so only when needed
    from mlflow.entities import Metric

    _silence()
    if status:
        _write_record(run, _read_record(run) | {"due": status})
    _check_sqlite(config.tracking.uri)
    client = MlflowClient(config.tracking.uri)
    record = _record(run, client, config)
    _deliver_status(run, client, record)
    for rows in _sent(run, METRICS, client, record):
        client.set_tag(record["run_id"], "attempt", str(rows[-1]["attempt"]))
    for path in sorted(run.glob(SYSTEM.format(node="*"))):
        list(_sent(run, path.name, client, record))
    started = list(lines_of(run / ATTEMPTS))
    attempts = [line["attempt"] for line in started]
    if ended or len(attempts) != record.get("attempts"):
        _tag_changes(client, record["run_id"], started, config)
        known = [row for row in _goodput_rows(run) if ended or row["step"] != attempts[-1]]
        _log(client, record, [point for row in known for point in _points(row)])
        record["attempts"] = len(attempts)
        _write_record(run, record)
    now = int(time.time() * 1000)
    _log(client, record, [Metric(f"final/{key}", float(value), now, 0) for key, value in (figures or {}).items()])
    _send_pictures(run, client, record)


def _tag_changes(client: Any, run_id: str, started: list[dict[str, Any]], config: RunConfig) -> None:
    """Tag the run with each step at which settings were changed: MLflow's parameters are immutable."""
    for line in started:
        if changes := line.get("changes"):
            told = ", ".join(f"{key}: {change['from']} -> {change['to']}" for key, change in changes.items())
            client.set_tag(run_id, f"tessera.change.step-{line['from_step']}", told)
            client.set_tag(run_id, "config", digest(config))


def end_run(run: Path, status: str) -> None:
    """Set the MLflow status of an attempt whose rank 0 was killed; a status that rank 0 reported itself is kept.

    Waits at most END_TIMEOUT_S for an unreachable server; then the next attempt reports its status.
    """

    def tell() -> None:
        with contextlib.suppress(Exception):  # whatever MLflow or its transport raises
            _end_run(run, status)

    thread = threading.Thread(target=tell, name="mlflow", daemon=True)
    thread.start()
    thread.join(END_TIMEOUT_S)


def _end_run(run: Path, status: str) -> None:
    record = _read_record(run)
    if record.get("due") == RUNNING and "run_id" in record:
        record["due"] = status
        _write_record(run, record)  # first: if it cannot be delivered now, the next send delivers it
        from mlflow import MlflowClient

        _silence()
        _check_sqlite(record["uri"])
        _deliver_status(run, MlflowClient(record["uri"]), record)


def _deliver_status(run: Path, client: Any, record: dict[str, Any]) -> None:
    due = record.get("due")
    if due is None or due == record.get("status"):
        return
    if due == RUNNING:
        client.update_run(record["run_id"], status=RUNNING)
    else:
        client.set_terminated(record["run_id"], status=due)
    record["status"] = due
    _write_record(run, record)


def _silence() -> None:
    """Silence MLflow's loggers, which print the statement and stack of each error; we print one line per outage."""
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def _sent(run: Path, name: str, client: Any, record: dict[str, Any]) -> Iterator[list[dict[str, Any]]]:
    """Send the new complete lines of a file in chunks of a few MB, record each chunk, and yield its rows."""
    while True:
        lines, end = _new_lines(run / name, record["sent"].get(name, 0))
        rows = list(whole(lines, {"step", "time_ms"} | ({"attempt"} if name == METRICS else set())))
        _log(client, record, [point for row in rows for point in _points(row)])
        if rows:
            yield rows
        if not lines:
            return
        record["sent"][name] = end
        _write_record(run, record)


def _points(row: dict[str, Any]) -> list[Any]:
    """Return the numbers of a line as MLflow metrics; MLflow ignores a metric point that it already has."""
    from mlflow.entities import Metric

    numbers = {key: value for key, value in row.items() if key not in NOT_CURVES and isinstance(value, int | float)}
    return [Metric(key, float(value), int(row["time_ms"]), row["step"]) for key, value in numbers.items()]


def _goodput_rows(run: Path) -> list[dict[str, Any]]:
    """Return the goodput of each attempt as metric rows, with the attempt number as the step."""
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
    """ "grid-step-00000100.png" -> ("grid", 100); step 0 if the name has none. MLflow's keys need plain characters."""
    match = re.fullmatch(r"(.*?)(?:-step-(\d+))?\.png", name)
    assert match is not None
    return re.sub(r"[^\w.-]+", "-", match[1], flags=re.ASCII) or "picture", int(match[2] or 0)


def _record(run: Path, client: Any, config: RunConfig) -> dict[str, Any]:
    """Return the record of what MLflow has of this run; the first call creates the MLflow run, once.

    The tag is recorded before the MLflow run is created: if the process is killed in between, the next one finds that
    run by its tag.
    """
    record = _read_record(run)
    if record.get("uri") == config.tracking.uri and "run_id" in record:
        sent = {METRICS: record.get("sent_bytes", 0), **record.get("nodes", {})}  # as earlier versions wrote it
        return {"sent": sent} | record
    fresh = {"uri": config.tracking.uri, "tag": record.get("tag", uuid.uuid4().hex), "sent": {}, "pictures": []}
    fresh |= {"due": record["due"]} if "due" in record else {}
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

    there = client.get_run(run_id).data.params  # a run found by its tag may have other settings already
    settings = flatten(config.model_dump(mode="json"))
    params = [Param(key, str(value)[:500]) for key, value in settings.items() if key not in there]
    for at in range(0, len(params), 100):
        client.log_batch(run_id, params=params[at : at + 100])


def _check_sqlite(uri: str) -> None:
    """Raise sqlite3's own error immediately for a database that is locked, damaged or cannot be created.

    MLflow would retry for minutes first. Creates the file's folder.
    """
    path = sqlite_file(uri)
    if path is None:
        return
    Path(path).absolute().parent.mkdir(parents=True, exist_ok=True)
    with contextlib.closing(sqlite3.connect(path, timeout=LOCK_TIMEOUT_S)) as database:
        database.execute("BEGIN IMMEDIATE")
        database.execute("SELECT count(*) FROM sqlite_master")


def pictures_beside(uri: str) -> str | None:
    """Return the artifact URI for a database file: a folder beside it, independent of the working directory."""
    path = sqlite_file(uri)
    return None if path is None else (Path(path).absolute().parent / "mlflow-artifacts").as_uri()


def sqlite_file(uri: str) -> str | None:
    """Return the file path of a sqlite address, without the options after "?"; None for any other address."""
    path = uri.removeprefix("sqlite:///")
    return None if path == uri else path.partition("?")[0]


def _read_record(run: Path) -> dict[str, Any]:
    path = run / RECORD
    if not path.is_file():
        return {}
    record: dict[str, Any] = gate.parse(_Record, path.read_bytes(), str(path), "remove the file to start a new one")
    return record


def _write_record(run: Path, record: dict[str, Any]) -> None:
    replace_file(run / RECORD, json.dumps(record))


def replace_file(path: Path, text: str) -> None:
    """Write a file atomically: a reader, also after a kill, finds either the old or the new file."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


def _new_lines(path: Path, start: int) -> tuple[list[bytes], int]:
    """Return complete lines from byte `start` on, up to AT_ONCE bytes or one longer line, and their end offset."""
    if not path.is_file():
        return [], start
    with path.open("rb") as file:
        file.seek(start)
        data = file.read(AT_ONCE)
        while more := b"\n" not in data and file.read(AT_ONCE):
            data += more
    data = data[: data.rfind(b"\n") + 1]
    return data.splitlines(keepends=True), start + len(data)
