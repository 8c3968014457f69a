"""Render a RunSpec as Kubernetes objects (plain trees); every kind runs the same program with the same environment.

A training is a JobSet, or a TrainJob with its own runtime, which becomes the same JobSet: one Indexed job with one pod
per node. A pod runs `tessera launch local` as on a laptop; its index is its node rank, and pod 0 has a host name known
in advance. Tasks on a multi-node Ray cluster are a RayJob, all others a plain Job. The resolved recipe is passed in a
ConfigMap, so that exactly what was checked here runs there, whatever recipes the image contains.
"""

import importlib.metadata
from collections.abc import Iterable
from dataclasses import replace
from pathlib import PurePosixPath

import yaml

from data_pipeline.config import BuildConfig
from data_pipeline.errors import ConfigError, Requeue
from data_pipeline.settings import Settings, load_settings
from data_pipeline.text.config import VocabConfig
from launchers.causes import USER_CODE_EXIT
from launchers.kubernetes.api import API_VERSIONS, APPLICATION, CONTAINER, Tree
from launchers.kubernetes.lint import amount_of
from launchers.quoting import command_line, kubelet
from launchers.spec import COMMANDS, KubernetesCluster, RunSpec, Task, check_gpus, split_changes
from pretrain.config import RunConfig

JOB = "node"
FOLDER = "/etc/tessera"
RECIPE, PLACE = "recipe.yaml", "local.yaml"
WORK_FOLDER = PurePosixPath("/work")  # working directory of the image, base of a recipe's relative paths
USER_ID = 1000  # user of the image; nothing runs as root
GRACE_MARGIN_S = 30  # from the launcher's own timeout for a save to the kill
HOPELESS = [USER_CODE_EXIT, ConfigError.exit_code]
OBJECT_STORE_SHARE = 0.9
RECIPES: dict[Task, type[Settings]] = {"train": RunConfig, "build": BuildConfig, "vocab": VocabConfig}


def objects(spec: RunSpec, cluster: KubernetesCluster) -> list[Tree]:
    """Return the objects to create, in order: the last one is the run and will own those before it."""
    check_gpus(spec.procs_per_node, cluster.gpus_per_node)
    _check_storage(spec, cluster)
    files = _files(spec, cluster)
    carried = [_named("ConfigMap", spec, cluster, {"data": files})] if files else []
    if spec.on_ray:
        return [*carried, _ray_job(spec, cluster)]
    if spec.task != "train":
        return [*carried, _single_job(spec, cluster)]
    if cluster.controller == "trainjob":
        return [*carried, *_train_job(spec, cluster)]
    return [*carried, _queued(_named("JobSet", spec, cluster, {"spec": _replicated(spec, cluster, {})}), cluster)]


def _check_storage(spec: RunSpec, cluster: KubernetesCluster) -> None:
    """Raise ConfigError for a storage path on the pod's own disk, which is lost with the pod."""
    volumes = [PurePosixPath(path) for path in cluster.claims.values()]
    for path in spec.storage:
        place = WORK_FOLDER / path
        if "://" not in path and not any(place.is_relative_to(volume) for volume in volumes):
            mounted = ", ".join(map(str, volumes)) or "nothing"
            raise ConfigError(
                f"{path} would be {place} in a pod, outside of the mounted volumes ({mounted}): it would be lost with "
                "the pod. Add a volume claim to `claims:`, or give an s3:// address"
            )


def _files(spec: RunSpec, cluster: KubernetesCluster) -> dict[str, str]:
    """Return the ConfigMap's files: the recipe with all defaults and overrides, and the cluster file for a pod."""
    if spec.task not in RECIPES:
        return {}
    target, *arguments = spec.arguments[len(COMMANDS[spec.task]) :]
    overrides, changes = split_changes(arguments)
    settings = load_settings(RECIPES[spec.task], target, [*overrides, *changes]).model_dump(mode="json")
    files = {RECIPE: yaml.safe_dump(settings, sort_keys=False, allow_unicode=True, width=110)}
    if spec.task == "train":
        files[PLACE] = yaml.safe_dump({"kind": "local", "stop_timeout_s": cluster.stop_timeout_s}, sort_keys=False)
    return files


def _inside(spec: RunSpec, cores: int) -> RunSpec:
    """Return the spec as run inside a pod: with the recipe of the ConfigMap, and one worker per core."""
    whole = spec.with_workers(cores)
    if spec.task not in RECIPES:
        return whole
    workers = whole.arguments[len(spec.arguments) :]
    changes = (f"--change={change}" for change in split_changes(spec.arguments)[1])  # their values are in the recipe
    return replace(spec, arguments=(*COMMANDS[spec.task], f"{FOLDER}/{RECIPE}", *changes, *workers))


