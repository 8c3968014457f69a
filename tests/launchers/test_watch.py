"""The records in a run's folder are checked as they are read: a wrong one makes no signal, command or address."""

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import ConfigError, DataError
from launchers import slurm_jobs, watch
from launchers.watch import JOB, RECORD, is_running, job_of, metric_lines, read_record, run_status, stop_run
from pretrain.runtime.faults import FAULTS, read_faults
from pretrain.runtime.goodput import ATTEMPTS, METRICS, goodput, lines_of

LAUNCHER = {"pid": 4242, "start_ticks": 7, "host": socket.gethostname(), "attempt": 0, "world_size": 2}
SLURM = {"place": "slurm", "job": "12_3", "name": "run", "saves": True, "output": "/tmp/12.out"}
KUBERNETES = {"place": "kubernetes", "job": "run-a", "kind": "Job", "namespace": "ml.team", "uid": "1b-2c"}
JOBS: list[Any] = [
    "--state=RUNNING",
    "7 8",
    "7;reboot",
    "../../nodes",
    "a/b",
    "",
    "-1",
    "7\n8",
    "$(id)",
    "?watch=1",
    7,
    None,
    ["7"],
]

WRONG = [
    *((RECORD, LAUNCHER, "pid", value) for value in [-1, 0, 1.5, True, "1", None, 2**40]),
    *((RECORD, LAUNCHER, "start_ticks", value) for value in ["7", 1.5, []]),
    *((RECORD, LAUNCHER, "host", value) for value in [None, 7]),
    *((RECORD, LAUNCHER, field, value) for field in ("attempt", "world_size") for value in [-1, "2", None]),
    *((JOB, SLURM, "job", value) for value in JOBS),
    *((JOB, SLURM, field, value) for field in ("name", "output") for value in [None, 7]),
    *((JOB, KUBERNETES, field, value) for field in ("job", "kind", "namespace", "uid") for value in JOBS),
]


def record(folder: Path, name: str, held: Any) -> None:
    (folder / name).write_text(held if isinstance(held, str) else json.dumps(held))


@pytest.mark.parametrize(("name", "right"), [(RECORD, LAUNCHER), (JOB, SLURM), (JOB, KUBERNETES)])
def test_a_wrong_entry_of_a_record_is_refused_by_name(name: str, right: dict[str, Any], tmp_path: Path) -> None:
    record(tmp_path, name, right)
    assert read_record(tmp_path, name) == right
    for _, _, field, value in (row for row in WRONG if row[1] is right):
        record(tmp_path, name, right | {field: value})
        with pytest.raises(DataError, match=rf"{name}: {field}.*remove the file"):
            read_record(tmp_path, name)
            pytest.fail(f"{field} = {value!r} was taken")


@pytest.mark.parametrize("held", ["", "[]", "7", "{", "[" * 10**5, '{"pid": 1}'])
@pytest.mark.parametrize("name", [RECORD, JOB])
def test_what_is_no_record_is_an_error_of_data(name: str, held: str, tmp_path: Path) -> None:
    record(tmp_path, name, held)
    with pytest.raises(DataError, match=name):
        run_status(tmp_path)


def test_a_record_of_a_place_has_what_the_place_is_asked_for(tmp_path: Path) -> None:
    for right, needed in ((SLURM, ("name", "output")), (KUBERNETES, ("kind", "namespace", "uid"))):
        for field in needed:
            record(tmp_path, JOB, {key: value for key, value in right.items() if key != field})
            with pytest.raises(DataError, match=f"no {field}"):
                job_of(tmp_path)
    record(tmp_path, JOB, SLURM | {"place": "elsewhere"})
    with pytest.raises(ConfigError, match="elsewhere"):
        job_of(tmp_path)


