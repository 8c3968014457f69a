"""Ask a cluster what became of a job, ask a job to save and leave, read what it writes.

To stop is to delete: the pods are told SIGTERM, save, and leave within their grace period; the job is gone when the
last of them is. What was asked for is noted in the run's folder, since the cluster remembers nothing then.
"""

import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from data_pipeline.errors import ConfigError, NodeFault
from launchers.kubernetes.api import APPLICATION, CONTAINER, ApiServer, Refused, Tree, connected

END = "job.end"
"""Written when a stop is asked for: which object."""
GONE = 404
CLEAR_S, POLL_S = 60.0, 0.2
DONE = {"Completed", "Complete"}
EXIT_CODE = re.compile(r"exit code (\d+)")
RAY_STATES = {"Complete": "done", "Failed": "failed", "ValidationFailed": "failed", "Running": "running"}


def look(record: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """-> {"state": queued, running, done, stopped, failed or vanished, and what is known besides}.

    record: what `submit` wrote into `folder`. Raises ConfigError without a client, a kubeconfig or the right to look,
    NodeFault where nobody answers.
    """
    told = {"job": record["job"], "kind": record["kind"], "namespace": record["namespace"]}
    with connected() as api:
        tree = _found(api, record)
        if tree is None:
            return told | _left_behind(record, folder)
        told |= state_of(tree)
        if tree["metadata"].get("deletionTimestamp") and told["state"] in ("queued", "running"):
            return told | {"state": "running", "why": "asked to stop: saving"}
        if told["state"] == "queued" and (why := _waits_for(api, record)):
            told["why"] = why
    return told


def stop(record: Mapping[str, Any], folder: Path) -> None:
    """Ask the job to save and leave for good; returns at once, and may be called again."""
    with connected() as api:
        tree = _found(api, record)
        if tree is None or tree["metadata"].get("deletionTimestamp"):
            return
        (folder / END).write_text(f"{record['uid']} stopped\n", encoding="utf-8")
        api.delete(record["kind"], record["namespace"], record["job"])


def clear(api: ApiServer, record: Mapping[str, Any]) -> None:
    """Delete a job that has ended, so that its name is free again. Raises NodeFault where it does not go."""
    until = time.monotonic() + CLEAR_S
    if _found(api, record) is not None:
        api.delete(record["kind"], record["namespace"], record["job"])
    while _found(api, record) is not None:
        if time.monotonic() > until:
            raise NodeFault(f"{record['kind']} {record['job']} has ended, but is still there after {CLEAR_S:g} s")
        time.sleep(POLL_S)


def output(record: Mapping[str, Any], lines: int, follow: bool) -> Iterator[str]:
    """What rank 0 writes, or the driver of a build. Raises ConfigError where no pod has begun."""
    selector, container = f"{APPLICATION}/instance={record['job']}", CONTAINER
    if record["kind"] == "RayJob":
        selector, container = f"{selector},{APPLICATION}/component=submitter", "submitter"
    elif record["kind"] != "Job":
        selector += ",batch.kubernetes.io/job-completion-index=0"
    with connected() as api:
        begun = [
            pod["metadata"]["name"]
            for pod in api.pods(record["namespace"], selector)
            if pod.get("status", {}).get("phase", "Pending") != "Pending"
        ]
        if not begun:
            raise ConfigError(f"no pod of {record['job']} has begun yet, or all are gone; `tessera status` says which")
        yield from api.log(record["namespace"], begun[-1], container, lines, follow)


# --------------------------------------------------------------------------------------- what the cluster says


def state_of(tree: Tree) -> dict[str, Any]:
    """Ours for theirs, out of an object's status: the state, restarts, and why it failed."""
    status = tree.get("status", {})
    restarts = status.get("restarts", status.get("failed"))
    told: dict[str, Any] = {"restarts": restarts} if restarts else {}
    if "jobDeploymentStatus" in status:  # a RayJob
        state = RAY_STATES.get(status["jobDeploymentStatus"], "queued")
        why = status.get("message") or status.get("reason")
        return told | {"state": state} | ({"why": why} if state == "failed" and why else {})
    holding = {part["type"]: part for part in status.get("conditions", []) if part["status"] == "True"}
    if DONE & holding.keys():
        return told | {"state": "done", "exit_code": 0}
    if "Failed" in holding:
        why = str(holding["Failed"].get("message", ""))
        code = EXIT_CODE.search(why)
        return told | {"state": "failed", "why": why} | ({"exit_code": int(code[1])} if code else {})
    parts = status.get("replicatedJobsStatus", status.get("jobsStatus", [status]))
    ready = any(part.get("ready") for part in parts) and "Suspended" not in holding
    return told | {"state": "running" if ready else "queued"}


def _found(api: ApiServer, record: Mapping[str, Any]) -> Tree | None:
    """The object; None where it is gone, or another one has its name by now."""
    try:
        tree = api.read(record["kind"], record["namespace"], record["job"])
    except Refused as error:
        if error.status == GONE:
            return None
        raise
    return tree if tree["metadata"].get("uid") == record["uid"] else None


def _left_behind(record: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Of a job that the cluster knows no more: was it stopped from here?"""
    path = folder / END
    if path.is_file() and path.read_text(encoding="utf-8").split() == [record["uid"], "stopped"]:
        return {"state": "stopped"}
    return {"state": "vanished", "why": "the cluster knows it no more: somebody deleted it; the same command goes on"}


def _waits_for(api: ApiServer, record: Mapping[str, Any]) -> str:
    """Why a pod has not begun: no machine with room, no image, a volume or a Secret that is not there."""
    for pod in api.pods(record["namespace"], f"{APPLICATION}/instance={record['job']}"):
        status = pod.get("status", {})
        for condition in status.get("conditions", []):
            if condition["type"] == "PodScheduled" and condition["status"] == "False":
                return str(condition.get("message", ""))
        for container in status.get("containerStatuses", []):
            waiting = container.get("state", {}).get("waiting", {})
            if waiting:
                return f"{waiting.get('reason', '')}: {waiting.get('message', '')}".strip(": ")
    return ""
