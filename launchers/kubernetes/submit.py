"""Render objects as readable YAML, and create them all or none."""

import uuid
from collections.abc import Sequence
from pathlib import Path

import yaml

from data_pipeline.errors import NodeFault, TesseraError
from launchers.kubernetes.api import ApiServer, Refused, Tree, connected
from launchers.kubernetes.jobs import clear
from launchers.kubernetes.lint import check
from launchers.kubernetes.objects import objects
from launchers.quoting import comment
from launchers.spec import KubernetesCluster, RunSpec
from launchers.watch import JOB, job_of, refuse_second_launch, write_record

SUBMISSION = "tessera/submission"


class _Readable(yaml.SafeDumper):
    """YAML dumper that writes multi-line strings as blocks."""


def _block(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Readable.add_representer(str, _block)


def rendered(spec: RunSpec, cluster: KubernetesCluster) -> list[Tree]:
    """Return the checked objects. Raises ConfigError for what no cluster can run."""
    trees = objects(spec, cluster)
    check(trees)
    return trees


def render(spec: RunSpec, cluster: KubernetesCluster) -> str:
    """Return the objects as YAML, one document each. Raises ConfigError for what no cluster can run."""
    documents = [
        yaml.dump(tree, Dumper=_Readable, sort_keys=False, allow_unicode=True, width=110)
        for tree in rendered(spec, cluster)
    ]
    return "".join(f"{comment(line)}\n" for line in spec.header) + "---\n".join(documents)


def submit(spec: RunSpec, cluster: KubernetesCluster) -> dict[str, object]:
    """Create all objects or none. Returns the record that identifies the job, also written to RUN/job.json.

    Raises ConfigError if no cluster can run the objects, this one refuses them, or the run is running already;
    NodeFault if the server does not answer.
    """
    trees = rendered(spec, cluster)
    run, token = Path(spec.run_folder), uuid.uuid4().hex
    refuse_second_launch(run)
    for tree in trees:
        tree["metadata"]["annotations"][SUBMISSION] = token
    with connected() as api:
        if (earlier := job_of(run)).get("place") == "kubernetes":  # ended, else refused above
            clear(api, earlier)
        try:
            for tree in trees:
                api.create(tree)
            owner = api.read(trees[-1]["kind"], cluster.namespace, spec.name)
            for tree in trees[:-1]:
                api.own(tree, owner | {"kind": trees[-1]["kind"]})
            record = {
                "place": "kubernetes",
                "job": spec.name,
                "kind": trees[-1]["kind"],
                "namespace": cluster.namespace,
                "uid": owner["metadata"]["uid"],
            }
            write_record(run, record, JOB)
        except BaseException:
            _take_back(api, trees, token)
            raise
    return record


def _take_back(api: ApiServer, trees: Sequence[Tree], token: str) -> None:
    """Delete what a failed submission created, and nothing else. Raises NodeFault if that fails too."""
    left = []
    for tree in reversed(trees):
        kind, metadata = tree["kind"], tree["metadata"]
        place = (kind, metadata["namespace"], metadata["name"])
        try:
            # Read first: a request without a response may have succeeded, and a name may belong to somebody else.
            if api.read(*place)["metadata"].get("annotations", {}).get(SUBMISSION) == token:
                api.delete(*place)
        except Refused:
            continue
        except TesseraError as error:
            left.append(f"kubectl delete {kind.lower()} {metadata['name']} -n {metadata['namespace']} ({error})")
    if left:
        raise NodeFault("submission failed, and these objects could not be deleted: " + "; ".join(left))
