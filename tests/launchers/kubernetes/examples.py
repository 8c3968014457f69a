"""What the tests of Kubernetes render: a cluster with everything set, and one of each kind of object."""

from collections.abc import Callable
from typing import Any

from launchers.kubernetes.submit import rendered
from launchers.spec import KubernetesCluster, RunSpec, describe, load_cluster

RECIPE = "configs/clip/vit-b-32.yaml"
BUILD = "configs/data/folder.yaml"
Tree = dict[str, Any]

FULL: dict[str, Any] = {
    "rdma": {"rdma/hca": 8},
    "secrets": ("s3-credentials", "mlflow"),
    "node_selector": {"gpu": "h100", "zone": "a"},
    "tolerations": ("nvidia.com/gpu", "research"),
    "env": {"AWS_ENDPOINT_URL": "https://s3.example.com", "NCCL_DEBUG": "WARN"},
}


def place(**changes: Any) -> KubernetesCluster:
    """configs/cluster/kubernetes.yaml with some keys changed."""
    example = load_cluster(KubernetesCluster, None)
    return KubernetesCluster.model_validate(example.model_dump() | changes)


def train(cluster: KubernetesCluster, *overrides: str) -> RunSpec:
    return describe(RECIPE, overrides, cluster)


def build(cluster: KubernetesCluster) -> RunSpec:
    return describe(BUILD, ["source.path=data/photos", "output=data/mine"], cluster)


def evaluate(cluster: KubernetesCluster) -> RunSpec:
    return describe("runs/clip-vit-b-32", ["--json"], cluster, task="evaluate")


def encode(cluster: KubernetesCluster) -> RunSpec:
    return describe("data/mine", ["--image-tokenizer", "runs/vqgan/export"], cluster, task="encode")


KINDS: dict[str, tuple[Callable[[KubernetesCluster], RunSpec], dict[str, Any]]] = {
    "JobSet": (train, {}),
    "TrainJob": (train, {"controller": "trainjob"}),
    "RayJob": (build, {}),
    "RayJob that encodes": (encode, {"nodes": 3}),
    "Job": (evaluate, {}),
    "Job that builds": (build, {"nodes": 1}),
}


def example(kind: str, **changes: Any) -> tuple[RunSpec, KubernetesCluster]:
    """What runs and where, for one line of KINDS."""
    make, own = KINDS[kind]
    cluster = place(**(own | changes))
    return make(cluster), cluster


def trees(kind: str, **changes: Any) -> list[Tree]:
    """Its objects, the run last."""
    return rendered(*example(kind, **changes))
