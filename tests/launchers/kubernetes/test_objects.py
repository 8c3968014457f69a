"""Objects: golden files, public schemas with unknown fields refused, the program that they start, and their rules.

After an intended change write the golden files again: `TESSERA_WRITE_GOLDEN=1 pytest tests/launchers/kubernetes`.
"""

import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_pipeline.errors import ConfigError
from data_pipeline.settings import digest, load_settings
from launchers.kubernetes.lint import pods
from launchers.kubernetes.submit import render
from pretrain.config import RunConfig
from tests.launchers.checking_server import complaints
from tests.launchers.kubernetes.examples import FULL, KINDS, Tree, example, place, train, trees
from tests.launchers.kubernetes.pods import process_of

GOLDEN = {
    "JobSet": "deploy/base/train.yaml",
    "TrainJob": "tests/launchers/golden/trainjob.yaml",
    "RayJob": "tests/launchers/golden/rayjob.yaml",
    "Job": "tests/launchers/golden/job.yaml",
}


@pytest.mark.parametrize("kind", GOLDEN)
def test_rendered_file_is_the_one_in_the_repository(kind: str) -> None:
    text, path = render(*example(kind)), Path(GOLDEN[kind])
    if os.environ.get("TESSERA_WRITE_GOLDEN") == "1":
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8"), "changed on purpose? TESSERA_WRITE_GOLDEN=1 writes it again"


# -------------------------------------------------------------------------------------------------- schemas


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        FULL,
        FULL | {"queue": "", "topology_required": True},
        {"queue": "", "topology": "", "service_account": "", "tolerations": ()},
    ],
    ids=["example", "everything", "without a queue", "almost nothing"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_objects_fit_the_public_schemas_without_unknown_fields(
    kind: str, changes: dict[str, Any], definitions: Path
) -> None:
    for tree in trees(kind, **changes):
        assert complaints(tree, definitions) == []


def at(tree: Tree, path: str) -> Any:
    """What stands at a dotted path."""
    found: Any = tree
    for step in path.split(".") if path else []:
        found = found[int(step)] if step.isdigit() else found[step]
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "path", "key", "value", "complaint"),
    [
        ("JobSet", "spec.replicatedJobs.0.template.spec.template.spec.containers.0", "imagee", "x", "imagee"),
        ("JobSet", "spec.failurePolicy.rules.0", "action", "Hope", "'Hope' is not one of"),
        ("JobSet", "spec.replicatedJobs.0.template.spec", "completions", "two", "'two' is not of type 'integer'"),
        ("TrainJob", "spec", "managedBy", "me", "ManagedBy must be"),
        ("TrainJob", "spec", "modelConfig", {}, "modelConfig"),
        ("RayJob", "spec.rayClusterSpec.workerGroupSpecs.0", "replicas", "1", "'1' is not of type 'integer'"),
        ("RayJob", "spec.rayClusterSpec", "headGroupSpec", None, "headGroupSpec"),
        ("Job", "spec", "completion", 1, "completion"),
        ("Job", "spec.template.spec.containers.0", "image", 1, "image"),
    ],
)
def test_the_schema_check_refuses_what_is_wrong(
    kind: str, path: str, key: str, value: Any, complaint: str, definitions: Path
) -> None:
    tree = trees(kind)[-1]
    at(tree, path)[key] = value
    assert complaint in "; ".join(complaints(tree, definitions))


# ---------------------------------------------------------------------------------- what the pods start


