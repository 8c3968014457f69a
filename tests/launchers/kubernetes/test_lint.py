"""What no schema sees: each mistake is named before anything leaves this machine."""

from typing import Any

import pytest

from data_pipeline.errors import ConfigError
from launchers.kubernetes.lint import amount_of, check, pods, problems
from launchers.kubernetes.submit import rendered
from tests.launchers.kubernetes.examples import FULL, KINDS, place, train, trees
from tests.launchers.kubernetes.test_objects import at


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_rendered_has_no_problem(kind: str) -> None:
    assert problems(trees(kind, **FULL)) == []


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"image": "tessera"}, "has no version; add a tag"),
        ({"image": "example.com:5000/tessera"}, "has no version; add a tag"),
        ({"image": "example.com/tessera:latest"}, "has no version; add a tag"),
        ({"namespace": "My_Team"}, "namespace='My_Team' is not a DNS label"),
        ({"queue": "gpu queue"}, "queue-name='gpu queue'"),
        ({"service_account": "Tessera"}, "service account 'Tessera'"),
        ({"secrets": ["s3_keys"]}, "secret 's3_keys'"),
        ({"rdma": {"rdma/": 1}}, "resource 'rdma/'"),
        ({"memory": "32 GB"}, "memory='32 GB' is not a quantity"),
        ({"shared_memory": "1Ti"}, "shared memory 1Ti counts as memory and is more than its limit 512Gi"),
        ({"env": {"MASTER_ADDR": "10.0.0.1"}}, "env 'MASTER_ADDR' is set twice"),
        ({"claims": {"Data": "/work/data", "r": "/work/runs"}}, "claim 'Data' is not a DNS label"),
        ({"claims": {"d": "/work/data", "r": "/work/runs", "x": "/work/data"}}, "two volumes are mounted at one path"),
        ({"claims": {"d": "/work/data", "r": "/work/runs", "x": "data"}}, "mountPath='data' is not an absolute path"),
        ({"procs_per_node": 16}, "a GPU serves one process"),
    ],
)
def test_a_wrong_cluster_file_is_refused(changes: dict[str, Any], told: str) -> None:
    cluster = place(**changes)
    with pytest.raises(ConfigError, match="(?s).*") as refused:
        rendered(train(cluster), cluster)
    assert told in str(refused.value)


KEY = "AKIA" + "Q" * 16  # the form of a key, not one


@pytest.mark.parametrize(
    ("env", "told"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "abc"}, "env AWS_SECRET_ACCESS_KEY looks like a credential"),
        ({"HF_TOKEN": "abc"}, "env HF_TOKEN looks like a credential"),
        ({"MLFLOW_TRACKING_PASSWORD": "abc"}, "env MLFLOW_TRACKING_PASSWORD looks like a credential"),
        ({"NAMED": KEY}, "value: a value looks like a credential"),
        ({"MLFLOW_TRACKING_URI": "https://me:abc@mlflow.example.com"}, "value: a value looks like a credential"),
    ],
)
def test_a_credential_in_the_environment_is_refused_and_not_repeated(env: dict[str, str], told: str) -> None:
    cluster = place(env=env)
    with pytest.raises(ConfigError) as refused:
        rendered(train(cluster), cluster)
    assert told in str(refused.value) and "put it into a Secret" in str(refused.value)
    assert not any(f"{value}" in str(refused.value) for value in env.values())


def test_a_credential_in_an_override_is_refused() -> None:
    cluster = place()
    with pytest.raises(ConfigError, match="looks like a credential"):
        rendered(train(cluster, "tracking.uri=https://me:abc@mlflow.example.com"), cluster)


@pytest.mark.parametrize("env", [{"TOKENIZERS_PARALLELISM": "false"}, {"AWS_WEB_IDENTITY_TOKEN_FILE": "/var/token"}])
def test_what_only_sounds_like_a_credential_is_taken(env: dict[str, str]) -> None:
    cluster = place(env=env)
    rendered(train(cluster), cluster)


JOB = "spec.replicatedJobs.0.template.spec"
POD = f"{JOB}.template.spec"


