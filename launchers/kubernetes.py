"""Kubernetes: rendered objects as YAML, their submission as a whole or not at all, and following, stopping what runs.

The objects are in kubernetes_objects.py, what is checked before any of them leaves this machine in kubernetes_lint.py.
Everything that talks to a cluster goes through the official client, an extra: `pip install 'tessera[kubernetes]'`.
"""

import contextlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from data_pipeline.errors import ConfigError, NodeFault
from launchers.kubernetes_lint import check
from launchers.kubernetes_objects import API_VERSIONS, APPLICATION, Tree, objects
from launchers.spec import KubernetesCluster, RunSpec

POLL_S = 0.5
CALL_TIMEOUT_S = 30
PLURALS = {kind: f"{kind.lower()}s" for kind in API_VERSIONS}
CORE = {"ConfigMap": ("core", "config_map"), "Job": ("batch", "job")}

# ------------------------------------------------------------------------------------------------- rendering


class _Readable(yaml.SafeDumper):
    """Text of several lines as a block."""


def _block(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Readable.add_representer(str, _block)


def rendered(spec: RunSpec, cluster: KubernetesCluster) -> list[Tree]:
    """The objects. Raises ConfigError for what no cluster can run."""
    trees = objects(spec, cluster)
    check(trees)
    return trees


def render(spec: RunSpec, cluster: KubernetesCluster) -> str:
    """The objects as YAML, one document each. Raises ConfigError for what no cluster can run."""
    documents = [
        yaml.dump(tree, Dumper=_Readable, sort_keys=False, allow_unicode=True, width=110)
        for tree in rendered(spec, cluster)
    ]
    return f"# {spec.header}\n" + "---\n".join(documents)


# ------------------------------------------------------------------------------------------ talking to a cluster


class Cluster:
    """The few calls that are needed, for kinds of the core and of extensions alike."""

    def __init__(self, client: Any) -> None:
        self._apis = {"core": client.CoreV1Api(), "batch": client.BatchV1Api(), "custom": client.CustomObjectsApi()}
        self.core = self._apis["core"]

    def create(self, tree: Tree) -> Tree:
        where = tree["metadata"]["namespace"]
        return self._call("create", tree["kind"], where, [], body=tree, field_validation="Strict")

    def read(self, kind: str, namespace: str, name: str) -> Tree:
        return self._call("read", kind, namespace, [name])

    def own(self, tree: Tree, owner: Tree) -> None:
        """Let `tree` vanish with `owner`, whoever deletes that."""
        reference = {key: owner["metadata"][key] for key in ("name", "uid")}
        reference |= {"apiVersion": owner["apiVersion"], "kind": owner["kind"]}
        body = {"metadata": {"ownerReferences": [reference]}}
        self._call("patch", tree["kind"], tree["metadata"]["namespace"], [tree["metadata"]["name"]], body=body)

    def delete(self, kind: str, namespace: str, name: str) -> None:
        """Ask for the end of it; it is gone only when its pods are, which get their time to save."""
        self._call("delete", kind, namespace, [name], propagation_policy="Foreground")

    def _call(self, verb: str, kind: str, namespace: str, name: list[str], **options: Any) -> Tree:
        options["_request_timeout"] = CALL_TIMEOUT_S
        if kind in CORE:
            api, noun = CORE[kind]
            found = getattr(self._apis[api], f"{verb}_namespaced_{noun}")(*name, namespace, **options)
            tree: Tree = found.api_client.sanitize_for_serialization(found) if hasattr(found, "api_client") else {}
            return tree or self._apis[api].api_client.sanitize_for_serialization(found)
        group, version = API_VERSIONS[kind].split("/")
        verb = {"read": "get"}.get(verb, verb)
        call = getattr(self._apis["custom"], f"{verb}_namespaced_custom_object")
        answer: Tree = call(group, version, namespace, PLURALS[kind], *name, **options)
        return answer


@contextlib.contextmanager
def _connected(what: str) -> Iterator[Cluster]:
    """A cluster to talk to; what goes wrong inside becomes an error that says what to do.

    Raises ConfigError (no client, no kubeconfig, refused) or NodeFault (no answer, or the server's own trouble).
    """
    try:
        from kubernetes import client, config
        from urllib3.exceptions import HTTPError
    except ImportError:
        raise ConfigError("no Kubernetes client here; pip install 'tessera[kubernetes]', or use --dry-run") from None
    try:
        config.load_kube_config()
        yield Cluster(client)
    except config.ConfigException as error:
        raise ConfigError(f"no usable kubeconfig: {error}; set KUBECONFIG, or use --dry-run") from None
    except client.ApiException as error:
        raise _refused(what, error) from None
    except (HTTPError, OSError) as error:
        raise NodeFault(f"the cluster does not answer: {error}; see `kubectl cluster-info`") from None


def _refused(what: str, error: Any) -> ConfigError | NodeFault:
    """The server's own words, and what usually helps."""
    try:
        said = json.loads(error.body)["message"]
    except (TypeError, ValueError, KeyError):
        said = error.body or error.reason
    remedies = {
        401: "log in to the cluster again",
        403: "ask for the right to do this in this namespace",
        404: "it is gone, or the cluster lacks the controller of this kind",
        409: "stop or delete that one first, or give this run another name with run=FOLDER",
    }
    text = f"the cluster refused {what}: {error.status} {said}"
    if error.status in (429, 500, 502, 503, 504):
        return NodeFault(f"{text}; try again later")
    return ConfigError(f"{text}; {remedies[error.status]}" if error.status in remedies else text)


# ------------------------------------------------------------------------------------------------ submission


def submit(spec: RunSpec, cluster: KubernetesCluster) -> dict[str, str]:
    """Create everything or nothing -> what to find the run by: kind, name, namespace.

    Raises ConfigError for what no cluster can run or this one refuses, NodeFault where it does not answer.
    """
    trees = rendered(spec, cluster)
    with _connected(spec.name) as api:
        made: list[Tree] = []
        try:
            for tree in trees:
                api.create(tree)
                made.append(tree)
            run = api.read(trees[-1]["kind"], cluster.namespace, spec.name)
            for tree in made[:-1]:
                api.own(tree, run)
        except BaseException:
            _take_back(api, made)
            raise
    return {"kind": trees[-1]["kind"], "name": spec.name, "namespace": cluster.namespace}


def _take_back(api: Cluster, made: Sequence[Tree]) -> None:
    """Delete what was created of a submission that failed; says on standard error what could not be."""
    for tree in reversed(made):
        metadata = tree["metadata"]
        try:
            api.delete(tree["kind"], metadata["namespace"], metadata["name"])
        except Exception as error:
            left = f"{tree['kind'].lower()} {metadata['name']} -n {metadata['namespace']}"
            raise NodeFault(f"half of the submission stands and could not be taken back ({error}); kubectl delete {left}") from error
