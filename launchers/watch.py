"""Follow and stop a run through the files in its folder: launcher.json, config.json, metrics.jsonl, job.json.

launcher.json is written by the launcher of this machine. job.json is written when a run is submitted to a scheduler,
which is then queried.
"""

import contextlib
import itertools
import json
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NotRequired, TextIO

from pydantic import Field, StringConstraints, with_config
from typing_extensions import TypedDict

from data_pipeline import gate
from data_pipeline.errors import ConfigError, DataError, NodeFault, storage_errors
from data_pipeline.outputs import write_whole
from pretrain.runtime.goodput import METRICS, goodput, is_step, lines_back, raw_lines_back

RECORD = "launcher.json"
JOB = "job.json"
POLL_S = 0.1
ASK_S = 2.0  # minimum time between queries to a scheduler
ASK_AGAIN_S = 10.0  # before a stop request to a scheduler is repeated


@dataclass(frozen=True)
class RunPlace:
    """Functions that query a scheduler about the job of a record, given the run's folder.

    look: returns "state" (queued, running, done, stopped, cancelled, failed or vanished) and other known fields. stop:
    asks the job to save and exit; may be called again until it has. output: yields the last lines of rank 0's output,
    followed or not, for a place that does not write them to a file on this machine.
    """

    look: Callable[[Mapping[str, Any], Path], dict[str, Any]]
    stop: Callable[[Mapping[str, Any], Path], None]
    output: Callable[[Mapping[str, Any], int, bool], Iterator[str]] | None = None


def _slurm() -> RunPlace:
    from launchers import slurm_jobs

    return RunPlace(slurm_jobs.look, slurm_jobs.stop)


def _kubernetes() -> RunPlace:
    from launchers.kubernetes import jobs

    return RunPlace(jobs.look, jobs.stop, jobs.output)


PLACES: dict[str, Callable[[], RunPlace]] = {"slurm": _slurm, "kubernetes": _kubernetes}
"""Import a place's modules only once a run turns out to be there."""

# ---------------------------------------------------------------------------- the launcher's record of itself

Label = Annotated[str, StringConstraints(pattern="^[A-Za-z0-9]([A-Za-z0-9_.-]*[A-Za-z0-9])?$", max_length=253)]
"""Identifier of a job or an object; restricted, since it becomes a command's argument or part of an address."""


@with_config(gate.OPEN)
class _Launcher(TypedDict):
    """Contents of launcher.json. `pid` receives signals: 0 and below would mean process groups."""

    pid: Annotated[int, Field(ge=1, le=2**31 - 1)]
    start_ticks: int | None
    host: str
    attempt: NotRequired[gate.Count]
    world_size: NotRequired[gate.Count]
    exit_code: NotRequired[int]
    cause: NotRequired[str]
    why: NotRequired[str]


@with_config(gate.OPEN)
class _Job(TypedDict):
    """Contents of job.json: `name`, `saves`, `output` for Slurm; `kind`, `namespace`, `uid` for Kubernetes."""

    place: str
    job: Label
    name: NotRequired[str]
    saves: NotRequired[bool]
    output: NotRequired[str]
    kind: NotRequired[Label]
    namespace: NotRequired[Label]
    uid: NotRequired[Label]


_OF_PLACES = {"slurm": ("name", "output"), "kubernetes": ("kind", "namespace", "uid")}


def write_record(run: Path, record: dict[str, Any], name: str = RECORD) -> None:
    """Replace RUN/launcher.json (or job.json) atomically: a reader sees the old or the new one."""
    with storage_errors(run):
        run.mkdir(parents=True, exist_ok=True)
    write_whole(run / name, (json.dumps(record, indent=1, sort_keys=True) + "\n").encode())


def read_record(run: Path, name: str = RECORD) -> dict[str, Any]:
    """Read RUN/launcher.json (or job.json); empty if there is none. Raise DataError if it is damaged."""
    path = run / name
    if not path.is_file():
        return {}
    kind = _Launcher if name == RECORD else _Job
    record: dict[str, Any] = gate.parse(kind, path.read_bytes(), str(path), "remove the file if nothing of it runs")
    return record


