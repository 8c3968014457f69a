"""RunSpec -> a JobSet (jobset.x-k8s.io/v1alpha2), and its creation through the Kubernetes client.

One Indexed job with a pod per node. A pod runs `tessera launch local`, the same program as on a laptop, which starts
the node's processes; the pod's index is its node rank, and pod 0 answers under a name known beforehand.
"""

import re
from typing import Any

import yaml

from data_pipeline.errors import ConfigError, NodeFault
from launchers.spec import KubernetesCluster, RunSpec, check_gpus

JOB = "node"
CONTAINER = "train"
DNS_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
GROUP, VERSION, PLURAL = "jobset.x-k8s.io", "v1alpha2", "jobsets"


def render(spec: RunSpec, cluster: KubernetesCluster) -> str:
    """The JobSet as YAML. Raises ConfigError for what no cluster can run."""
    return f"# {spec.header}\n" + yaml.safe_dump(jobset(spec, cluster), sort_keys=False, allow_unicode=True, width=110)


def jobset(spec: RunSpec, cluster: KubernetesCluster) -> dict[str, Any]:
    """The JobSet as a plain tree."""
    check_gpus(spec.procs_per_node, cluster.gpus_per_node)
    _check_names(spec, cluster)
    queue = {"kueue.x-k8s.io/queue-name": cluster.queue} if cluster.queue else {}
    metadata = {
        "name": spec.name,
        "namespace": cluster.namespace,
        "labels": {"app.kubernetes.io/name": "tessera", **queue},
        "annotations": {"tessera/config-hash": spec.config_hash},
    }
    return {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "network": {"enableDNSHostnames": True},
            "failurePolicy": _failure_policy(cluster),
            "replicatedJobs": [{"name": JOB, "replicas": 1, "template": {"spec": _job(spec, cluster)}}],
        },
    }


def _failure_policy(cluster: KubernetesCluster) -> dict[str, Any]:
    """A wrong configuration ends the JobSet; a preemption costs nothing of the budget; the rest restarts within it."""

    def rule(name: str, action: str, message: str) -> dict[str, Any]:
        return {
            "name": name,
            "action": action,
            "onJobFailureReasons": ["PodFailurePolicy"],
            "onJobFailureMessagePatterns": [message],
        }

    return {
        "maxRestarts": cluster.max_restarts,
        "rules": [
            rule("configuration", "FailJobSet", "exit code 64"),
            rule("disruption", "RestartJobSetAndIgnoreMaxRestarts", "DisruptionTarget"),
        ],
    }


def _job(spec: RunSpec, cluster: KubernetesCluster) -> dict[str, Any]:
    """Indexed, a pod per node, no retries of its own: the nodes of a run go on together or not at all."""
    rules = [
        {"action": "FailJob", "onExitCodes": {"containerName": CONTAINER, "operator": "In", "values": [64]}},
        {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
    ]
    return {
        "completionMode": "Indexed",
        "completions": spec.nodes,
        "parallelism": spec.nodes,
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": rules},
        "template": {"spec": _pod(spec, cluster)},
    }


def _pod(spec: RunSpec, cluster: KubernetesCluster) -> dict[str, Any]:
    resources = {"cpu": str(cluster.cpus_per_node), "memory": cluster.memory}
    if cluster.gpus_per_node:
        resources[cluster.gpu_resource] = str(cluster.gpus_per_node)
    claims = sorted(cluster.claims.items())
    mounts = [{"name": claim, "mountPath": path} for claim, path in claims]
    volumes = [{"name": claim, "persistentVolumeClaim": {"claimName": claim}} for claim, _ in claims]
    return {
        "restartPolicy": "Never",
        # The launcher inside waits stop_timeout_s for the save; the pod must outlive that.
        "terminationGracePeriodSeconds": cluster.stop_timeout_s + 30,
        "containers": [
            {
                "name": CONTAINER,
                "image": cluster.image,
                "command": _command(spec, cluster),
                "env": _environment(spec),
                "ports": [{"containerPort": cluster.master_port}],
                "resources": {"requests": resources, "limits": dict(resources)},
                "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}, *mounts],
            }
        ],
        "volumes": [{"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": cluster.shared_memory}}, *volumes],
    }


def _command(spec: RunSpec, cluster: KubernetesCluster) -> list[str]:
    """Exec form: signals reach the launcher, no shell in between. Kubernetes fills in $(...) from the environment."""
    _, *recipe = spec.arguments
    options = {
        "--nodes": str(spec.nodes),
        "--procs-per-node": str(spec.procs_per_node),
        "--node-rank": "$(JOB_COMPLETION_INDEX)",
        "--master-addr": "$(MASTER_ADDR)",
        "--master-port": str(cluster.master_port),
        "--restarts": "0",
    }
    flat = [part for option in options.items() for part in option]
    return ["python", "-m", "launchers.cli", "launch", "local", *recipe, *flat]


def _environment(spec: RunSpec) -> list[dict[str, Any]]:
    """The controller of Indexed jobs adds JOB_COMPLETION_INDEX; the JobSet controller labels pods with the attempt."""
    attempt = {"fieldRef": {"fieldPath": "metadata.labels['jobset.sigs.k8s.io/restart-attempt']"}}
    return [
        {"name": "MASTER_ADDR", "value": f"{spec.name}-{JOB}-0-0.{spec.name}"},
        {"name": "TESSERA_ATTEMPT", "valueFrom": attempt},
        *({"name": name, "value": value} for name, value in spec.environment.items()),
    ]


def _check_names(spec: RunSpec, cluster: KubernetesCluster) -> None:
    """What the schema cannot see: DNS labels, and an image that names one version."""
    for what, value in [("name", spec.name), ("namespace", cluster.namespace), *(("claim", c) for c in cluster.claims)]:
        if not DNS_LABEL.fullmatch(value):
            raise ConfigError(f"{what}={value!r} is no DNS label; use a-z, 0-9 and '-' inside, at most 63")
    tag = cluster.image.rpartition("/")[2].partition(":")[2]
    if not tag or tag == "latest":
        raise ConfigError(f"image={cluster.image!r} names no version; add a tag other than latest, or a digest")


def submit(spec: RunSpec, cluster: KubernetesCluster) -> str:
    """Create the JobSet -> its name. Raises ConfigError (no client, no kubeconfig, refused) or NodeFault."""
    body = jobset(spec, cluster)
    try:
        from kubernetes import client, config
        from urllib3.exceptions import HTTPError
    except ImportError:
        raise ConfigError("no Kubernetes client here; pip install 'tessera[kubernetes]', or use --dry-run") from None
    try:
        config.load_kube_config()
        client.CustomObjectsApi().create_namespaced_custom_object(GROUP, VERSION, cluster.namespace, PLURAL, body)
    except config.ConfigException as error:
        raise ConfigError(f"no usable kubeconfig: {error}; set KUBECONFIG, or use --dry-run") from None
    except client.ApiException as error:
        raise ConfigError(f"the cluster refused {spec.name}: {error.status} {error.reason}: {error.body}") from None
    except (HTTPError, OSError) as error:
        raise NodeFault(f"the cluster does not answer: {error}") from None
    return spec.name
