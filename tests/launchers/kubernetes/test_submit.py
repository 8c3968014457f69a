"""Submission through the real client: everything or nothing, and errors that say what to do."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import ConfigError, NodeFault, TesseraError
from launchers.kubernetes.api import connected
from launchers.kubernetes.submit import submit
from launchers.spec import KubernetesCluster, RunSpec
from launchers.watch import JOB, read_record
from tests.launchers.checking_server import CheckingServer
from tests.launchers.kubernetes.examples import KINDS, example, place, train, trees


def in_folder(spec: RunSpec, folder: Path) -> RunSpec:
    """Keep the records of a submission in a folder of the test."""
    return replace(spec, run_folder=str(folder / "run"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_created_as_it_was_rendered(kind: str, server: CheckingServer, tmp_path: Path) -> None:
    spec, cluster = example(kind)
    record = submit(in_folder(spec, tmp_path), cluster)
    made = list(server.objects.values())
    assert [tree["kind"] for tree in made] == [tree["kind"] for tree in trees(kind)]
    assert (record["kind"], record["job"], record["namespace"]) == (kind.split()[0], spec.name, "default")
    assert read_record(tmp_path / "run", JOB) == record
    for tree in made[:-1]:
        [owner] = tree["metadata"]["ownerReferences"]
        assert (owner["kind"], owner["uid"]) == (record["kind"], made[-1]["metadata"]["uid"])


@pytest.mark.parametrize("kind", ["JobSet", "TrainJob", "RayJob", "Job that builds"])
@pytest.mark.parametrize(
    ("method", "status", "error"), [("POST", 403, ConfigError), ("POST", 500, NodeFault), ("GET", 503, NodeFault)]
)
def test_nothing_is_left_of_a_submission_that_fails(
    kind: str, method: str, status: int, error: type[TesseraError], server: CheckingServer, tmp_path: Path
) -> None:
    spec, cluster = example(kind)
    plural = f"{kind.split()[0].lower()}s"
    server.trouble[method, plural] = status
    if method == "GET":  # the answer is lost once, not for good
        server.passing.add((method, plural))
    with pytest.raises(error, match="this test's trouble"):
        submit(in_folder(spec, tmp_path), cluster)
    assert ("POST", "configmaps") in server.asked
    assert server.objects == {}
    assert not (tmp_path / "run" / JOB).exists()


def test_what_cannot_be_taken_back_is_named(server: CheckingServer, tmp_path: Path) -> None:
    spec, cluster = example("JobSet")
    server.trouble = {("POST", "jobsets"): 403, ("DELETE", "configmaps"): 500}
    with pytest.raises(NodeFault, match="kubectl delete configmap clip-vit-b-32 -n default"):
        submit(in_folder(spec, tmp_path), cluster)


def test_a_job_of_the_same_name_is_left_alone(server: CheckingServer, tmp_path: Path) -> None:
    spec, cluster = example("JobSet")
    submit(in_folder(spec, tmp_path), cluster)
    before = dict(server.objects)
    with pytest.raises(ConfigError, match="already exists; stop or delete that one first"):
        submit(in_folder(spec, tmp_path / "elsewhere"), cluster)
    assert server.objects == before


def test_a_run_that_is_there_is_not_submitted_twice(server: CheckingServer, tmp_path: Path) -> None:
    spec, cluster = example("JobSet")
    submit(in_folder(spec, tmp_path), cluster)
    with pytest.raises(ConfigError, match="of this run is queued; `tessera stop"):
        submit(in_folder(spec, tmp_path), cluster)


def test_a_wrong_description_is_refused_before_anything_is_asked(server: CheckingServer, tmp_path: Path) -> None:
    cluster = place(image="tessera")
    with pytest.raises(ConfigError, match="has no version"):
        submit(in_folder(train(cluster), tmp_path), cluster)
    assert server.asked == []


@pytest.mark.parametrize("kind", ["JobSet", "TrainJob", "RayJob", "Job", "ConfigMap"])
def test_the_client_has_unknown_fields_refused(kind: str, server: CheckingServer) -> None:
    objects: list[dict[str, Any]] = trees(kind if kind != "ConfigMap" else "JobSet")
    tree = objects[0 if kind == "ConfigMap" else -1]
    tree["spek"] = {}
    with connected() as api, pytest.raises(ConfigError, match="(?s)refused to create.*spek"):
        api.create(tree)
    assert server.objects == {}


def test_a_controller_that_is_missing_is_named(server: CheckingServer, tmp_path: Path) -> None:
    spec, cluster = example("JobSet")
    server.trouble["POST", "jobsets"] = 404
    with pytest.raises(ConfigError, match="the cluster lacks the controller of this kind"):
        submit(in_folder(spec, tmp_path), cluster)


# ----------------------------------------------------------------------------------------- no cluster at all


def nowhere() -> tuple[RunSpec, KubernetesCluster]:
    return example("JobSet")


def test_without_the_client_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "kubernetes", None)
    spec, cluster = nowhere()
    with pytest.raises(ConfigError, match=r"pip install 'tessera\[kubernetes\]'"):
        submit(in_folder(spec, tmp_path), cluster)


def test_without_a_kubeconfig_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    spec, cluster = nowhere()
    with pytest.raises(ConfigError, match="no usable kubeconfig.*set KUBECONFIG, or use --dry-run"):
        submit(in_folder(spec, tmp_path), cluster)
    assert not (tmp_path / "run").exists()


def test_a_cluster_that_does_not_answer_is_a_node_fault(
    server: CheckingServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    server.stop()
    spec, cluster = nowhere()
    with pytest.raises(NodeFault, match="the cluster does not answer"):
        submit(in_folder(spec, tmp_path), cluster)
    assert not (tmp_path / "run").exists()
