"""deploy/: the kustomize example names what exists, fits the schemas, and its documentation says what happens."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from launchers.kubernetes.lint import pods, problems
from tests.launchers.checking_server import complaints
from tests.launchers.kubernetes.kustomize import files, kustomize

DEPLOY = Path("deploy")
OVERLAYS = sorted(path.parent for path in DEPLOY.glob("overlays/*/kustomization.yaml"))
EXAMPLES = [DEPLOY / "base", *OVERLAYS]


@pytest.mark.parametrize("folder", EXAMPLES, ids=str)
def test_every_file_that_is_named_exists_and_the_others_are_named(folder: Path) -> None:
    named = set(files(folder))
    assert {path.resolve() for path in folder.glob("*.yaml")} <= {path.resolve() for path in named}
    assert [path for path in named if not path.is_file()] == []


@pytest.mark.parametrize("folder", EXAMPLES, ids=str)
def test_what_comes_out_fits_the_schemas_and_the_lints(folder: Path, definitions: Path) -> None:
    trees = kustomize(folder)
    assert problems(trees) == []
    for tree in trees:
        assert complaints(tree, definitions) == [], tree["kind"]


@pytest.mark.parametrize("folder", EXAMPLES, ids=str)
def test_everything_that_the_pods_refer_to_is_there(folder: Path) -> None:
    trees = kustomize(folder)
    there = {(tree["kind"], tree["metadata"]["name"]) for tree in trees}
    for pod in [pod["spec"] for tree in trees if tree["kind"] == "JobSet" for pod in pods(tree)]:
        assert ("ServiceAccount", pod["serviceAccountName"]) in there
        for volume in pod["volumes"]:
            if claim := volume.get("persistentVolumeClaim"):
                assert ("PersistentVolumeClaim", claim["claimName"]) in there
            if carried := volume.get("configMap"):
                assert ("ConfigMap", carried["name"]) in there


def test_the_overlay_changes_namespace_queue_image_and_storage() -> None:
    trees = {f"{tree['kind']} {tree['metadata']['name']}": tree for tree in kustomize(DEPLOY / "overlays/research")}
    job = trees["JobSet clip-vit-b-32"]
    [pod] = pods(job)
    assert {tree["metadata"].get("namespace", "research") for tree in trees.values()} == {"research"}
    assert f"LocalQueue {job['metadata']['labels']['kueue.x-k8s.io/queue-name']}" in trees
    assert pod["spec"]["containers"][0]["image"] == "registry.example.com/research/tessera:0.1.0-research"
    assert job["spec"]["failurePolicy"]["maxRestarts"] == 10
    assert trees["PersistentVolumeClaim tessera-runs"]["spec"]["storageClassName"] == "shared-nfs"


@pytest.mark.parametrize("folder", EXAMPLES, ids=str)
def test_kubectl_reads_it_the_same_way(folder: Path) -> None:
    if shutil.which("kubectl") is None:
        pytest.skip("no kubectl here, which no package of Debian's and no index of Python's has: see kustomize.py")
    done = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr

    def by_name(trees: list[dict[str, Any]]) -> dict[str, Any]:
        return {f"{tree['kind']} {tree['metadata']['name']}": tree for tree in trees}

    assert by_name(list(yaml.safe_load_all(done.stdout))) == by_name(kustomize(folder))
