"""What a kubelet does for the pod of a training, as far as a process of this machine can stand in for a container."""

import re
import sys
from collections.abc import Mapping
from pathlib import Path

from launchers.kubernetes.lint import pods
from launchers.kubernetes.objects import FOLDER
from tests.launchers.kubernetes.examples import Tree


def process_of(objects: list[Tree], folder: Path, index: int, attempt: int = 0) -> tuple[list[str], dict[str, str]]:
    """The command of pod `index` and its variables: files mounted in `folder`, labels and $(...) filled in."""
    recipe, job = objects[0], objects[-1]
    for name, text in recipe["data"].items():
        (folder / name).write_text(text, encoding="utf-8")
    [container] = [container for pod in pods(job) for container in pod["spec"]["containers"]]
    labels = {"metadata.labels['jobset.sigs.k8s.io/restart-attempt']": str(attempt)}
    env = {"JOB_COMPLETION_INDEX": str(index)}
    for entry in container["env"]:
        source = entry.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath")
        env[entry["name"]] = labels[source] if source else entry["value"]
    words = [expanded(word, env) for word in container["command"]]
    assert words[0] == "python"
    return [sys.executable, *(word.replace(FOLDER, str(folder)) for word in words[1:])], env


def expanded(text: str, env: Mapping[str, str]) -> str:
    """`text` as a kubelet hands it on: $(NAME) of a known variable is its value, $$ is one $, the rest stays."""
    values = {f"$({name})": value for name, value in env.items()} | {"$$": "$"}
    return re.sub(r"\$\$|\$\([^)]*\)", lambda found: values.get(found[0], found[0]), text)
