"""What a run says of an MLflow that does not take its figures: once at the beginning of an outage, once at its end."""

import contextlib
import http.server
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from data_pipeline.errors import ConfigError, NodeFault, Overtaken, Requeue
from data_pipeline.settings import check_settings
from pretrain.config import RunConfig, TrackingConfig
from pretrain.runtime import mlflow_feed
from pretrain.runtime.mlflow_feed import MlflowFeed, status_of
from pretrain.tracking import MetricsLog
from tests.pretrain.checkpoint.simulated import config_of


@pytest.mark.parametrize(
    ("uri", "rule"),
    [
        ("htp://127.0.0.1:5000", "MLflow does not support 'htp'"),
        ("ftp://server/x", "MLflow does not support 'ftp'"),
        ("sqlite://runs/mlflow.db", "three slashes"),
        ("sqlite:///", "three slashes"),
        ("sqlite:mlflow.db", "three slashes"),
        ("http://", "the host is missing"),
        ("http://:5000", "the host is missing"),
        ("http:server:5000", "the host is missing"),
        ("https:///runs", "the host is missing"),
        ("http://[", "the host is missing"),
        ("http://server:99999", "the host is missing"),
        ("http://server:port", "the host is missing"),
        ("   ", "only spaces"),
    ],
)
def test_an_address_that_mlflow_cannot_know_is_a_configuration_error(uri: str, rule: str) -> None:
    with pytest.raises(ConfigError, match=rule):
        check_settings(TrackingConfig, {"uri": uri}, "run.yaml")


@pytest.mark.parametrize(
    "uri",
    ["", "http://h:5000", "HTTPS://u:p@h/x", "sqlite:///a.db", "sqlite:////a.db", "runs/mlruns", "/tmp/a", "databricks",
     "databricks://profile", "http://[::1]:50/", "postgresql+psycopg2://u@h/db", "mysql://h/db", "file:///tmp/x"],
)  # fmt: skip
def test_an_address_that_mlflow_may_know_is_left_to_it(uri: str) -> None:
    assert check_settings(TrackingConfig, {"uri": uri}, "run.yaml").uri == uri


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (None, "FINISHED"),
        (Requeue("saved"), "KILLED"),
        (KeyboardInterrupt(), "KILLED"),
        (NodeFault("gone"), "FAILED"),
        (ValueError("user code"), "FAILED"),
        (Overtaken("a later attempt owns the run"), ""),
    ],
)
def test_the_end_of_an_attempt_has_mlflows_name(error: BaseException | None, status: str) -> None:
    assert status_of(error) == status


# ------------------------------------------------------------------------------------------------ outages


class Answer(http.server.BaseHTTPRequestHandler):
    """Stands for what is no MLflow, or one that refuses: the same answer to every request."""

    code, body, asked = 200, b"", 0

    def do_GET(self) -> None:
        type(self).asked += 1
        self.send_response(self.code)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def answering(code: int, body: bytes) -> Iterator[tuple[str, type[Answer]]]:
    kind = type("Fixed", (Answer,), {"code": code, "body": body})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), kind) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://me:secret@127.0.0.1:{server.server_port}", kind
        server.shutdown()


def run_with(uri: str, folder: Path) -> RunConfig:
    """The configuration of a run that has logged a step."""
    config = config_of(folder)
    log = MetricsLog(folder)
    log.write({"step": 1, "attempt": 0, "loss": 1.5, "time_ms": 1000})
    log.close()
    return config.model_copy(update={"tracking": TrackingConfig(uri=uri)})


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 100
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "body", "remedy"),
    [
        (401, b"no", "set MLFLOW_TRACKING_USERNAME"),
        (403, b"no", "write access"),
        (404, b"no", "must be the address of the MLflow server"),
        (200, b"<html>log in</html>", "another service answers"),
        (302, b"", "another service answers"),
    ],
)
def test_a_server_that_refuses_is_named_once_with_what_helps(
    code: int,
    body: bytes,
    remedy: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(mlflow_feed, "INTERVAL_S", 0.02)
    with answering(code, body) as (uri, kind):
        feed = MlflowFeed(tmp_path, run_with(uri, tmp_path))
        feed.start()
        wait_until(lambda: kind.asked >= 4)
        feed.close("FINISHED")
    told = capfd.readouterr()
    assert told.out.count("stores nothing") == told.out.count("did not store everything") == 1
    assert remedy in told.out and "secret" not in told.out and "Traceback" not in told.out + told.err


@pytest.mark.slow
@pytest.mark.parametrize("table", ["experiments", "alembic_version"])
def test_a_database_that_is_half_made_is_named(table: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with contextlib.closing(sqlite3.connect(tmp_path / "half.db")) as database:
        database.execute(f"CREATE TABLE {table} (a INT)")
        database.commit()
    assert_told(f"sqlite:///{tmp_path}/half.db", "incomplete", tmp_path, capfd)


@pytest.mark.slow
def test_a_file_that_is_no_database_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "garbage.db").write_bytes(b"garbage" * 1000)
    assert_told(f"sqlite:///{tmp_path}/garbage.db", "damaged", tmp_path, capfd)


def test_a_folder_in_place_of_a_database_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert_told(f"sqlite:///{tmp_path}", "a writable file", tmp_path, capfd)


def assert_told(uri: str, remedy: str, run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    feed = MlflowFeed(run, run_with(uri, run))
    feed.start()
    feed.close("FINISHED")
    told = capfd.readouterr()
    assert remedy in told.out and "Traceback" not in told.out + told.err
    assert told.out.count("\n") == 1


@pytest.mark.slow
def test_a_line_without_its_step_or_time_holds_nothing_up(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db?timeout=5"
    config = run_with(uri, tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(
            '{"step": 2, "attempt": 0}\n{"time_ms": 2000}\n{"step": 3, "attempt": 0, "loss": 1, "time_ms": 3000}\n'
        )
    mlflow_feed.send(tmp_path, config, status="FINISHED")
    client = MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("tessera").experiment_id])
    assert [point.step for point in client.get_metric_history(run.info.run_id, "loss")] == [1, 3]
    assert not list(tmp_path.glob("*[?]*"))


@pytest.mark.slow
def test_an_outage_is_said_at_its_beginning_and_at_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A real database, held by another program for a while."""
    from mlflow import MlflowClient

    monkeypatch.setattr(mlflow_feed, "INTERVAL_S", 0.02)
    monkeypatch.setattr(mlflow_feed, "LOCK_TIMEOUT_S", 0.02)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    MlflowClient(uri).search_experiments()  # makes it
    said = []
    monkeypatch.setattr("builtins.print", lambda text, **_: said.append(text))
    with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db")) as other:
        other.execute("BEGIN EXCLUSIVE")
        feed = MlflowFeed(tmp_path, run_with(uri, tmp_path))
        feed.start()
        wait_until(lambda: bool(said))
        other.rollback()
        wait_until(lambda: len(said) == 2)
    feed.close("FINISHED")
    begins, ends = said
    assert "stores nothing: database is locked; end the program that locks" in begins and "answers again" in ends
    (run,) = MlflowClient(uri).search_runs([MlflowClient(uri).get_experiment_by_name("tessera").experiment_id])
    assert (run.info.status, run.data.metrics["loss"]) == ("FINISHED", 1.5)