@pytest.mark.parametrize(
    ("kind", "path", "key", "value", "told"),
    [
        ("JobSet", "metadata", "name", "7b", "a letter first"),
        ("JobSet", "metadata", "name", "a" * 60, "use a shorter name"),
        ("JobSet", "metadata.labels", "app", "no blanks", "label app='no blanks'"),
        ("JobSet", JOB, "completions", 3, "completions=3 and parallelism=2 must be the same number"),
        ("JobSet", JOB, "backoffLimit", 6, "must be 0"),
        ("JobSet", f"{JOB}.podFailurePolicy.rules.1.onExitCodes", "containerName", "main", "names container 'main'"),
        ("JobSet", f"{JOB}.podFailurePolicy.rules.1.onExitCodes", "values", [0, 75], "without 0"),
        ("JobSet", POD, "restartPolicy", "OnFailure", "needs Never"),
        ("JobSet", POD, "terminationGracePeriodSeconds", 300, "is shorter than the 300 s"),
        ("JobSet", f"{POD}.containers.0", "command", ["bash", "-c", "tessera"], "does not forward signals"),
        ("JobSet", f"{POD}.containers.0.resources.requests", "nvidia.com/gpu", "4", "must be equal"),
        ("JobSet", f"{POD}.containers.0.env.0", "value", "clip-0", "but pod 0 answers as clip-vit-b-32-node-0-0"),
        ("JobSet", f"{POD}.volumes.1", "name", "recipes", "mount 'recipe' has no volume"),
        ("JobSet", "spec.failurePolicy.rules.0", "name", "a-b", "need different names"),
        ("JobSet", "spec.failurePolicy.rules.0", "onJobFailureReasons", ["BadLuck"], "['BadLuck'] is none of"),
        ("TrainJob", "spec.runtimeRef", "name", "torch", "runtimeRef 'torch' is none of"),
        ("TrainJob", "spec.trainer", "env", [{"name": "PET_NNODES", "value": "1"}], "PET_NNODES"),
        ("RayJob", "metadata", "name", "a" * 48, "longer than the 47 characters"),
        ("RayJob", "spec", "submissionMode", "InteractiveMode", "submissionMode='InteractiveMode'"),
        ("RayJob", "spec", "entrypoint", "", "entrypoint is missing"),
        ("RayJob", "spec.rayClusterSpec", "authOptions", {"mode": "disabled"}, "authOptions.mode must be token"),
        ("RayJob", "spec", "shutdownAfterJobFinishes", False, "must be true"),
        ("RayJob", "spec.rayClusterSpec.workerGroupSpecs.0", "maxReplicas", 9, "must be the same number"),
        ("RayJob", "spec.rayClusterSpec.headGroupSpec.rayStartParams", "num-cpus", "9", "but its pod has cpu=64"),
        ("Job", "spec.template.spec", "restartPolicy", "Always", "needs Never"),
    ],
)
def test_what_the_schema_lets_pass_is_named(kind: str, path: str, key: str, value: Any, told: str) -> None:
    objects = trees(kind)
    at(objects[-1], path)[key] = value
    assert told in "; ".join(problems(objects))


def test_a_runtime_without_the_container_of_the_torch_policy_is_named() -> None:
    objects = trees("TrainJob")
    pods(objects[1])[0]["spec"]["containers"][0]["name"] = "train"
    assert "the torch policy looks for one called 'node'" in "; ".join(problems(objects))


def test_every_problem_is_told_at_once() -> None:
    objects = trees("JobSet")
    at(objects[-1], POD)["restartPolicy"] = "Always"
    at(objects[-1], JOB)["completions"] = 3
    with pytest.raises(ConfigError, match="(?s)not submitted: .*needs Never.*must be the same number"):
        check(objects)


@pytest.mark.parametrize(
    ("quantity", "amount"), [("8", 8), ("500m", 0.5), ("1k", 1e3), ("32Gi", 2**35), ("2Ti", 2**41), ("3M", 3e6)]
)
def test_quantities_are_numbers(quantity: str, amount: float) -> None:
    assert amount_of(quantity) == amount
