"""Checks of Kubernetes objects beyond their public schemas, run before every submission and by the tests.

A schema covers types and fields, but not that a name becomes a host name, that numbers within a pod must agree, or that
a value is a credential. `problems` takes plain trees of any kind that objects.py renders.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from data_pipeline.errors import ConfigError
from pretrain.runtime.deadline import LEAD_VARIABLE

Tree = Mapping[str, Any]

DNS_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
HOST_LABEL = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")  # service names too must start with a letter
DNS_NAME = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
LABEL_KEY = re.compile(rf"({DNS_NAME.pattern}/)?[A-Za-z0-9]([-A-Za-z0-9_.]{{0,61}}[A-Za-z0-9])?")
ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
RULE_NAME = re.compile(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?")
QUANTITY = re.compile(r"(\d+(?:\.\d+)?)(m|k|[MGTPE]i?|Ki)?")
SHELLS = {"sh", "bash", "dash", "/bin/sh", "/bin/bash", "/usr/bin/bash"}
SUBMISSION_MODES = {"K8sJobMode", "HTTPMode", "SidecarMode"}  # InteractiveMode waits for a person
LONGEST_RAY_JOB = 47
JOB_FAILURES = {
    "BackoffLimitExceeded",
    "DeadlineExceeded",
    "FailedIndexes",
    "MaxFailedIndexesExceeded",
    "PodFailurePolicy",
}
CREDENTIAL_NAME = re.compile(
    r"(^|_)(SECRETS?|TOKEN|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?|API_?KEY|ACCESS_KEY|PRIVATE_KEY)(_|$)",
    re.I,
)
CREDENTIAL_VALUE = re.compile(
    r"\b(AKIA|ASIA)[A-Z0-9]{16}\b|-----BEGIN [A-Z ]*PRIVATE KEY|\b(hf|ghp|gho|glpat)[_-][A-Za-z0-9]{20,}"
    r"|\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.|[a-z][a-z0-9+.-]*://[^/\s:@]+:[^/\s@]+@"
)


def check(objects: Sequence[Tree]) -> None:
    """Raise ConfigError listing every problem found."""
    if found := problems(objects):
        raise ConfigError("not submitted: " + "\n  ".join(found))


def problems(objects: Sequence[Tree]) -> list[str]:
    """Return one sentence for each problem: what no cluster would run, or would run differently than intended."""
    found: list[str] = []
    for tree in objects:
        where = f"{tree.get('kind')} {tree.get('metadata', {}).get('name')}"
        checks: list[Iterator[str]] = [_metadata(tree), _credentials(tree)]
        checks += [_pod(template) for template in pods(tree)]
        checks += [_job(job, tree["kind"]) for job in jobs(tree)]
        special = BY_KIND.get(tree["kind"])
        checks += [special(tree)] if special else []
        found += [f"{where}: {problem}" for check in checks for problem in check]
    return found + [f"TrainJob: {problem}" for problem in _references(objects)]


# ------------------------------------------------------------------------------------- pods and jobs of an object


def jobs(tree: Tree) -> list[Tree]:
    """Return the specs of the batch jobs in an object."""
    if tree["kind"] == "Job":
        return [tree["spec"]]
    spec = tree["spec"]["template"].get("spec", {}) if tree["kind"] == "TrainingRuntime" else tree.get("spec", {})
    return [job["template"]["spec"] for job in spec.get("replicatedJobs", [])]


def pods(tree: Tree) -> list[Tree]:
    """Return the pod templates in an object."""
    if tree["kind"] != "RayJob":
        return [job["template"] for job in jobs(tree)]
    cluster = tree["spec"].get("rayClusterSpec", {})
    groups = [cluster["headGroupSpec"], *cluster.get("workerGroupSpecs", [])]
    submitter = tree["spec"].get("submitterPodTemplate")
    return [group["template"] for group in groups] + ([submitter] if submitter else [])


# ------------------------------------------------------------------------------------------- checks by subject


def _metadata(tree: Tree) -> Iterator[str]:
    """Check names that become host names, service names or labels."""
    metadata = tree["metadata"]
    name, namespace = str(metadata.get("name", "")), str(metadata.get("namespace", "default"))
    hosts = tree["kind"] in ("JobSet", "TrainJob", "RayJob")
    if not (HOST_LABEL if hosts else DNS_LABEL).fullmatch(name):
        first = ", a letter first" if hosts else ""
        yield f"name={name!r} is not a DNS label; use a-z, 0-9 and '-' inside{first}, at most 63"
    if not DNS_LABEL.fullmatch(namespace):
        yield f"namespace={namespace!r} is not a DNS label; use a-z, 0-9 and '-' inside, at most 63"
    metadatas = [metadata, *(template.get("metadata", {}) for template in pods(tree))]
    for key, value in [pair for part in metadatas for pair in part.get("labels", {}).items()]:
        if not LABEL_KEY.fullmatch(key) or not LABEL_VALUE.fullmatch(str(value)):
            yield f"label {key}={value!r}: letters, digits, '-', '_' and '.' only, at most 63"


def _pod(template: Tree) -> Iterator[str]:
    """Check a pod: its containers, volumes and service account."""
    pod = template["spec"]
    volumes = [volume["name"] for volume in pod.get("volumes", [])]
    if len(set(volumes)) < len(volumes):
        yield f"volumes {sorted(volumes)}: a name occurs twice"
    for volume in pod.get("volumes", []):
        claim = volume.get("persistentVolumeClaim", {}).get("claimName")
        if not DNS_LABEL.fullmatch(volume["name"]) or (claim is not None and not DNS_NAME.fullmatch(claim)):
            yield f"claim {claim or volume['name']!r} is not a DNS label; use a-z, 0-9 and '-' inside, at most 63"
    for container in pod["containers"]:
        yield from _image(container)
        yield from _environment(container)
        yield from _resources(container, pod)
        yield from _command(container, pod)
        mounts = container.get("volumeMounts", [])
        for mount in mounts:
            if mount["name"] not in volumes:
                yield f"mount {mount['name']!r} has no volume of that name"
            if not mount["mountPath"].startswith("/") or ":" in mount["mountPath"]:
                yield f"mountPath={mount['mountPath']!r} is not an absolute path"
        if len({mount["mountPath"] for mount in mounts}) < len(mounts):
            yield "two volumes are mounted at one path; give each its own"
    reference = pod.get("serviceAccountName")
    if reference is not None and not DNS_NAME.fullmatch(reference):
        yield f"service account {reference!r} is not a DNS name"


def _image(container: Tree) -> Iterator[str]:
    tag = container["image"].rpartition("/")[2].partition(":")[2]
    if not tag or tag == "latest":
        yield f"image={container['image']!r} has no version; add a tag other than latest, or a digest"


def _environment(container: Tree) -> Iterator[str]:
    """Check that variable names are valid and unique, and that credentials are passed by reference."""
    names = [entry["name"] for entry in container.get("env", [])]
    for name in names:
        if not ENV_NAME.fullmatch(name):
            yield f"env {name!r} is not a variable name"
        if names.count(name) > 1:
            yield f"env {name!r} is set twice; tessera sets it for every run, leave it out"
    for entry in container.get("env", []):
        value = entry.get("value", "")
        if value and not value.startswith("/") and CREDENTIAL_NAME.search(entry["name"]):  # a path is no credential
            yield f"env {entry['name']} looks like a credential; put it into a Secret and name that in `secrets`"
    for source in container.get("envFrom", []):
        name = source.get("secretRef", {}).get("name", "")
        if not DNS_NAME.fullmatch(name):
            yield f"secret {name!r} is not a DNS name"


def _resources(container: Tree, pod: Tree) -> Iterator[str]:
    """Check that limits equal requests (no overcommitment; required for devices) and that shared memory fits.

    Shared memory counts towards the memory limit.
    """
    resources = container.get("resources", {})
    limits, requests = resources.get("limits", {}), resources.get("requests", {})
    if limits != requests or not {"cpu", "memory"} <= limits.keys():
        yield f"limits {limits} and requests {requests} must be equal, with cpu and memory in them"
    for name, amount in limits.items():
        if not QUANTITY.fullmatch(str(amount)):
            yield f"{name}={amount!r} is not a quantity such as 8, 500m, 32Gi"
        elif name not in ("cpu", "memory", "ephemeral-storage") and not str(amount).isdigit():
            yield f"{name}={amount!r}: devices must be a whole number"
        if not LABEL_KEY.fullmatch(name):
            yield f"resource {name!r}: a name such as nvidia.com/gpu or rdma/hca is needed"
    for volume in pod.get("volumes", []):
        size = volume.get("emptyDir", {}).get("sizeLimit")
        if volume.get("emptyDir", {}).get("medium") == "Memory":
            if size is None or not QUANTITY.fullmatch(str(size)):
                yield f"volume {volume['name']!r}: sizeLimit={size!r} is not a quantity such as 8Gi"
            elif QUANTITY.fullmatch(str(limits.get("memory"))) and amount_of(size) > amount_of(limits["memory"]):
                yield f"shared memory {size} counts as memory and is more than its limit {limits['memory']}"


def _command(container: Tree, pod: Tree) -> Iterator[str]:
    """Check that signals reach the program and that the grace period is long enough for a save."""
    command = list(container.get("command", []))
    if command and command[0] in SHELLS:
        yield f"command starts with {command[0]!r}, which does not forward signals; start the program directly"
    grace = pod.get("terminationGracePeriodSeconds", 30)
    leads = [int(entry["value"]) for entry in container.get("env", []) if entry["name"] == LEAD_VARIABLE]
    if leads and leads[0] >= grace:
        yield f"terminationGracePeriodSeconds={grace} is shorter than the {leads[0]} s that a step and a save may take"


def _job(job: Tree, kind: str) -> Iterator[str]:
    """Check a batch job and its rules for failed pods."""
    pod, policy = job["template"]["spec"], job.get("podFailurePolicy")
    if pod.get("restartPolicy") not in (("Never",) if policy else ("Never", "OnFailure")):
        yield f"restartPolicy={pod.get('restartPolicy')!r}: podFailurePolicy needs Never"
    if job.get("completionMode") == "Indexed" and job.get("completions") != job.get("parallelism"):
        yield f"completions={job.get('completions')} and parallelism={job.get('parallelism')} must be the same number"
    if kind != "Job" and job.get("backoffLimit") != 0:
        yield f"backoffLimit={job.get('backoffLimit')}: must be 0, as the nodes of a run restart together"
    names = {container["name"] for container in pod["containers"]}
    for rule in policy["rules"] if policy else []:
        codes = rule.get("onExitCodes")
        if codes and codes.get("containerName", next(iter(names))) not in names:
            yield f"podFailurePolicy names container {codes['containerName']!r}; there is {sorted(names)}"
        if codes and (sorted(set(codes["values"])) != codes["values"] or 0 in codes["values"]):
            yield f"podFailurePolicy's exit codes {codes['values']} must be in order, each once, without 0"


def _replicated(tree: Tree) -> Iterator[str]:
    """Check host names and restart rules of a JobSet, alone or as the template of a runtime."""
    name = tree["metadata"]["name"]
    spec = tree["spec"]["template"]["spec"] if tree["kind"] == "TrainingRuntime" else tree["spec"]
    for job in spec["replicatedJobs"]:
        last = job["template"]["spec"].get("completions", 1) - 1
        longest = f"{name}-{job['name']}-{job.get('replicas', 1) - 1}-{last}-abcde"
        if not HOST_LABEL.fullmatch(longest):
            yield f"pod name {longest!r} is not a DNS label of at most 63; use a shorter name"
        first = f"{name}-{job['name']}-0-0.{spec.get('network', {}).get('subdomain', name)}"
        for container in job["template"]["spec"]["template"]["spec"]["containers"]:
            told = [entry.get("value") for entry in container.get("env", []) if entry["name"] == "MASTER_ADDR"]
            if told not in ([], [first]):
                yield f"MASTER_ADDR={told}, but pod 0 answers as {first}"
    rules = spec.get("failurePolicy", {}).get("rules", [])
    names = [rule["name"] for rule in rules]
    if len(set(names)) < len(names) or not all(map(RULE_NAME.fullmatch, names)):
        yield f"failurePolicy: rules {names} need different names of letters, digits and '_'"
    for rule in rules:
        if unknown := set(rule.get("onJobFailureReasons", [])) - JOB_FAILURES:
            yield f"failurePolicy: {sorted(unknown)} is none of the reasons {sorted(JOB_FAILURES)}"
        for pattern in rule.get("onJobFailureMessagePatterns", []):
            re.compile(pattern)


def _ray_job(tree: Tree) -> Iterator[str]:
    spec, name = tree["spec"], tree["metadata"]["name"]
    if len(name) > LONGEST_RAY_JOB:
        yield f"name={name!r} is longer than the {LONGEST_RAY_JOB} characters that KubeRay allows"
    if spec.get("submissionMode", "K8sJobMode") not in SUBMISSION_MODES:
        yield f"submissionMode={spec['submissionMode']!r} is none of {sorted(SUBMISSION_MODES)}"
    if not spec.get("entrypoint"):
        yield "entrypoint is missing"
    if not spec.get("shutdownAfterJobFinishes"):
        yield "shutdownAfterJobFinishes must be true: otherwise its nodes outlive the job, and no queue can suspend it"
    cluster = spec["rayClusterSpec"]
    if cluster.get("authOptions", {}).get("mode") != "token" or not cluster.get("rayVersion"):
        yield "authOptions.mode must be token, with rayVersion: without a token anyone on the network can run code"
    groups = cluster.get("workerGroupSpecs", [])
    for group in groups:
        if len({group.get(key) for key in ("replicas", "minReplicas", "maxReplicas")}) > 1:
            yield f"group {group['groupName']!r}: replicas, minReplicas and maxReplicas must be the same number"
    for group in [cluster["headGroupSpec"], *groups]:
        limit = group["template"]["spec"]["containers"][0].get("resources", {}).get("limits", {}).get("cpu")
        if group.get("rayStartParams", {}).get("num-cpus", limit) != limit:
            yield f"num-cpus={group['rayStartParams']['num-cpus']}, but its pod has cpu={limit}"


def _train_job(tree: Tree) -> Iterator[str]:
    env = [entry["name"] for entry in tree["spec"].get("trainer", {}).get("env", [])]
    reserved = [name for name in env if name.startswith("PET_")]
    if reserved:
        yield f"env {reserved} is set by the torch policy; leave it out"


BY_KIND: dict[str, Callable[[Tree], Iterator[str]]] = {
    "JobSet": _replicated,
    "TrainingRuntime": _replicated,
    "RayJob": _ray_job,
    "TrainJob": _train_job,
}


def _references(objects: Sequence[Tree]) -> Iterator[str]:
    """Check that a TrainJob's runtime is among the objects and has the container that the torch policy requires."""
    runtimes = {tree["metadata"]["name"]: tree for tree in objects if tree["kind"] == "TrainingRuntime"}
    for tree in objects:
        reference = tree["spec"]["runtimeRef"] if tree["kind"] == "TrainJob" else {}
        if reference.get("kind") != "TrainingRuntime":
            continue
        if reference["name"] not in runtimes:
            yield f"runtimeRef {reference['name']!r} is none of {sorted(runtimes)}"
            continue
        containers = [part["name"] for pod in pods(runtimes[reference["name"]]) for part in pod["spec"]["containers"]]
        if "node" not in containers:
            yield f"its runtime's containers are {containers}; the torch policy looks for one called 'node'"


def _credentials(tree: Tree) -> Iterator[str]:
    """Find keys, tokens and URLs with a password anywhere in an object; the value itself is not printed."""
    for key, value in _strings(tree, ""):
        if CREDENTIAL_VALUE.search(value):
            yield f"{key}: a value looks like a credential; put it into a Secret and name that in `secrets`"


def _strings(tree: Any, key: str) -> Iterator[tuple[str, str]]:
    """Yield every string in a tree with its key."""
    if isinstance(tree, str):
        yield key, tree
    elif isinstance(tree, Mapping):
        for name, value in tree.items():
            yield from _strings(value, str(name))
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from _strings(value, key)


def amount_of(quantity: str | int) -> float:
    """Convert a quantity to a number (bytes or cores). Raises ConfigError if it is invalid."""
    matched = QUANTITY.fullmatch(str(quantity))
    if matched is None:
        raise ConfigError(f"{quantity!r} is not a quantity such as 8, 500m, 32Gi")
    number, unit = float(matched[1]), matched[2] or ""
    if unit == "m":
        return number / 1000
    base = 1024 if unit.endswith("i") else 1000
    return number * base ** ("kMGTPE".index(unit[0].replace("K", "k")) + 1) if unit else number
