"""RunSpec -> Kubernetes objects, as plain trees: what runs is the same program with the same environment in each kind.

A training is a JobSet, or a TrainJob with a runtime of its own, which becomes the same JobSet: one Indexed job with a
pod per node. A pod runs `tessera launch local` as on a laptop, its index is its node rank, and pod 0 answers under a
name known beforehand. What needs a Ray of several nodes is a RayJob, everything else a plain Job. The recipe travels
along in a ConfigMap, resolved: what was checked here is what runs there, whatever recipes the image holds.
"""

import importlib.metadata
from collections.abc import Iterable
from dataclasses import replace
from pathlib import PurePosixPath

import yaml

from data_pipeline.config import BuildConfig, VocabConfig
from data_pipeline.errors import ConfigError, Requeue
from data_pipeline.settings import Settings, load_settings
from launchers.causes import USER_CODE_EXIT
from launchers.kubernetes.api import API_VERSIONS, APPLICATION, CONTAINER, Tree
from launchers.kubernetes.lint import amount_of
from launchers.quoting import command_line, kubelet
from launchers.spec import COMMANDS, KubernetesCluster, RunSpec, Task, check_gpus, split_changes
from pretrain.config import RunConfig

JOB = "node"
FOLDER = "/etc/tessera"
RECIPE, PLACE = "recipe.yaml", "local.yaml"
WORK_FOLDER = PurePosixPath("/work")  # the image's: relative paths of a recipe start here
USER_ID = 1000  # the image's user: nothing here runs as root
GRACE_MARGIN_S = 30  # from the end of the launcher's patience to the kill
HOPELESS = [USER_CODE_EXIT, ConfigError.exit_code]
OBJECT_STORE_SHARE = 0.9
RECIPES: dict[Task, type[Settings]] = {"train": RunConfig, "build": BuildConfig, "vocab": VocabConfig}


def objects(spec: RunSpec, cluster: KubernetesCluster) -> list[Tree]:
    """What is to be created, in this order: the last one is the run, those before it belong to it."""
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
    """A pod's own disk is empty at its start and gone at its end."""
    volumes = [PurePosixPath(path) for path in cluster.claims.values()]
    for path in spec.storage:
        place = WORK_FOLDER / path
        if "://" not in path and not any(place.is_relative_to(volume) for volume in volumes):
            mounted = ", ".join(map(str, volumes)) or "nothing"
            raise ConfigError(
                f"{path} would be {place} in a pod, where no volume is mounted ({mounted} is): it would be lost with "
                "the pod. Add a volume claim to `claims:`, or give an s3:// address"
            )


