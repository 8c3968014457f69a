"""metrics.jsonl is the truth; a real MLflow server gets each of its lines and each picture once, sooner or later."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data_pipeline.errors import DataError
from data_pipeline.settings import load_settings
from launchers.local import free_port
from pretrain.config import RunConfig
from pretrain.runtime import mlflow_feed
from pretrain.runtime.goodput import lines_of
from pretrain.runtime.mlflow_feed import FAILED, RECORD, end_run, picture_key, send
from pretrain.tracking import MetricsLog, Writer
from tests.pretrain.commands import (
    TRACEBACK,
    Material,
    ask_to_stop,
    child_of_rank,
    command,
    environment,
    interrupted,
    recipe,
    rows_of,
    steps_of,
    vqgan,
)

NO_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "5"}

# --------------------------------------------------------------------------------------- the file that is the truth


@pytest.mark.parametrize("rest", ["", '{"step": 3, "lo', "{"])
def test_a_half_written_last_line_is_cut_and_what_follows_is_whole(rest: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n' + rest)
    log = MetricsLog(tmp_path)
    log.write({"step": 3})
    log.close()
    assert [row["step"] for row in rows_of(tmp_path)] == [1, 2, 3]


def test_a_run_s_configuration_is_never_seen_half_written(
    material: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_settings(RunConfig, recipe(vqgan(material, tmp_path / "run"), tmp_path / "run.yaml"))
    Writer(config, 0, 0, 1).close("")
    before = (tmp_path / "run/config.json").read_text()

    def die(path: Path, text: str, **_: Any) -> None:
        with path.open("w") as file:
            file.write(text[:7])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", die)
    with pytest.raises(KeyboardInterrupt):
        Writer(config, 1, 0, 1)
    assert (tmp_path / "run/config.json").read_text() == before


def test_a_start_noted_behind_a_torn_line_is_whole(material: Material, tmp_path: Path) -> None:
    config = load_settings(RunConfig, recipe(vqgan(material, tmp_path / "run"), tmp_path / "run.yaml"))
    Writer(config, 0, 0, 1).close("")
    with (tmp_path / "run/attempts.jsonl").open("a") as file:
        file.write('{"attempt": 1, "from')
    Writer(config, 2, 0, 1).close("")
    assert [line["attempt"] for line in lines_of(tmp_path / "run/attempts.jsonl")] == [0, 2]


def test_a_line_that_is_being_written_is_not_read_before_its_end(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"a": 1}\n{"b"')
    lines, end = mlflow_feed._new_lines(path, 0)
    assert (lines, end) == ([b'{"a": 1}\n'], 9)
    path.write_text('{"a": 1}\n{"b": 2}\n')
    assert mlflow_feed._new_lines(path, end) == ([b'{"b": 2}\n'], 18)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("grid-step-00000100.png", ("grid", 100)),
        ("一只 red/cat.png", ("-red-cat", 0)),
        ("图.png", ("-", 0)),
        ("a-step-b.png", ("a-step-b", 0)),
    ],
)
def test_a_picture_s_name_becomes_a_key_and_a_step(name: str, key: tuple[str, int]) -> None:
    assert picture_key(name) == key


# --------------------------------------------------------------------------------------------- a real server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An MLflow server over a sqlite file."""
    folder = tmp_path_factory.mktemp("mlflow")
    with serving(folder, free_port()) as uri:
        yield uri


