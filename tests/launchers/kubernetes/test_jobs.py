"""Following and stopping jobs through the real client; the test plays the controllers."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import ConfigError, NodeFault
from launchers.kubernetes.jobs import state_of
from launchers.kubernetes.lint import pods
from launchers.kubernetes.submit import submit
from launchers.watch import metric_lines, run_status, stop_run
from tests.launchers.checking_server import CheckingServer, complaints
from tests.launchers.kubernetes.examples import example, trees
from tests.launchers.kubernetes.test_submit import in_folder

NOW = "2026-01-01T00:00:00Z"
NAME = "clip-vit-b-32"
Tree = dict[str, Any]


def submitted(kind: str, folder: Path) -> Path:
    spec, cluster = example(kind)
    submit(in_folder(spec, folder), cluster)
    return folder / "run"


def condition(name: str, message: str = "", status: str = "True", probed: bool = False) -> Tree:
    told = {"type": name, "status": status, "reason": "Because", "message": message, "lastTransitionTime": NOW}
    return told | ({"lastProbeTime": NOW} if probed else {})


def jobset(ready: int = 0, **more: Any) -> Tree:
    counts = {"active": 1, "failed": 0, "ready": ready, "succeeded": 0, "suspended": 0}
    return {"replicatedJobsStatus": [{"name": "node", **counts}], **more}


def trainjob(ready: int = 0, **more: Any) -> Tree:
    counts = {"active": 1, "failed": 0, "ready": ready, "succeeded": 0, "suspended": 0}
    return {"jobsStatus": [{"name": "node", **counts}], **more}


FAILED = "Container node for pod default/p failed with exit code 64 matching FailJob rule at index 2"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "status", "told"),
    [
        ("JobSet", {}, {"state": "queued"}),
        ("JobSet", {"conditions": [condition("Suspended")]}, {"state": "queued"}),
        ("JobSet", jobset(ready=0), {"state": "queued"}),
        ("JobSet", jobset(ready=1, restarts=2), {"state": "running", "restarts": 2}),
        ("JobSet", {"conditions": [condition("Completed")]}, {"state": "done", "exit_code": 0}),
        (
            "JobSet",
            {"conditions": [condition("Failed", FAILED)]},
            {"state": "failed", "why": FAILED, "exit_code": 64},
        ),
        ("TrainJob", trainjob(ready=1), {"state": "running"}),
        ("TrainJob", {"conditions": [condition("Complete")]}, {"state": "done", "exit_code": 0}),
        ("TrainJob", {"conditions": [condition("Failed", "no")]}, {"state": "failed", "why": "no"}),
        ("RayJob", {"jobDeploymentStatus": "Initializing"}, {"state": "queued"}),
        ("RayJob", {"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"}, {"state": "running"}),
        ("RayJob", {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}, {"state": "done"}),
        (
            "RayJob",
            {"jobDeploymentStatus": "Failed", "message": "driver left", "failed": 4},
            {"state": "failed", "why": "driver left", "restarts": 4},
        ),
        ("Job", {"active": 1, "ready": 1}, {"state": "running"}),
        ("Job", {"active": 1, "ready": 0, "failed": 1}, {"state": "queued", "restarts": 1}),
        ("Job", {"conditions": [condition("Complete", probed=True)]}, {"state": "done", "exit_code": 0}),
    ],
)
def test_the_state_is_read_from_the_status(kind: str, status: Tree, told: Tree, definitions: Path) -> None:
    tree = trees(kind)[-1] | {"status": status}
    assert complaints(tree, definitions) == []
    assert state_of(tree) == told


@pytest.mark.slow
def test_a_job_is_followed_to_its_end(server: CheckingServer, tmp_path: Path) -> None:
    run, seen = submitted("JobSet", tmp_path), []
    statuses: list[Tree] = [
        {"conditions": [condition("Suspended", "waits for its turn")]},
        jobset(ready=1),
        jobset(ready=0, restarts=1),
        {"conditions": [condition("Completed")], "restarts": 1},
    ]
    for status in statuses:
        server.set_status("jobsets", "default", NAME, status)
        seen.append(run_status(run)["state"])
    assert seen == ["queued", "running", "queued", "done"]


@pytest.mark.parametrize(
    ("status", "why"),
    [
        (
            {"phase": "Pending", "conditions": [condition("PodScheduled", "0/4 nodes: Insufficient gpu", "False")]},
            "0/4 nodes: Insufficient gpu",
        ),
        (
            {
                "phase": "Pending",
                "containerStatuses": [
                    {"name": "node", "image": "x", "imageID": "", "ready": False, "restartCount": 0}
                    | {"state": {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}}
                ],
            },
            "ImagePullBackOff: no such image",
        ),
    ],
)
def test_a_job_that_waits_says_what_for(status: Tree, why: str, server: CheckingServer, tmp_path: Path) -> None:
    run = submitted("JobSet", tmp_path)
    server.add_pod("default", f"{NAME}-node-0-0-abcde", pods(trees("JobSet")[-1])[0], status)
    told = run_status(run)
    assert (told["state"], told["why"]) == ("queued", why)


def test_a_job_that_somebody_deleted_has_vanished(server: CheckingServer, tmp_path: Path) -> None:
    run = submitted("JobSet", tmp_path)
    server.remove(("jobsets", "default", NAME))
    assert server.objects == {}, "what belongs to it goes with it"
    assert run_status(run)["state"] == "vanished"
    with pytest.raises(ConfigError, match="is vanished, there is nothing to stop"):
        stop_run(run, timeout_s=5)


def test_another_job_of_the_same_name_is_not_ours(server: CheckingServer, tmp_path: Path) -> None:
    run = submitted("JobSet", tmp_path)
    server.remove(("jobsets", "default", NAME))
    submitted("JobSet", tmp_path / "other")
    assert run_status(run)["state"] == "vanished"
    assert run_status(tmp_path / "other" / "run")["state"] == "queued"


# ------------------------------------------------------------------------------------------------- stopping


def wait_for(true: Callable[[], bool], seconds: float = 30) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.02)


@pytest.mark.parametrize("kind", ["JobSet", "TrainJob", "RayJob", "Job"])
def test_stop_waits_for_the_pods_that_save(kind: str, server: CheckingServer, tmp_path: Path) -> None:
    run, told = submitted(kind, tmp_path), {}
    server.holding = True
    stopping = threading.Thread(target=lambda: told.update(stop_run(run, timeout_s=60)))
    stopping.start()
    wait_for(lambda: any(method == "DELETE" for method, _ in server.asked))
    assert run_status(run)["why"] == "stop requested: saving"
    assert stopping.is_alive()
    server.let_go()
    stopping.join(timeout=30)
    assert told["state"] == "stopped" and told["stop_s"] > 0
    assert server.objects == {}
    assert sum(method == "DELETE" for method, _ in server.asked) == 1


def test_a_save_that_takes_too_long_is_said(server: CheckingServer, tmp_path: Path) -> None:
    run = submitted("JobSet", tmp_path)
    server.holding = True
    with pytest.raises(NodeFault, match="is still there after 0.1 s; it may be saving"):
        stop_run(run, timeout_s=0.1)


def test_a_stopped_run_can_be_submitted_again(server: CheckingServer, tmp_path: Path) -> None:
    run = submitted("JobSet", tmp_path)
    assert stop_run(run, timeout_s=30)["state"] == "stopped"
    submitted("JobSet", tmp_path)
    assert run_status(run)["state"] == "queued"


@pytest.mark.slow
def test_a_run_that_has_ended_makes_room_for_its_next_submission(server: CheckingServer, tmp_path: Path) -> None:
    run = submitted("TrainJob", tmp_path)
    first = server.objects["trainjobs", "default", NAME]["metadata"]["uid"]
    server.set_status("trainjobs", "default", NAME, {"conditions": [condition("Failed", "exit code 64")]})
    assert run_status(run)["state"] == "failed"
    submitted("TrainJob", tmp_path)
    assert server.objects["trainjobs", "default", NAME]["metadata"]["uid"] != first
    assert len(server.objects) == 3
    assert run_status(run)["state"] == "queued"


# --------------------------------------------------------------------------------------------------- output


def begun(server: CheckingServer, name: str, kind: str, log: str, pod: int = 0, **labels: str) -> None:
    server.add_pod("default", name, pods(trees(kind)[-1])[pod], {"phase": "Running"}, log, **labels)


def test_logs_are_what_rank_0_writes(server: CheckingServer, tmp_path: Path) -> None:
    run, index = submitted("JobSet", tmp_path), "batch.kubernetes.io/job-completion-index"
    with pytest.raises(ConfigError, match="clip-vit-b-32 has no pods yet"):
        list(metric_lines(run, 5, follow=False))
    begun(server, f"{NAME}-node-0-1-aaaaa", "JobSet", "not this\n", **{index: "1"})
    begun(server, f"{NAME}-node-0-0-bbbbb", "JobSet", "one\ntwo\nthrée", **{index: "0"})
    assert list(metric_lines(run, 2, follow=False)) == ["two", "thrée"]
    assert list(metric_lines(run, 9, follow=True)) == ["one", "two", "thrée"]


def test_logs_of_a_build_are_its_drivers(server: CheckingServer, tmp_path: Path) -> None:
    run = submitted("RayJob", tmp_path)
    begun(server, "build-mine-head", "RayJob", "not this\n")
    begun(server, "build-mine-submitter", "RayJob", "1,000 samples\n", pod=-1)
    assert list(metric_lines(run, 5, follow=False)) == ["1,000 samples"]


# ----------------------------------------------------------------------------------------- the whole command


def tessera(*words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "launchers.cli", *words], capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.slow
def test_the_commands_launch_follow_and_stop(server: CheckingServer, tmp_path: Path) -> None:
    run = tmp_path / "run"
    claims = f"claims: {{runs: {tmp_path}, data: /work/data}}\nimage: example.com/tessera:1\nkind: kubernetes\n"
    (tmp_path / "cluster.yaml").write_text(claims)
    recipe = ("configs/clip/vit-b-32.yaml", f"run={run}", "--cluster", str(tmp_path / "cluster.yaml"))
    shown = tessera("launch", "kubernetes", *recipe, "--dry-run")
    assert shown.returncode == 0 and server.asked == []
    launched = tessera("launch", "kubernetes", *recipe, "--json")
    assert launched.returncode == 0, launched.stderr
    assert {tree["kind"] for tree in server.objects.values()} == {"ConfigMap", "JobSet"}
    server.set_status("jobsets", "default", "run", jobset(ready=1))
    assert '"state": "running"' in tessera("status", str(run), "--json").stdout
    stopped = tessera("stop", str(run), "--json")
    assert stopped.returncode == 0 and '"state": "stopped"' in stopped.stdout
    again = tessera("stop", str(run))
    assert again.returncode == 64 and "there is nothing to stop" in again.stderr