def _named(kind: str, spec: RunSpec, cluster: KubernetesCluster, content: Tree) -> Tree:
    metadata = {
        "name": spec.name,
        "namespace": cluster.namespace,
        "labels": _labels(spec),
        "annotations": {"tessera/config-hash": spec.config_hash},
    }
    return {"apiVersion": API_VERSIONS[kind], "kind": kind, "metadata": metadata, **content}


def _labels(spec: RunSpec) -> dict[str, str]:
    return {f"{APPLICATION}/name": "tessera", f"{APPLICATION}/instance": spec.name}


def _queued(tree: Tree, cluster: KubernetesCluster) -> Tree:
    """Add the label of Kueue's queue, if one is configured."""
    if cluster.queue:
        tree["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] = cluster.queue
    return tree


# ------------------------------------------------------------------------------------------------ trainings


def _replicated(spec: RunSpec, cluster: KubernetesCluster, job_labels: dict[str, str]) -> Tree:
    """Return the spec of a JobSet."""
    metadata = {"metadata": {"labels": job_labels}} if job_labels else {}
    return {
        "network": {"enableDNSHostnames": True},
        "failurePolicy": _failure_policy(spec),
        "replicatedJobs": [{"name": JOB, "replicas": 1, "template": {**metadata, "spec": _nodes(spec, cluster)}}],
    }


def _failure_policy(spec: RunSpec) -> Tree:
    """Return the failure policy: permanent errors end the run, preemptions restart it for free, others use a retry.

    The patterns match the message of the failed job, which quotes the pod failure rule of `_nodes` that applied.
    """

    def rule(name: str, action: str, *messages: str) -> Tree:
        return {
            "name": name,
            "action": action,
            "onJobFailureReasons": ["PodFailurePolicy"],
            "onJobFailureMessagePatterns": list(messages),
        }

    hopeless = "|".join(map(str, HOPELESS))
    return {
        "maxRestarts": spec.retries,
        "rules": [
            rule(
                "disruption",
                "RestartJobSetAndIgnoreMaxRestarts",
                "condition DisruptionTarget matching",
                f"exit code {Requeue.exit_code} matching",
            ),
            rule("configuration_or_code", "FailJobSet", f"exit code ({hopeless}) matching"),
        ],
    }


def _nodes(spec: RunSpec, cluster: KubernetesCluster) -> Tree:
    """Return an Indexed job with one pod per node and no retries of its own: all nodes restart together."""
    return {
        "completionMode": "Indexed",
        "completions": spec.nodes,
        "parallelism": spec.nodes,
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": _pod_rules(disrupted="FailJob")},
        "template": _pod(spec, cluster, _trainer(spec, cluster)),
    }


def _pod_rules(disrupted: str) -> list[Tree]:
    """Return rules that separate pods that were evicted or saved on request from permanent errors.

    The first matching rule applies: the exit code of a pod that is being evicted means nothing.
    """

    def left_with(codes: list[int], action: str) -> Tree:
        return {"action": action, "onExitCodes": {"containerName": CONTAINER, "operator": "In", "values": codes}}

    return [
        {"action": disrupted, "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        left_with([Requeue.exit_code], disrupted),
        left_with(HOPELESS, "FailJob"),
    ]


def _trainer(spec: RunSpec, cluster: KubernetesCluster) -> Tree:
    """Return the container of a node. Kubernetes expands $(...) from the environment.

    The controller of Indexed jobs sets JOB_COMPLETION_INDEX; the JobSet controller labels pods with the attempt.
    """
    options = {
        "--cluster": f"{FOLDER}/{PLACE}",
        "--nodes": str(spec.nodes),
        "--procs-per-node": str(spec.procs_per_node),
        "--node-rank": "$(JOB_COMPLETION_INDEX)",
        "--master-addr": "$(MASTER_ADDR)",
        "--master-port": str(cluster.master_port),
        "--restarts": "0",
    }
    command = ["launch", "local", f"{FOLDER}/{RECIPE}", *(part for option in options.items() for part in option)]
    attempt = {"fieldRef": {"fieldPath": "metadata.labels['jobset.sigs.k8s.io/restart-attempt']"}}
    env: list[Tree] = [
        {"name": "MASTER_ADDR", "value": f"{spec.name}-{JOB}-0-0.{spec.name}"},
        {"name": "TESSERA_ATTEMPT", "valueFrom": attempt},
    ]
    container = _container(spec, cluster, _program(command), env)
    return container | {"ports": [{"containerPort": cluster.master_port}]}


def _train_job(spec: RunSpec, cluster: KubernetesCluster) -> list[Tree]:
    """Return a TrainJob and its runtime, which holds what a TrainJob cannot express: failures, volumes, placement."""
    step = {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    runtime = {
        "mlPolicy": {"numNodes": spec.nodes, "torch": {}},
        "template": {"spec": _replicated(spec, cluster, step)},
    }
    job = {
        "runtimeRef": {
            "apiGroup": API_VERSIONS["TrainingRuntime"].partition("/")[0],
            "kind": "TrainingRuntime",
            "name": spec.name,
        },
        "trainer": {"numNodes": spec.nodes, "numProcPerNode": spec.procs_per_node},
    }
    return [
        _named("TrainingRuntime", spec, cluster, {"spec": runtime}),
        _queued(_named("TrainJob", spec, cluster, {"spec": job}), cluster),
    ]


# ------------------------------------------------------------------------------------ single tasks, data builds


def _single_job(spec: RunSpec, cluster: KubernetesCluster) -> Tree:
    """Return a Job with one pod: evictions restart it for free, permanent errors end it, others use a retry."""
    container = _container(spec, cluster, _program(map(kubelet, _inside(spec, cluster.cpus_per_node).arguments)), [])
    job = {
        "backoffLimit": spec.retries,
        "podFailurePolicy": {"rules": _pod_rules(disrupted="Ignore")},
        "template": _pod(spec, cluster, container),
    }
    return _queued(_named("Job", spec, cluster, {"spec": job}), cluster)


def _ray_job(spec: RunSpec, cluster: KubernetesCluster) -> Tree:
    """Return a RayJob: a Ray cluster of `nodes` pods for one build or encoding. KubeRay sets the pods' commands.

    It has no rules by exit code: every failure of the driver uses a retry, on new pods.
    """
    inside = _inside(spec, cluster.cpus_per_node * spec.nodes).on_cluster_of("auto")

    def group(name: str) -> Tree:
        parameters = {
            "num-cpus": str(cluster.cpus_per_node),
            "object-store-memory": str(int(OBJECT_STORE_SHARE * amount_of(cluster.shared_memory))),
        }
        pod = _pod(spec, cluster, _container(spec, cluster, [], []) | {"name": f"ray-{name}"})
        return {"rayStartParams": parameters, "template": pod}

    head, workers = group("head"), spec.nodes - 1
    head["rayStartParams"]["dashboard-host"] = "0.0.0.0"
    worker = {"groupName": "node", "replicas": workers, "minReplicas": workers, "maxReplicas": workers}
    job = {
        "entrypoint": kubelet(command_line(_program(inside.arguments))),
        "submissionMode": "K8sJobMode",
        "backoffLimit": spec.retries,
        "shutdownAfterJobFinishes": True,
        "submitterPodTemplate": _submitter(spec, cluster),
        "rayClusterSpec": {
            # Anyone who reaches the head can run code on it, with our secrets. In token mode Ray requires a token,
            # which KubeRay creates for these pods only; KubeRay needs rayVersion for that.
            "rayVersion": importlib.metadata.version("ray"),
            "authOptions": {"mode": "token"},
            "headGroupSpec": head,
            **({"workerGroupSpecs": [worker | group("worker")]} if workers else {}),
        },
    }
    return _queued(_named("RayJob", spec, cluster, {"spec": job}), cluster)


def _submitter(spec: RunSpec, cluster: KubernetesCluster) -> Tree:
    """Return the template of the small pod that submits the build to Ray and shows its output."""
    small = {"cpu": "500m", "memory": "1Gi"}
    container = {
        "name": "submitter",
        "image": cluster.image,
        "resources": {"requests": small, "limits": dict(small)},
        "securityContext": _container_security(cluster),
    }
    labels = _labels(spec) | {f"{APPLICATION}/component": "submitter"}
    return {
        "metadata": {"labels": labels},
        "spec": {"restartPolicy": "Never", "securityContext": _pod_security(), "containers": [container]},
    }


# ---------------------------------------------------------------------------------------------- pods, in general


def _program(arguments: Iterable[str]) -> list[str]:
    """Return the command in exec form: without a shell, signals reach the program."""
    return ["python", "-m", "launchers.cli", *arguments]


def _container(spec: RunSpec, cluster: KubernetesCluster, command: list[str], env: list[Tree]) -> Tree:
    """Return a container: image, environment, secrets by reference, resources, volume mounts."""
    resources = {"cpu": str(cluster.cpus_per_node), "memory": cluster.memory}
    wanted = cluster.gpus_per_node if spec.task == "train" else min(cluster.gpus_per_node, spec.procs_per_node)
    devices = wanted if spec.wants_gpus else 0
    if devices:
        resources[cluster.gpu_resource] = str(devices)
    resources |= {name: str(count) for name, count in sorted(cluster.rdma.items())}
    mounts = [{"name": claim, "mountPath": path} for claim, path in sorted(cluster.claims.items())]
    recipe = [{"name": "recipe", "mountPath": FOLDER, "readOnly": True}] if spec.task in RECIPES else []
    values = [*env, *({"name": name, "value": kubelet(value)} for name, value in spec.environment.items())]
    return {
        "name": CONTAINER,
        "image": cluster.image,
        **({"command": command} if command else {}),
        **({"env": values} if values else {}),
        **({"envFrom": [{"secretRef": {"name": name}} for name in cluster.secrets]} if cluster.secrets else {}),
        "resources": {"requests": resources, "limits": dict(resources)},
        "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}, *recipe, *mounts],
        "securityContext": _container_security(cluster),
    }


def _pod(spec: RunSpec, cluster: KubernetesCluster, container: Tree) -> Tree:
    """Return a pod template for one container: placement, grace period, volumes."""
    claims = [{"name": claim, "persistentVolumeClaim": {"claimName": claim}} for claim in sorted(cluster.claims)]
    recipe = [{"name": "recipe", "configMap": {"name": spec.name}}] if spec.task in RECIPES else []
    annotations = _kueue_topology(spec, cluster)
    tolerations = [{"key": key, "operator": "Exists"} for key in cluster.tolerations]
    return {
        "metadata": {"labels": _labels(spec), **({"annotations": annotations} if annotations else {})},
        "spec": {
            "restartPolicy": "Never",
            # The launcher inside waits lead_s for the save, and the pod must outlive that; other tasks save nothing.
            "terminationGracePeriodSeconds": GRACE_MARGIN_S + (spec.lead_s if spec.saves else 0),
            **({"serviceAccountName": cluster.service_account} if cluster.service_account else {}),
            **({"nodeSelector": dict(sorted(cluster.node_selector.items()))} if cluster.node_selector else {}),
            **({"tolerations": tolerations} if tolerations else {}),
            **_place(spec, cluster),
            "securityContext": _pod_security(),
            "containers": [container],
            "volumes": [
                {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": cluster.shared_memory}},
                *recipe,
                *claims,
            ],
        },
    }


def _kueue_topology(spec: RunSpec, cluster: KubernetesCluster) -> dict[str, str]:
    """Return the annotation for Kueue, which places the pods itself: the topology level to keep them together at."""
    if not (cluster.queue and cluster.topology and spec.nodes > 1):
        return {}
    how = "required" if cluster.topology_required else "preferred"
    return {f"kueue.x-k8s.io/podset-{how}-topology": cluster.topology}


def _place(spec: RunSpec, cluster: KubernetesCluster) -> Tree:
    """Spread pods over machines where possible; without Kueue, also keep them in one topology domain."""
    if spec.nodes == 1:
        return {}
    mine = {"matchLabels": {f"{APPLICATION}/instance": spec.name}}
    spread = {
        "maxSkew": 1,
        "topologyKey": "kubernetes.io/hostname",
        "whenUnsatisfiable": "ScheduleAnyway",
        "labelSelector": mine,
    }
    term = {"labelSelector": mine, "topologyKey": cluster.topology}
    if cluster.queue or not cluster.topology:
        return {"topologySpreadConstraints": [spread]}
    if cluster.topology_required:
        together: Tree = {"requiredDuringSchedulingIgnoredDuringExecution": [term]}
    else:
        weighted = {"weight": 100, "podAffinityTerm": term}
        together = {"preferredDuringSchedulingIgnoredDuringExecution": [weighted]}
    return {"affinity": {"podAffinity": together}, "topologySpreadConstraints": [spread]}


def _pod_security() -> Tree:
    """Run as a non-root user; mounted volumes belong to its group."""
    return {
        "runAsNonRoot": True,
        "runAsUser": USER_ID,
        "runAsGroup": USER_ID,
        "fsGroup": USER_ID,
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def _container_security(cluster: KubernetesCluster) -> Tree:
    """Drop all capabilities, but with RDMA add IPC_LOCK, needed to pin memory."""
    pinning = {"add": ["IPC_LOCK"]} if cluster.rdma else {}
    return {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"], **pinning}}
