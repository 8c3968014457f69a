"""Submit, query and stop Slurm jobs. Works with accounting and without.

The controller knows a job until MinJobAge after its end; sacct knows it for longer, where a site has it; what the
batch script wrote into the run's folder at its end is kept for good.
"""

import re
import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.errors import ConfigError, NodeFault, Requeue

END = "job.end"
"""File that the batch script writes: job, number of restarts and exit code of its latest end."""
ENDED = re.compile(r"\s*(?P<job>[0-9_]+) (?P<restarts>[0-9]+) (?P<code>[0-9]{1,3})\s*")
TOOL_TIMEOUT_S = 60
PENDING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD")
RUNNING = ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING")
SACCT_FIELDS = ("JobID", "JobName", "State", "ExitCode", "NodeList")
FIELD = re.compile(r"(\S+?)=(.*?)(?= [A-Za-z:/]+=|$)")
NO_ANSWER = re.compile("Unable to contact slurm controller|Socket timed out|in standby mode")
"""Messages of Slurm's tools when the request itself is not at fault."""


def hand_in(script: Path, name: str) -> str:
    """Submit the script of a job called `name` with sbatch; return the job's number.

    Raise ConfigError with the scheduler's message if it refuses, NodeFault if it does not answer. It may have accepted
    the job even then: a busy controller reads later what it was sent.
    """
    then = f"once `scontrol ping` says UP, check that `squeue --me --name={name}` is empty, then run the command again"
    try:
        done = _run("sbatch", "--parsable", str(script))
    except NodeFault as error:
        raise NodeFault(f"{error}; {then}") from None
    words = done.stderr.strip() or f"exit code {done.returncode}"
    if done.returncode and NO_ANSWER.search(words):
        raise NodeFault(f"Slurm does not answer: {words}; {then}")
    if done.returncode:
        raise ConfigError(f"sbatch refused {script}: {words}")
    return done.stdout.strip().partition(";")[0]


def take_back(jobs: Sequence[str]) -> str:
    """Cancel jobs that were just submitted; return a message about the outcome."""
    listed = f"{'job' if len(jobs) == 1 else 'jobs'} {', '.join(jobs)}"
    try:
        done = _run("scancel", *jobs)
        why = done.stderr.strip() or f"exit code {done.returncode}" if done.returncode else ""
    except NodeFault as error:
        why = str(error)
    if why:
        return f"{listed} may be left in the queue ({why}); once Slurm answers: scancel {' '.join(jobs)}"
    return f"{listed} cancelled: no job of this launch is left in the queue"