@pytest.mark.parametrize("ticks", [None, 0])
def test_a_process_that_is_gone_is_not_running_and_gets_no_signal(
    ticks: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[int] = []
    monkeypatch.setattr(os, "kill", lambda pid, number: sent.append(pid))
    gone = LAUNCHER | {"pid": 2**31 - 1, "start_ticks": ticks}
    assert not is_running(gone)
    record(tmp_path, RECORD, gone)
    with pytest.raises(ConfigError, match="no launcher of this run is running"):
        stop_run(tmp_path, 1)
    record(tmp_path, RECORD, LAUNCHER | {"pid": -1, "start_ticks": None})
    with pytest.raises(DataError, match="pid=-1"):
        stop_run(tmp_path, 1)
    assert not sent


LINE = b'{"step": 1, "attempt": 0, "time_ms": 9, "loss": NaN, "metrics_at": 0}'
LINES = st.one_of(
    st.binary(max_size=60),
    st.fixed_dictionaries(
        {},
        optional={
            name: st.one_of(st.integers(), st.floats(), st.none(), st.text(max_size=5), st.lists(st.integers()))
            for name in (
                "step",
                "attempt",
                "time_ms",
                "step_s",
                "stepped_s",
                "metrics_at",
                "cause",
                "rank",
                "why",
                "blamed",
            )
        },
    ).map(lambda tree: json.dumps(tree).encode()),
)


@settings(max_examples=100, deadline=None)
@given(st.lists(LINES, max_size=5))
def test_of_any_lines_those_that_are_none_are_left_out(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes]
) -> None:
    folder = tmp_path_factory.mktemp("run")
    for name in (METRICS, ATTEMPTS, FAULTS):
        (folder / name).write_bytes(b"\n".join([*lines, LINE, b""]))
    assert goodput(folder)["attempts"] and run_status(folder)["state"] == "not launched"
    assert list(lines_of(folder / METRICS))[-1]["step"] == 1
    for fault in read_faults(folder):
        assert fault["cause"] in ("configuration", "node", "storage", "preemption", "user code") and fault["rank"] >= 0


@pytest.mark.parametrize("held", ["", "12_3 0", "12_3 0 x", "12_3 0 -1", "12_3 0 ² ", "13 0 0", "12_3 0 0 0", "\udcff"])
def test_a_last_word_that_is_none_leaves_a_job_vanished(
    held: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm_jobs, "_controller", lambda record: [])
    monkeypatch.setattr(slurm_jobs, "_accounting", lambda record: [])
    (tmp_path / slurm_jobs.END).write_bytes(held.encode("utf-8", "surrogateescape"))
    assert slurm_jobs.look(SLURM, tmp_path)["state"] == "vanished"
    (tmp_path / slurm_jobs.END).write_text("12_3 1 75\n")
    assert slurm_jobs.look(SLURM, tmp_path)["state"] == "stopped"


def test_more_lines_than_a_machine_can_count_are_all_there_are(tmp_path: Path) -> None:
    (tmp_path / METRICS).write_bytes(b"one\ntwo\r\nthree")
    assert list(metric_lines(tmp_path, 10**23, follow=False)) == ["one", "two"]


@pytest.mark.parametrize("held", [b"", b'{"step": 1', b"[]\n"])
def test_metrics_without_a_step_are_told_as_such(held: bytes, tmp_path: Path) -> None:
    (tmp_path / METRICS).write_bytes(held)
    with pytest.raises(ConfigError, match="no whole step in metrics.jsonl"):
        run_status(tmp_path)


def job_output(run: Path, output: Path, job: str = "12_3") -> list[str]:
    run.mkdir(exist_ok=True)
    record(run, JOB, SLURM | {"job": job, "output": str(output)})
    return list(metric_lines(run, 9, follow=False))


def test_the_output_of_a_job_is_read_where_it_carries_the_jobs_number_or_lies_in_the_run(tmp_path: Path) -> None:
    (tmp_path / "run" / "logs").mkdir(parents=True)
    for at, job in (("run-12_3.out", "12_3"), ("12.log", "12"), ("a12", "12"), ("run/logs/x", "7"), ("run/x", "7")):
        (tmp_path / at).write_text("one\n")
        assert job_output(tmp_path / "run", tmp_path / at, job) == ["one"], at


@pytest.mark.parametrize("job", ["12", "id_key", "x", "1", "2"])
def test_a_job_record_from_elsewhere_cannot_name_another_file(
    job: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "look_at_job", lambda run, record: {"state": "vanished"})
    (tmp_path / "id_key").write_text("secret\n")
    (tmp_path / "run").mkdir()
    for link in (tmp_path / "job-12.out", tmp_path / "run" / "12.out"):
        link.symlink_to(tmp_path / "id_key")
    (tmp_path / "x123.out").write_text("secret\n")
    for path in ("id_key", "job-12.out", "run/12.out", "run/../id_key", "12/../id_key", "x123.out"):
        with pytest.raises(DataError, match=r"output=.*not in the run's folder.*read the file with tail"):
            job_output(tmp_path / "run", tmp_path / path, job)
            pytest.fail(path)


def test_an_output_without_the_jobs_number_is_read_while_the_scheduler_reports_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "train.out").write_text("one\n")
    monkeypatch.setattr(watch, "look_at_job", lambda run, record: {"output": str(tmp_path / "train.out")})
    assert job_output(tmp_path / "run", tmp_path / "train.out") == ["one"]
    monkeypatch.setattr(watch, "look_at_job", lambda run, record: (_ for _ in ()).throw(ConfigError("no Slurm here")))
    with pytest.raises(DataError, match="not in the run's folder"):
        job_output(tmp_path / "run", tmp_path / "train.out")