@contextlib.contextmanager
def serving(folder: Path, port: int) -> Iterator[str]:
    """A server over the sqlite file in `folder`, at `port`, until the block ends."""
    argv = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    argv += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(folder / "files")]
    process = subprocess.Popen(
        argv, env=environment(MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false"), cwd=folder, process_group=0,
        stdout=(folder / "log").open("w"), stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        wait_for(f"http://127.0.0.1:{port}/health", process, folder / "log")
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            urllib.request.urlopen(url, timeout=2).close()
            return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"{url} does not answer: {log.read_text()[-3000:]}")


def described(material: Material, run: Path, uri: str) -> Path:
    tree = vqgan(material, run)
    tree["train"] |= {"sample_every_steps": 5}
    return recipe(tree | {"tracking": {"uri": uri, "experiment": run.name}}, run.with_suffix(".yaml"))


def arrived(uri: str, run: Path) -> dict[str, Any]:
    """What the server has of a run: its runs, the loss at each step, the pictures."""
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name(run.name)
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    losses = client.get_metric_history(runs[0].info.run_id, "loss")
    pictures = [file.path for file in client.list_artifacts(runs[0].info.run_id, "images") if file.path.endswith("png")]
    return {"runs": len(runs), "loss": sorted((m.step, m.value) for m in losses), "pictures": len(pictures)}


def written(run: Path) -> dict[str, Any]:
    """What the run folder has."""
    losses = sorted((row["step"], row["loss"]) for row in rows_of(run))
    return {"runs": 1, "loss": losses, "pictures": len(list((run / "samples").glob("*.png")))}


@pytest.mark.slow
@pytest.mark.real
def test_a_run_and_its_continuation_are_one_run_at_the_server_with_everything_once(
    server: str, material: Material, tmp_path: Path
) -> None:
    run = tmp_path / "continued"
    argv = command("train", described(material, run, server))
    code, output = interrupted(argv, run, 6, ask_to_stop)
    assert code == 75 and status(server, run) == "KILLED", output[-3000:]
    code, output = interrupted(argv, run, 20, lambda pid: wait_until(lambda: status(server, run) == "RUNNING"))
    assert code == 0 and "did not store everything" not in output, output[-3000:]
    assert status(server, run) == "FINISHED"
    assert written(run)["pictures"] == 4 and len(written(run)["loss"]) == 20
    assert arrived(server, run) == written(run)


def status(uri: str, run: Path) -> str:
    """Of the MLflow run, as the server has it."""
    from mlflow import MlflowClient

    return str(MlflowClient(uri).get_run(json.loads((run / "mlflow.json").read_text())["run_id"]).info.status)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.real
def test_an_attempt_that_was_killed_is_told_by_its_launcher(server: str, material: Material, tmp_path: Path) -> None:
    """SIGKILL to rank 0, which feeds MLflow: nothing of the attempt can say that it has ended."""
    run = tmp_path / "killed"

    def kill_rank_0(launcher: int) -> None:
        wait_until(lambda: (run / "mlflow.json").is_file() and "status" in (run / "mlflow.json").read_text())
        os.kill(child_of_rank(launcher, 0), signal.SIGKILL)

    argv = command("launch", "local", described(material, run, server), "--procs-per-node", "1", "--restarts", "0")
    code, output = interrupted(argv, run, 6, kill_rank_0)
    assert (code, status(server, run)) == (70, "FAILED"), output[-3000:]


@pytest.mark.slow
@pytest.mark.real
def test_without_a_server_training_ends_well_and_everything_is_sent_later_once(
    server: str, material: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "offline"
    nobody = f"http://127.0.0.1:{free_port()}"
    for name, value in NO_PATIENCE.items():
        monkeypatch.setenv(name, value)
    path = described(material, run, nobody)
    code, output = interrupted(command("train", path), run, 20, lambda pid: None)
    assert code == 0, output[-3000:]
    assert output.count(f"MLflow at {nobody} did not store everything") == 1 and TRACEBACK not in output
    assert output.count(f"MLflow at {nobody} stores nothing") <= 1
    config = load_settings(RunConfig, path, [f"tracking.uri={server}"])
    for _ in range(2):
        send(run, config)
        assert arrived(server, run) == written(run)
    assert status(server, run) == "FINISHED"  # which its own process could not deliver


@pytest.mark.slow
@pytest.mark.real
def test_lines_sent_by_a_process_that_died_before_it_noted_so_are_not_doubled(
    server: str, material: Material, tmp_path: Path
) -> None:
    run = tmp_path / "forgetful"
    config = load_settings(RunConfig, described(material, run, server))
    log = MetricsLog(run)
    for step in range(1, 6):
        log.write({"step": step, "attempt": 0, "loss": 1 / step, "time_ms": 1000 * step})
    (run / "samples").mkdir()
    Image.new("RGB", (4, 4)).save(run / "samples" / "grid-step-00000003.png")
    send(run, config)
    record = json.loads((run / "mlflow.json").read_text())
    (run / "mlflow.json").write_text(json.dumps(record | {"sent": {}}))
    send(run, config)
    assert arrived(server, run) == written(run)


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.timeout(900)
def test_a_server_that_goes_and_comes_back_during_a_run_has_everything_once(material: Material, tmp_path: Path) -> None:
    """Training goes on while it is away; nodes and goodput arrive as well."""
    run, port = tmp_path / "outage", free_port()
    tree = vqgan(material, run) | {"tracking": {"uri": f"http://127.0.0.1:{port}", "experiment": run.name}}
    tree["train"] |= {"steps": 60, "sample_every_steps": 20}
    path = recipe(tree, run.with_suffix(".yaml"))
    (tmp_path / "server").mkdir()
    with contextlib.ExitStack() as servers:
        first = servers.enter_context(contextlib.ExitStack())
        first.enter_context(serving(tmp_path / "server", port))

        def outage(launcher: int) -> None:
            first.close()
            gone_at = max(steps_of(run))
            deadline = time.monotonic() + 120
            while max(steps_of(run)) < gone_at + 10:
                assert time.monotonic() < deadline, "training stands still without the server"
                time.sleep(0.05)
            servers.enter_context(serving(tmp_path / "server", port))

        code, output = interrupted(command("train", path), run, 10, outage, hold=False)
        assert code == 0 and TRACEBACK not in output, output[-3000:]
        send(run, load_settings(RunConfig, path))
        uri = f"http://127.0.0.1:{port}"
        assert arrived(uri, run) == written(run)
        known = metrics_of(uri, run)
        node = re.sub(r"[^\w.-]+", "-", socket.gethostname())
        assert f"system/{node}/cpu_utilization_percentage" in known
        assert [point[0] for point in known["goodput/steps_s"]] == [0]
        assert known["goodput/steps_s"][0][1] == pytest.approx(sum(row["step_s"] for row in rows_of(run)), abs=0.01)


def metrics_of(uri: str, run: Path) -> dict[str, list[tuple[int, float]]]:
    """Every curve that the server has: name -> (step, value)."""
    from mlflow import MlflowClient

    client, run_id = MlflowClient(uri), json.loads((run / "mlflow.json").read_text())["run_id"]
    names = client.get_run(run_id).data.metrics
    return {name: [(point.step, point.value) for point in client.get_metric_history(run_id, name)] for name in names}


@pytest.mark.slow
@pytest.mark.real
def test_an_mlflow_run_made_by_a_process_that_died_before_it_noted_so_is_found_again(
    server: str, material: Material, tmp_path: Path
) -> None:
    run = tmp_path / "unnoted"
    config = load_settings(RunConfig, described(material, run, server))
    MetricsLog(run).write({"step": 1, "attempt": 0, "loss": 1.5, "time_ms": 1000, "step_s": 1.0, "waited_s": 0.0})
    send(run, config)
    record = json.loads((run / "mlflow.json").read_text())
    forgotten = {key: record[key] for key in ("uri", "tag")}
    (run / "mlflow.json").write_text(json.dumps(forgotten))
    send(run, config)
    assert arrived(server, run) == {"runs": 1, "loss": [(1, 1.5)], "pictures": 0}
    assert json.loads((run / "mlflow.json").read_text())["run_id"] == record["run_id"]


@pytest.mark.slow
@pytest.mark.real
def test_a_setting_changed_on_the_way_is_a_tag_also_where_the_record_of_the_run_was_lost(
    server: str, material: Material, tmp_path: Path
) -> None:
    from mlflow import MlflowClient

    run = tmp_path / "changed"
    path = described(material, run, server)
    config = load_settings(RunConfig, path)
    silent = config.model_copy(update={"tracking": config.tracking.model_copy(update={"uri": ""})})
    Writer(silent, 0, 0, 1).close("")
    send(run, config)
    Writer(silent, 1, 8, 1, {}, {"train.steps": {"from": 20, "to": 30}}).close("")
    record = json.loads((run / "mlflow.json").read_text())
    (run / "mlflow.json").write_text(json.dumps({"tag": record["tag"]}))
    send(run, load_settings(RunConfig, path, ["train.steps=30"]))
    found = MlflowClient(server).get_run(record["run_id"]).data
    assert found.tags["tessera.change.step-8"] == "train.steps: 20 -> 30"
    assert found.params["train.steps"] == "20"


WRONG_RECORDS = [{"run_id": "../../x"}, {"tag": "' OR '1"}, {"sent": {"metrics.jsonl": -1}}, {"due": "GONE"}]


@pytest.mark.parametrize("held", ["[", "[]", *map(json.dumps, WRONG_RECORDS)])
def test_a_wrong_record_of_what_was_sent_is_refused_with_its_remedy(held: str, tmp_path: Path) -> None:
    (tmp_path / RECORD).write_text(held)
    with pytest.raises(DataError, match=r"mlflow\.json.*remove the file to start a new one"):
        mlflow_feed._read_record(tmp_path)
    end_run(tmp_path, FAILED)  # which must not cost a launcher its exit code


@pytest.mark.slow
def test_the_status_of_a_killed_attempt_is_kept_for_the_next_send_if_the_server_is_away(tmp_path: Path) -> None:
    held = {"uri": f"sqlite:///{tmp_path}/away/mlflow.db", "run_id": "a" * 32, "tag": "b" * 32, "due": "RUNNING"}
    (tmp_path / RECORD).write_text(json.dumps(held | {"status": "RUNNING", "sent": {}}))
    end_run(tmp_path, FAILED)
    record = json.loads((tmp_path / RECORD).read_text())
    assert (record["due"], record["status"]) == (FAILED, "RUNNING")
