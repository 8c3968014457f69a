"""The pods of a rendered JobSet as processes of this machine: two nodes train, are asked to stop, and go on.

No container, no cluster: the commands, files and variables are the rendered ones, but for the name of pod 0, which the
cluster's DNS would know, and which is this machine's here.
"""

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from launchers.kubernetes.submit import rendered
from launchers.local import free_port
from launchers.spec import describe
from tests.launchers.kubernetes.examples import Tree, place
from tests.launchers.kubernetes.pods import process_of
from tests.launchers.kubernetes.test_jobs import wait_for
from tests.pretrain.commands import Material, electra, environment, held, recipe, rows_of, steps_of

DEADLINE_S = 500
STEPS = 60


def jobset(material: Material, folder: Path) -> list[Tree]:
    """A small training on two nodes of one process each."""
    cluster = place(
        nodes=2, procs_per_node=1, gpus_per_node=0, master_port=free_port(), stop_timeout_s=120, shared_memory="1Gi",
        claims={"everything": str(Path(os.path.commonpath([folder, material.dataset])))},
    )  # fmt: skip
    tree = electra(material, folder / "run", steps=STEPS)
    return rendered(describe(recipe(tree, folder / "run.yaml"), [], cluster), cluster)


@contextmanager
def started(objects: list[Tree], folder: Path, attempt: int) -> Iterator[list["subprocess.Popen[bytes]"]]:
    """Both pods of one attempt; what is left of them at the end is killed."""
    begun = []
    try:
        for index in (0, 1):
            mounted = folder / f"pod-{index}-{attempt}"
            mounted.mkdir()
            words, env = process_of(objects, mounted, index, attempt)
            words = ["localhost" if word == env["MASTER_ADDR"] else word for word in words]
            with (mounted / "log").open("w") as log:
                told = environment(**env, **held(folder / "run", 1, folder / "go-on"))
                begun.append(subprocess.Popen(words, env=told, stdout=log, stderr=subprocess.STDOUT, cwd=folder))
        yield begun
    finally:
        for pod in begun:
            pod.kill()
            pod.wait()


def logs(folder: Path) -> str:
    return "\n".join(path.read_text()[-1500:] for path in sorted(folder.glob("pod-*/log")))


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.timeout(2 * DEADLINE_S)
def test_the_pods_of_a_jobset_train_save_when_they_are_deleted_and_go_on(material: Material, tmp_path: Path) -> None:
    objects, run = jobset(material, tmp_path), tmp_path / "run"
    with started(objects, tmp_path, attempt=0) as begun:
        wait_for(lambda: bool(steps_of(run)) or any(pod.poll() is not None for pod in begun), DEADLINE_S)
        for pod in begun:  # as a kubelet does to the pods of what is deleted
            pod.send_signal(signal.SIGTERM)
        assert [pod.wait(DEADLINE_S) for pod in begun] == [75, 75], logs(tmp_path)
    saved = max(steps_of(run))
    with started(objects, tmp_path, attempt=1) as begun:
        assert [pod.wait(DEADLINE_S) for pod in begun] == [0, 0], logs(tmp_path)
    rows = rows_of(run)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert {row["attempt"] for row in rows if row["step"] <= saved} == {0}
    assert {row["attempt"] for row in rows if row["step"] > saved} == {1}
    assert json.loads((run / "launcher.json").read_text())["world_size"] == 2