def _files(spec: RunSpec, cluster: KubernetesCluster) -> dict[str, str]:
    """What travels along: the recipe with every default and override in it, and the place as it is inside a pod."""
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
    """The same as a pod sees it: with the recipe that travelled along, and a process for each core."""
    whole = spec.with_workers(cores)
    if spec.task not in RECIPES:
        return whole
    workers = whole.arguments[len(spec.arguments) :]
    changes = (f"--change={change}" for change in split_changes(spec.arguments)[1])  # values are in the recipe already
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
    """Into Kueue's queue, where there is one."""
    if cluster.queue:
        tree["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] = cluster.queue
    return tree


# ------------------------------------------------------------------------------------------------ trainings


def _replicated(spec: RunSpec, cluster: KubernetesCluster, job_labels: dict[str, str]) -> Tree:
    """The spec of a JobSet."""
    metadata = {"metadata": {"labels": job_labels}} if job_labels else {}
    return {
        "network": {"enableDNSHostnames": True},
        "failurePolicy": _failure_policy(spec),
        "replicatedJobs": [{"name": JOB, "replicas": 1, "template": {**metadata, "spec": _nodes(spec, cluster)}}],
    }


def _failure_policy(spec: RunSpec) -> Tree:
    """What stays wrong ends the run; a preemption costs nothing of the budget; the rest restarts within it.

    The patterns are read in the message of the failed job, which quotes the rule of `_nodes` that failed it.
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
    """Indexed, a pod per node, no retries of its own: the nodes of a run go on together or not at all."""
    return {
        "completionMode": "Indexed",
        "completions": spec.nodes,
        "parallelism": spec.nodes,
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": _pod_rules(disrupted="FailJob")},
        "template": _pod(spec, cluster, _trainer(spec, cluster)),
    }


def _pod_rules(disrupted: str) -> list[Tree]:
    """A pod that was taken away, or that saved because it was asked to, is told from one that stays wrong.

    The first rule that matches counts: what a pod leaves with while it is taken away says nothing.
    """

    def left_with(codes: list[int], action: str) -> Tree:
        return {"action": action, "onExitCodes": {"containerName": CONTAINER, "operator": "In", "values": codes}}

    return [
        {"action": disrupted, "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        left_with([Requeue.exit_code], disrupted),
        left_with(HOPELESS, "FailJob"),
    ]


def _trainer(spec: RunSpec, cluster: KubernetesCluster) -> Tree:
    """The container of a node. Kubernetes fills in $(...) from the environment.

    The controller of Indexed jobs adds JOB_COMPLETION_INDEX; the JobSet controller labels pods with the attempt.
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
    """A TrainJob and the runtime it names, which holds what a TrainJob cannot say: failures, volumes, places."""
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
    """One pod, started again within the budget unless it stays wrong; one that was taken away costs nothing of it."""
    container = _container(spec, cluster, _program(map(kubelet, _inside(spec, cluster.cpus_per_node).arguments)), [])
    job = {
        "backoffLimit": spec.retries,
        "podFailurePolicy": {"rules": _pod_rules(disrupted="Ignore")},
        "template": _pod(spec, cluster, container),
    }
    return _queued(_named("Job", spec, cluster, {"spec": job}), cluster)


def _ray_job(spec: RunSpec, cluster: KubernetesCluster) -> Tree:
    """A Ray cluster of `nodes` pods for one build or encoding. KubeRay fills in the commands of its pods.

    It knows no rule by exit code: every failure of the driver is tried again within the budget, on new pods.
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
            # Who reaches the head may run code on it, with our secrets: Ray asks for a token, which KubeRay makes and
            # gives to these pods alone. It wants to know the version for that.
            "rayVersion": importlib.metadata.version("ray"),
            "authOptions": {"mode": "token"},
            "headGroupSpec": head,
            **({"workerGroupSpecs": [worker | group("worker")]} if workers else {}),
        },
    }
    return _queued(_named("RayJob", spec, cluster, {"spec": job}), cluster)


def _submitter(spec: RunSpec, cluster: KubernetesCluster) -> Tree:
    """The small pod that hands the build to Ray and shows its output."""
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
    """Exec form: signals reach the program, no shell in between."""
    return ["python", "-m", "launchers.cli", *arguments]


def _container(spec: RunSpec, cluster: KubernetesCluster, command: list[str], env: list[Tree]) -> Tree:
    """What every program gets: image, environment, secrets by reference, resources, volumes."""
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
    """A pod template around one container: where it may stand, how long it may take to stop, what it mounts."""
    claims = [{"name": claim, "persistentVolumeClaim": {"claimName": claim}} for claim in sorted(cluster.claims)]
    recipe = [{"name": "recipe", "configMap": {"name": spec.name}}] if spec.task in RECIPES else []
    annotations = _kueue_topology(spec, cluster)
    tolerations = [{"key": key, "operator": "Exists"} for key in cluster.tolerations]
    return {
        "metadata": {"labels": _labels(spec), **({"annotations": annotations} if annotations else {})},
        "spec": {
            "restartPolicy": "Never",
            # The launcher inside waits lead_s for the save, and the pod must outlive that; others have nothing to save.
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
    """Kueue places the pods itself: it is told the level at which they belong together."""
    if not (cluster.queue and cluster.topology and spec.nodes > 1):
        return {}
    how = "required" if cluster.topology_required else "preferred"
    return {f"kueue.x-k8s.io/podset-{how}-topology": cluster.topology}


def _place(spec: RunSpec, cluster: KubernetesCluster) -> Tree:
    """Each pod on a machine of its own where possible; without Kueue also all within one part of the network."""
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
    """Nobody is root, and what is mounted belongs to the program's group."""
    return {
        "runAsNonRoot": True,
        "runAsUser": USER_ID,
        "runAsGroup": USER_ID,
        "fsGroup": USER_ID,
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def _container_security(cluster: KubernetesCluster) -> Tree:
    """No capabilities; RDMA alone needs one, to pin memory."""
    pinning = {"add": ["IPC_LOCK"]} if cluster.rdma else {}
    return {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"], **pinning}}