def start_ticks(pid: int) -> int | None:
    """Return when process `pid` started, in clock ticks since boot; None if it is gone or a zombie.

    Pid and start time together identify a process: pids are reused, and zombies still answer `kill -0`.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else int(fields[19])


def is_running(record: dict[str, Any]) -> bool:
    """Return whether the launcher that wrote `record` still runs on this machine."""
    if record.get("host") != socket.gethostname() or "pid" not in record:
        return False
    ticks = start_ticks(int(record["pid"]))
    return ticks is not None and ticks == record.get("start_ticks")


def metrics_size(run: Path) -> int:
    """Return the size of metrics.jsonl in bytes, which grows with every logged step; 0 if there is none."""
    path = run / METRICS
    return path.stat().st_size if path.is_file() else 0


# ----------------------------------------------------------------------------- the record of a submitted job


def job_of(run: Path) -> dict[str, Any]:
    """Read RUN/job.json of a run submitted to a scheduler; empty if there is none.

    Raise ConfigError for an unknown place, DataError if a field of the place is missing.
    """
    record = read_record(run, JOB)
    if record and record.get("place") not in PLACES:
        raise ConfigError(
            f"{run / JOB}: place={record.get('place')!r} is none of {', '.join(sorted(PLACES))}; launch the run again, "
            "or remove the file if nothing of it runs"
        )
    if record and (missing := [key for key in _OF_PLACES[record["place"]] if key not in record]):
        raise DataError(f"{run / JOB}: no {', '.join(missing)}; remove the file if nothing of it runs")
    return record


def look_at_job(run: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the job's place, and what its scheduler knows of it."""
    return {"place": record["place"], **PLACES[record["place"]]().look(record, run)}


