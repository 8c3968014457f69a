"""Query the state of a submitted job, stop it, and read its log.

Stopping deletes the job: its pods get SIGTERM, save, and exit within their grace period; the job disappears with the
last pod. The request is recorded in the run's folder, since the cluster keeps no record of a deleted job.
"""

import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from data_pipeline.errors import ConfigError, NodeFault
from launchers.kubernetes.api import APPLICATION, CONTAINER, ApiServer, Refused, Tree, connected

END = "job.end"
"""File written when a stop is requested; names the object by uid."""
GONE = 404
CLEAR_S, POLL_S = 60.0, 0.2
DONE = {"Completed", "Complete"}
EXIT_CODE = re.compile(r"exit code (\d+)")
RAY_STATES = {"Complete": "done", "Failed": "failed", "ValidationFailed": "failed", "Running": "running"}


def look(record: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return {"state": queued, running, done, stopped, failed or vanished, ...} with further details.

    record: as `submit` wrote it into `folder`. Raises ConfigError without a client, a kubeconfig or permission,
    NodeFault if the server does not answer.
    """
    told = {"job": record["job"], "kind": record["kind"], "namespace": record["namespace"]}
    with connected() as api:
        tree = _found(api, record)
        if tree is None:
            return told | _left_behind(record, folder)
        told |= state_of(tree)
        if tree["metadata"].get("deletionTimestamp") and told["state"] in ("queued", "running"):
            return told | {"state": "running", "why": "stop requested: saving"}
        if told["state"] == "queued" and (why := _waits_for(api, record)):
            told["why"] = why
    return told


def stop(record: Mapping[str, Any], folder: Path) -> None:
    """Request that the job save and end for good. Returns immediately; idempotent."""
    with connected() as api:
        tree = _found(api, record)
        if tree is None or tree["metadata"].get("deletionTimestamp"):
            return
        (folder / END).write_text(f"{record['uid']} stopped\n", encoding="utf-8")
        api.delete(record["kind"], record["namespace"], record["job"])


def clear(api: ApiServer, record: Mapping[str, Any]) -> None:
    """Delete an ended job and wait until its name is free. Raises NodeFault after CLEAR_S seconds."""
    until = time.monotonic() + CLEAR_S
    if _found(api, record) is not None:
        api.delete(record["kind"], record["namespace"], record["job"])
    while _found(api, record) is not None:
        if time.monotonic() > until:
            raise NodeFault(f"{record['kind']} {record['job']} has ended, but was not deleted within {CLEAR_S:g} s")
        time.sleep(POLL_S)


def output(record: Mapping[str, Any], lines: int, follow: bool) -> Iterator[str]:
    """Yield the log lines of node 0, or of a build's driver. Raises ConfigError if no pod has started."""
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
            raise ConfigError(f"{record['job']} has no pods yet, or all were deleted; see `tessera status`")
        yield from api.log(record["namespace"], begun[-1], container, lines, follow)


# ----------------------------------------------------------------------------------------- state of a job


def state_of(tree: Tree) -> dict[str, Any]:
    """Translate an object's status to our state, its number of restarts, and the reason of a failure."""
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
    """Read the object; None if it is gone or its name now belongs to another one."""
    try:
        tree = api.read(record["kind"], record["namespace"], record["job"])
    except Refused as error:
        if error.status == GONE:
            return None
        raise
    return tree if tree["metadata"].get("uid") == record["uid"] else None


def _left_behind(record: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return the state of a job that no longer exists: stopped if `stop` was called for it, else vanished."""
    path = folder / END
    if path.is_file() and path.read_text(encoding="utf-8").split() == [record["uid"], "stopped"]:
        return {"state": "stopped"}
    return {"state": "vanished", "why": "it was deleted from the cluster; the same command resumes it"}


def _waits_for(api: ApiServer, record: Mapping[str, Any]) -> str:
    """Return why a pod has not started: no node with room, no image, a missing volume or Secret; empty if unknown."""
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
