"""Minimal wrapper of the official Kubernetes client, which is an optional extra: tessera[kubernetes].

Failures are converted to this project's errors, with the server's message and a remedy.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from typing import Any

from data_pipeline.errors import ConfigError, NodeFault, TesseraError

Tree = dict[str, Any]
"""A Kubernetes object as plain JSON data."""

APPLICATION = "app.kubernetes.io"
CONTAINER = "node"
"""Name of the container that runs the program; the torch policy of TrainJobs requires this name."""
API_VERSIONS = {
    "ConfigMap": "v1",
    "Job": "batch/v1",
    "JobSet": "jobset.x-k8s.io/v1alpha2",
    "TrainingRuntime": "trainer.kubeflow.org/v1alpha1",
    "TrainJob": "trainer.kubeflow.org/v1alpha1",
    "RayJob": "ray.io/v1",
}
CALL_TIMEOUT_S = 30
CORE = {"ConfigMap": ("core", "config_map"), "Job": ("batch", "job")}
REMEDIES = {
    401: "log in to the cluster again",
    403: "ask for this permission in this namespace",
    404: "it was deleted, or the cluster lacks the controller of this kind",
    409: "stop or delete that one first, or give this run another name with run=FOLDER",
}
PASSING = (429, 500, 502, 503, 504)


class Refused(ConfigError):
    """Raised when the server refuses a request. status: the HTTP status."""

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text)
        self.status = status


class ApiServer:
    """One interface to core and custom kinds. Methods raise Refused, or NodeFault if the server does not answer."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self._apis = {"core": client.CoreV1Api(), "batch": client.BatchV1Api(), "custom": client.CustomObjectsApi()}

    def create(self, tree: Tree) -> None:
        self._call("create", tree["kind"], tree["metadata"]["namespace"], [], body=tree, field_validation="Strict")

    def read(self, kind: str, namespace: str, name: str) -> Tree:
        return self._call("read", kind, namespace, [name])

    def own(self, tree: Tree, owner: Tree) -> None:
        """Make `owner` the owner of `tree`, which is then deleted together with it."""
        reference = {"apiVersion": API_VERSIONS[owner["kind"]], "kind": owner["kind"]}
        reference |= {key: owner["metadata"][key] for key in ("name", "uid")}
        body = {"metadata": {"ownerReferences": [reference]}}
        self._call("patch", tree["kind"], tree["metadata"]["namespace"], [tree["metadata"]["name"]], body=body)

    def delete(self, kind: str, namespace: str, name: str) -> None:
        """Request deletion; the object is gone once its pods are, which first get their grace period to save."""
        self._call("delete", kind, namespace, [name], propagation_policy="Foreground")

    def pods(self, namespace: str, selector: str) -> list[Tree]:
        """Return the pods that match a label selector, oldest first."""
        call = self._apis["core"].list_namespaced_pod
        found = self._plain(_asked("the list of pods", call, namespace, label_selector=selector))["items"]
        return sorted(found, key=lambda pod: str(pod["metadata"].get("creationTimestamp", "")))

    def log(self, namespace: str, pod: str, container: str, lines: int, follow: bool) -> Iterator[str]:
        """Yield the last lines of a container's log; with `follow`, also new lines until the container ends."""
        options: dict[str, Any] = {"container": container, "tail_lines": lines, "follow": follow}
        call = self._apis["core"].read_namespaced_pod_log
        answer = _asked(f"the output of {pod}", call, pod, namespace, _preload_content=False, **options)
        rest = b""
        for block in answer.stream():
            *whole, rest = (rest + block).split(b"\n")
            yield from (line.decode(errors="replace") for line in whole)
        if rest:
            yield rest.decode(errors="replace")

    def _call(self, verb: str, kind: str, namespace: str, name: list[str], **options: Any) -> Tree:
        options["_request_timeout"] = CALL_TIMEOUT_S
        what = f"{verb} {kind} {''.join(name) or options['body']['metadata']['name']}"
        if kind in CORE:
            api, noun = CORE[kind]
            return self._plain(
                _asked(what, getattr(self._apis[api], f"{verb}_namespaced_{noun}"), *name, namespace, **options)
            )
        group, version = API_VERSIONS[kind].split("/")
        verb = {"read": "get"}.get(verb, verb)
        call = getattr(self._apis["custom"], f"{verb}_namespaced_custom_object")
        answer: Tree = _asked(what, call, group, version, namespace, f"{kind.lower()}s", *name, **options)
        return answer

    def _plain(self, found: Any) -> Tree:
        tree: Tree = self._client.ApiClient().sanitize_for_serialization(found)
        return tree


@contextlib.contextmanager
def connected() -> Iterator[ApiServer]:
    """Connect to the cluster of the kubeconfig. Raises ConfigError without the client or a usable kubeconfig."""
    try:
        from kubernetes import client, config
    except ImportError:
        raise ConfigError("kubernetes is not installed; pip install 'tessera[kubernetes]', or use --dry-run") from None
    try:
        config.load_kube_config(os.environ.get("KUBECONFIG"))  # the client read its default at import
    except config.ConfigException as error:
        raise ConfigError(f"no usable kubeconfig: {error}; set KUBECONFIG, or use --dry-run") from None
    yield ApiServer(client)


def _asked(what: str, call: Any, *arguments: Any, **options: Any) -> Any:
    """Call the client and return its response; convert its errors to ours, with a remedy."""
    from kubernetes.client import ApiException
    from urllib3.exceptions import HTTPError

    try:
        return call(*arguments, **options)
    except ApiException as error:
        raise _told(what, error) from None
    except ValueError as error:  # newer clients check the fields of core kinds themselves
        raise ConfigError(f"the client refused to {what}: {error}") from None
    except (HTTPError, OSError) as error:
        raise NodeFault(f"the cluster does not answer: {error}; check KUBECONFIG") from None


def _told(what: str, error: Any) -> TesseraError:
    """Return an error with the server's message and the usual remedy; a NodeFault if it is worth retrying."""
    try:
        said = json.loads(error.body)["message"]
    except (TypeError, ValueError, KeyError):
        said = error.body or error.reason
    text = f"the cluster refused to {what}: {error.status} {said}"
    if error.status in PASSING:
        return NodeFault(f"{text}; try again later")
    return Refused(f"{text}; {REMEDIES[error.status]}" if error.status in REMEDIES else text, error.status)