def look(record: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return "state" (queued, running, done, stopped, cancelled, failed or vanished) and other known fields.

    record: what `submit` wrote into `folder`. Raise ConfigError if there is no Slurm, NodeFault if it does not answer.
    """
    rows = _controller(record) or _accounting(record)
    if not rows:
        return {"job": record["job"]} | _left_behind(record, folder)
    states = Counter(_state(row) for row in rows)
    told: dict[str, Any] = {"job": record["job"], "state": _of_all(states)}
    if len(rows) > 1:
        return told | {"tasks": dict(states)}
    row = rows[0]
    known = {
        "reason": row.get("Reason", "None"),
        "nodes": row.get("NodeList", ""),
        "restarts": row.get("Restarts", ""),
        "excluded": row.get("ExcNodeList", ""),
        "output": row.get("StdOut", ""),
    }
    told |= {name: value for name, value in known.items() if value not in ("", "None", "(null)", "None assigned")}
    if told["state"] in ("done", "stopped", "failed"):
        told |= {"slurm_state": row["State"], "exit_code": _exit_code(row)}
    return told


def stop(record: Mapping[str, Any], folder: Path) -> None:
    """Ask the job to save and exit for good. Returns at once; may be called again.

    A job that has not started, or has nothing to save, is cancelled.
    """
    job, state = str(record["job"]), look(record, folder)["state"]
    if state not in ("queued", "running"):
        return
    if not record.get("saves"):
        _run("scancel", job)
        return
    _run("scancel", "--state=PENDING", job)
    # 1. Without this, the job's own script would requeue it after the save.
    _run("scontrol", "update", f"JobId={job}", "Requeue=0")
    # 2. Signal the processes, not the script: they save and exit with 75. A second signal has no further effect.
    _run("scancel", "--signal=USR1", job)


# ------------------------------------------------------------------------------------------ sources of state


def _controller(record: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return scontrol's rows: one per task of an array, otherwise one; none if the controller forgot the job."""
    done = _run("scontrol", "show", "job", "--oneliner", str(record["job"]))
    if done.returncode:
        if "Invalid job id" in done.stderr:
            return []
        raise NodeFault(f"Slurm does not answer: {done.stderr.strip() or f'scontrol exited with {done.returncode}'}")
    rows = [dict(FIELD.findall(line)) for line in done.stdout.splitlines() if line.startswith("JobId=")]
    # Job numbers restart when a site loses its state: another name means another job.
    return [row | {"State": row["JobState"]} for row in rows if row.get("JobName") == record["name"]]


def _accounting(record: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return sacct's rows; none where a site has no accounting."""
    fields = ",".join(SACCT_FIELDS)
    try:
        done = _run("sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={record['job']}", f"-o{fields}")
    except ConfigError:
        return []
    rows = [dict(zip(SACCT_FIELDS, line.split("|"), strict=True)) for line in done.stdout.splitlines() if line]
    return [row for row in rows if row["JobName"] == record["name"]] if done.returncode == 0 else []


def _left_behind(record: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return the end that the batch script recorded, for a job that Slurm no longer knows; else state vanished."""
    path = folder / END
    end = ENDED.fullmatch(path.read_text(encoding="utf-8", errors="replace")) if path.is_file() else None
    if end is not None and end["job"] == str(record["job"]):
        code = int(end["code"])
        return {"state": _ended(code), "exit_code": code, "restarts": end["restarts"]}
    why = "Slurm no longer lists it and its script did not finish; see its output file, then launch it again"
    return {"state": "vanished", "why": why}


# ------------------------------------------------------------------------------------------------ small parts


def _state(row: Mapping[str, str]) -> str:
    """Map Slurm's state of a job to ours."""
    words = row["State"].split()
    if words[0] in PENDING:
        return "queued"
    if words[0] in RUNNING:
        return "running"
    if words[0] == "CANCELLED":
        return "cancelled"
    return _ended(_exit_code(row)) if words[0] in ("COMPLETED", "FAILED") else "failed"


def _ended(code: int) -> str:
    return {0: "done", Requeue.exit_code: "stopped"}.get(code, "failed")


def _of_all(states: Counter[str]) -> str:
    """Return the state of an array: active states take precedence, then failures."""
    order = ("running", "queued", "failed", "cancelled", "stopped", "done")
    return next(state for state in order if states[state])


def _exit_code(row: Mapping[str, str]) -> int:
    """Parse Slurm's "code:signal"; a signal becomes 128 plus its number."""
    code, _, number = row["ExitCode"].partition(":")
    return int(code) or (128 + int(number) if number.isdigit() and int(number) else 0)


def _run(*argv: str) -> "subprocess.CompletedProcess[str]":
    """Run one of Slurm's tools. Raise ConfigError if it is missing, NodeFault if it does not return in time."""
    try:
        return subprocess.run(argv, capture_output=True, text=True, timeout=TOOL_TIMEOUT_S, check=False)
    except FileNotFoundError:
        raise ConfigError(f"no {argv[0]} on this machine; go to a login node of the site") from None
    except subprocess.TimeoutExpired:
        raise NodeFault(f"{argv[0]} did not return within {TOOL_TIMEOUT_S} s; the scheduler may be down") from None