def program_containers(objects: list[Tree]) -> list[Tree]:
    """The containers that the program runs in; not the one that hands a build to Ray."""
    found = [container for tree in objects for pod in pods(tree) for container in pod["spec"]["containers"]]
    return [container for container in found if container["name"] != "submitter"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_program_has_the_same_environment_in_every_kind(kind: str) -> None:
    spec, _ = example(kind, **FULL)
    told = program_containers(trees(kind, **FULL))
    assert told
    for container in told:
        assert spec.environment.items() <= {entry["name"]: entry.get("value") for entry in container["env"]}.items()
        assert [source["secretRef"]["name"] for source in container["envFrom"]] == ["s3-credentials", "mlflow"]


def test_a_trainjob_becomes_the_pods_of_the_jobset() -> None:
    [_, alone], [_, runtime, _] = trees("JobSet", **FULL), trees("TrainJob", **FULL)
    assert pods(runtime) == pods(alone)


def environments(objects: list[Tree], folder: Path, index: int) -> list[dict[str, str]]:
    """Run the command of a training's pod with --dry-run: what its processes would be told."""
    words, env = process_of(objects, folder, index)
    done = subprocess.run([*words, "--dry-run"], capture_output=True, text=True, timeout=120, env={**os.environ, **env})
    assert done.returncode == 0, done.stderr
    started = [line for line in done.stdout.splitlines() if line != "wait"]
    return [dict(pair.split("=", 1) for pair in shlex.split(line) if "=" in pair) for line in started]


@pytest.mark.slow
def test_the_pods_of_a_training_are_its_ranks(tmp_path: Path) -> None:
    objects = trees("JobSet", stop_timeout_s=450)
    told = [process for index in (0, 1) for process in environments(objects, tmp_path, index)]
    assert [process["RANK"] for process in told] == [str(rank) for rank in range(16)]
    assert {process["WORLD_SIZE"] for process in told} == {"16"}
    assert {process["MASTER_ADDR"] for process in told} == {"clip-vit-b-32-node-0-0.clip-vit-b-32"}
    assert {process["TESSERA_STOP_LEAD_S"] for process in told} == {"450"}


def test_the_recipe_that_travels_along_is_the_one_that_was_checked(tmp_path: Path) -> None:
    cluster = place()
    spec = train(cluster, "optim.lr=0.125", "run=runs/other")
    carried = tmp_path / "recipe.yaml"
    carried.write_text(next(yaml.safe_load_all(render(spec, cluster)))["data"]["recipe.yaml"], encoding="utf-8")
    config = load_settings(RunConfig, carried)
    assert (config.optim.lr, config.run) == (0.125, "runs/other")
    assert digest(config) == spec.config_hash


def test_a_pod_outlives_the_save_that_it_is_asked_for() -> None:
    [pod] = pods(trees("JobSet", stop_timeout_s=900)[-1])
    assert pod["spec"]["terminationGracePeriodSeconds"] == 930


def test_devices_are_asked_for_by_the_names_of_the_site() -> None:
    [container] = program_containers(trees("JobSet", gpu_resource="amd.com/gpu", rdma={"vpc.amazonaws.com/efa": 32}))
    limits = container["resources"]["limits"]
    assert (limits["amd.com/gpu"], limits["vpc.amazonaws.com/efa"]) == ("8", "32")
    assert "IPC_LOCK" in container["securityContext"]["capabilities"]["add"]


# --------------------------------------------------------------------------------------------------- places


@pytest.mark.parametrize("required", [False, True])
def test_kueue_is_told_the_topology_by_annotation(required: bool) -> None:
    [pod] = pods(trees("JobSet", topology_required=required)[-1])
    how = "required" if required else "preferred"
    assert pod["metadata"]["annotations"] == {
        f"kueue.x-k8s.io/podset-{how}-topology": "cloud.provider.com/topology-block"
    }
    assert "affinity" not in pod["spec"]


@pytest.mark.parametrize("required", [False, True])
def test_without_kueue_pods_keep_together_by_affinity(required: bool) -> None:
    [pod] = pods(trees("JobSet", queue="", topology_required=required)[-1])
    rules = pod["spec"]["affinity"]["podAffinity"]
    [how], [[term]] = rules.keys(), rules.values()
    term = term.get("podAffinityTerm", term)
    assert how.startswith("required" if required else "preferred")
    assert term["topologyKey"] == "cloud.provider.com/topology-block"
    assert term["labelSelector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()


@pytest.mark.parametrize(("path", "refused"), [("data", True), ("s3://bucket/pairs", False), ("runs/pairs", False)])
def test_what_would_be_lost_with_a_pod_is_refused(path: str, refused: bool) -> None:
    cluster = place(claims={"runs": "/work/runs"})
    spec = train(cluster, f"data.dataset={path}", "data.text_tokenizer=runs/vocab.model")
    if not refused:
        render(spec, cluster)
        return
    with pytest.raises(ConfigError, match="data would be /work/data in a pod, outside of the mounted volumes"):
        render(spec, cluster)


# ------------------------------------------------------------------------------------ rules for failed pods


def fate_of_job(job: Tree, code: int, disrupted: bool) -> tuple[str, str]:
    """What the Job controller does about a failed pod -> (action, message), as batch/v1 documents its rules."""
    for position, rule in enumerate(job["podFailurePolicy"]["rules"]):
        codes = rule.get("onExitCodes", {}).get("values", [])
        if "onPodConditions" in rule and disrupted:
            found = f"Pod ns/p has condition DisruptionTarget matching {rule['action']} rule at index {position}"
            return rule["action"], found
        if code in codes:
            found = f"Container node for pod ns/p failed with exit code {code} matching {rule['action']} rule at index"
            return rule["action"], f"{found} {position}"
    return "Count", ""


def fate_of_jobset(tree: Tree, code: int, disrupted: bool) -> str:
    """What the JobSet controller does about the job that failed over it."""
    action, message = fate_of_job(tree["spec"]["replicatedJobs"][0]["template"]["spec"], code, disrupted)
    reason = "PodFailurePolicy" if action == "FailJob" else "BackoffLimitExceeded"
    for rule in tree["spec"]["failurePolicy"]["rules"]:
        matched = any(re.search(pattern, message) for pattern in rule["onJobFailureMessagePatterns"])
        if reason in rule["onJobFailureReasons"] and matched:
            return str(rule["action"])
    return "RestartJobSet"


@pytest.mark.parametrize(
    ("code", "disrupted", "of_a_training", "of_a_job"),
    [
        (64, False, "FailJobSet", "FailJob"),
        (1, False, "FailJobSet", "FailJob"),
        (70, False, "RestartJobSet", "Count"),
        (74, False, "RestartJobSet", "Count"),
        (137, False, "RestartJobSet", "Count"),
        (75, False, "RestartJobSetAndIgnoreMaxRestarts", "Ignore"),
        (75, True, "RestartJobSetAndIgnoreMaxRestarts", "Ignore"),
        (137, True, "RestartJobSetAndIgnoreMaxRestarts", "Ignore"),
        (1, True, "RestartJobSetAndIgnoreMaxRestarts", "Ignore"),
    ],
)
def test_what_a_pod_leaves_with_decides(code: int, disrupted: bool, of_a_training: str, of_a_job: str) -> None:
    assert fate_of_jobset(trees("JobSet")[-1], code, disrupted) == of_a_training
    assert fate_of_job(trees("Job")[-1]["spec"], code, disrupted)[0] == of_a_job


@pytest.mark.parametrize("kind", ["JobSet", "TrainJob", "RayJob", "Job"])
def test_the_budget_is_the_clusters(kind: str) -> None:
    spec = trees(kind, max_restarts=7)[-1 if kind != "TrainJob" else -2]["spec"]
    inner = spec["template"]["spec"] if kind == "TrainJob" else spec
    assert inner.get("failurePolicy", {}).get("maxRestarts", inner.get("backoffLimit")) == 7