def refuse_other_folder(run: str | Path) -> None:
    """Raise ConfigError if `run` holds the config.json of an exported model, which training would replace."""
    try:
        tree = json.loads((Path(run) / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):  # there is none, or a crash damaged it
        return
    if isinstance(tree, dict) and "train" not in tree:
        raise ConfigError(
            f"run={run} is the folder of an exported model, whose config.json it needs; name a new folder"
        )


def refuse_second_launch(run: Path) -> None:
    """Raise ConfigError while this run is running here, or is running or queued at a scheduler."""
    record, job = read_record(run), job_of(run)
    if is_running(record):
        raise ConfigError(f"{run}: process {record['pid']} is training this run; `tessera stop {run}` first")
    if job and (state := look_at_job(run, job)["state"]) in ("queued", "running"):
        raise ConfigError(f"{run}: job {job['job']} of this run is {state}; `tessera stop {run}` first")


# ------------------------------------------------------------------------------------ status, logs, stop


def run_status(run: Path) -> dict[str, Any]:
    """Return state, attempt, step and loss of the run in folder `run`. Raise ConfigError if there is no run."""
    record, job, last = read_record(run), job_of(run), _last_metrics(run)
    if not record and not last and not job:
        lacks = f"no whole step in {METRICS}, and no {RECORD} or {JOB}"
        if not (run / METRICS).is_file():
            lacks = f"none of {RECORD}, {JOB} and {METRICS} is here"
        raise ConfigError(f"{run}: {lacks}; use the folder in `run:` of its configuration")
    status: dict[str, Any] = {"run": str(run), "state": _state(record)}
    status |= (
        look_at_job(run, job)
        if job
        else {
            name: record[name]
            for name in ("host", "pid", "attempt", "world_size", "exit_code", "cause", "why")
            if name in record
        }
    )
    if last:
        status |= {name: last[name] for name in ("step", "loss") if name in last}
        status["goodput"] = round(goodput(run)["goodput"], 3)
    total = _total_steps(run)
    return status | ({"steps": total} if total else {})


def metric_lines(run: Path, lines: int, follow: bool) -> Iterator[str]:
    """Yield the last `lines` complete lines of metrics.jsonl; with `follow`, also new ones until the run ends.

    Without that file on this machine, yield the output of the run's job. Raise ConfigError if there is no job either.
    """
    path = run / METRICS
    if path.is_file():
        return _last_lines(run, path, lines, follow)
    if job_of(run):
        return job_lines(run, lines, follow)
    raise ConfigError(f"{path}: not there; the run has not logged a step yet, or {run} is not its folder")


def job_lines(run: Path, lines: int, follow: bool) -> Iterator[str]:
    """Yield the last lines of the job's output, as `metric_lines` does. Raise ConfigError without a job or output."""
    job = job_of(run)
    if not job:
        raise ConfigError(f"{run / JOB}: not there; this run was not submitted to a scheduler")
    if output := PLACES[job["place"]]().output:
        return output(job, lines, follow)
    path = Path(job["output"])
    _check_output(run, job, path)
    if not path.is_file():
        raise ConfigError(f"{path}: not there; the job is {look_at_job(run, job)['state']} and has printed nothing yet")
    return _last_lines(run, path, lines, follow)


def _check_output(run: Path, job: Mapping[str, Any], path: Path) -> None:
    """Raise DataError unless `path` is an output of the job: job.json may come from elsewhere and name any file.

    Accept a file in the run folder, one whose name holds the job's number, and the one that the scheduler reports.
    Links are followed first.
    """
    real, number = path.resolve(), re.escape(str(job["job"]))
    holds_number = re.fullmatch(r"[0-9_]+", job["job"]) and re.search(rf"(?<![0-9]){number}(?![0-9])", real.name)
    if holds_number or real.is_relative_to(run.resolve()):
        return
    with contextlib.suppress(ConfigError, NodeFault):  # no scheduler on this machine, or it does not answer
        if str(path) == look_at_job(run, job).get("output"):
            return
    raise DataError(
        f"{run / JOB}: output={str(path)!r} is not in the run's folder, its name does not hold the job's number "
        f"{job['job']}, and the scheduler reports no such output; read the file with tail if you trust it, and write "
        "%j into cluster.output"
    )


def _last_lines(run: Path, path: Path, lines: int, follow: bool) -> Iterator[str]:
    size = path.stat().st_size
    found = [line for line in itertools.islice(raw_lines_back(path, end=size), min(lines + 1, sys.maxsize))]
    torn = len(found.pop(0)) if found and not found[0].endswith(b"\n") else 0
    yield from (line.decode(errors="replace").rstrip("\r\n") for line in reversed(found[:lines]))
    with path.open(encoding="utf-8", errors="replace") as file:
        file.seek(size - torn)
        while follow:
            running = _is_alive(run)
            yield from _complete_lines(file)
            if not running:
                return
            time.sleep(ASK_S if job_of(run) else POLL_S)


def stop_run(run: Path, timeout_s: float) -> dict[str, Any]:
    """Ask the run's launcher or job to save and exit, and wait for its end; return its status.

    Raise ConfigError if nothing is running, NodeFault if the end takes longer than `timeout_s`.
    """
    record, began = read_record(run), time.monotonic()
    if job := job_of(run):
        _stop_job(run, job, timeout_s)
        return run_status(run) | {"stop_s": round(time.monotonic() - began, 2)}
    if not is_running(record):
        place = f" on {record['host']}" if record.get("host") not in (None, socket.gethostname()) else ""
        raise ConfigError(f"{run}: no launcher of this run is running here{place and f', it was started{place}'}")
    os.kill(int(record["pid"]), signal.SIGTERM)
    while is_running(record):
        if time.monotonic() - began > timeout_s:
            raise NodeFault(f"{run}: process {record['pid']} is still there after {timeout_s:g} s; it may be saving")
        time.sleep(POLL_S)
    return run_status(run) | {"stop_s": round(time.monotonic() - began, 2)}


def _stop_job(run: Path, job: Mapping[str, Any], timeout_s: float) -> None:
    """Ask the job to stop, repeatedly: a process that started after a request has not received it."""
    state = look_at_job(run, job)["state"]
    if state not in ("queued", "running"):
        raise ConfigError(f"{run}: job {job['job']} is {state}, there is nothing to stop")
    began = asked = time.monotonic()
    PLACES[job["place"]]().stop(job, run)
    while look_at_job(run, job)["state"] in ("queued", "running"):
        now = time.monotonic()
        if now - began > timeout_s:
            raise NodeFault(f"{run}: job {job['job']} is still there after {timeout_s:g} s; it may be saving")
        if now - asked > ASK_AGAIN_S:
            PLACES[job["place"]]().stop(job, run)
            asked = now
        time.sleep(ASK_S)


def _is_alive(run: Path) -> bool:
    job = job_of(run)
    return look_at_job(run, job)["state"] in ("queued", "running") if job else is_running(read_record(run))


def _state(record: dict[str, Any]) -> str:
    if is_running(record):
        return "running"
    if "exit_code" not in record:
        return "lost" if record else "not launched"
    return {0: "done", 75: "stopped"}.get(record["exit_code"], "failed")


def _complete_lines(file: TextIO) -> Iterator[str]:
    """Yield the complete lines from here on; an incomplete last line is left for the next call."""
    while True:
        start = file.tell()
        line = file.readline()
        if not line.endswith("\n"):
            file.seek(start)
            return
        yield line.rstrip("\n")


def _last_metrics(run: Path) -> dict[str, Any]:
    return next(filter(is_step, lines_back(run / METRICS)), {})


def _total_steps(run: Path) -> int | None:
    """Read train.steps of config.json; None if missing or damaged, since a run can be followed without it."""
    try:
        return int(json.loads((run / "config.json").read_text(encoding="utf-8"))["train"]["steps"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
