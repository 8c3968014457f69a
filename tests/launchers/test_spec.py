"""One description for every place: what a YAML is, what is checked, and the same environment for the program."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import ConfigError
from launchers import cli, slurm
from launchers.kubernetes.submit import render
from launchers.pipeline import plan_steps
from launchers.spec import KubernetesCluster, LocalCluster, SlurmCluster, Task, describe, task_of

TRAIN, BUILD, VOCAB = "configs/clip/vit-b-32.yaml", "configs/data/folder.yaml", "configs/demo/vocab.yaml"
ENV = {"NCCL_SOCKET_IFNAME": "ib0", "A": "b c"}
PLACES = (
    LocalCluster(env=ENV),
    SlurmCluster(env=ENV, cpus_per_proc=1),
    KubernetesCluster(image="example.com/tessera:1", env=ENV),
)


@pytest.fixture(autouse=True)
def _in_repository(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repository)


def launch(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["tessera", "launch", *words])
    with pytest.raises(SystemExit) as leaving:
        cli.main()
    return int(leaving.value.code or 0)


@pytest.mark.parametrize(("path", "task"), [(TRAIN, "train"), (BUILD, "build"), (VOCAB, "vocab")])
def test_a_yaml_says_what_it_is(path: str, task: str) -> None:
    assert task_of(path) == task


def test_what_does_not_say_what_it_is_is_refused_with_the_remedy() -> None:
    with pytest.raises(ConfigError, match=r"--task train\|build\|encode"):
        task_of("runs/demo/gpt")


def test_a_place_changes_how_often_and_how_long_but_not_what_runs() -> None:
    specs = [describe(TRAIN, ["optim.lr=1e-3"], place, 2, 4) for place in PLACES]
    assert [(spec.lead_s, spec.retries) for spec in specs] == [(300, 0), (300, 20), (300, 3)]
    assert len({dataclasses.replace(spec, retries=0) for spec in specs}) == 1
    assert specs[0].arguments == ("train", TRAIN, "optim.lr=1e-3") and specs[0].world_size == 8


def test_the_program_gets_the_same_environment_in_every_place(capsys: pytest.CaptureFixture[str]) -> None:
    local, site, place = (describe(TRAIN, [], where, 1, 1) for where in PLACES)
    assert local.environment == site.environment == place.environment
    assert local.environment == {"PYTHONUNBUFFERED": "1", "TESSERA_STOP_LEAD_S": "300", **ENV}
    script = slurm.render(site, SlurmCluster(env=ENV, cpus_per_proc=1))
    assert "export A='b c'" in script and "export TESSERA_STOP_LEAD_S=300" in script
    text = render(place, KubernetesCluster(image="example.com/t:1", claims={"all": "/work"}))
    assert all(f"name: {name}" in text for name in local.environment)


def test_only_training_takes_every_process_of_a_place() -> None:
    place = SlurmCluster(nodes=4, procs_per_node=8, cpus_per_proc=8)
    targets: dict[Task, str] = {"train": TRAIN, "build": BUILD, "encode": "d", "vocab": VOCAB, "evaluate": "runs/r"}
    specs = [describe(target, [], place, task=task) for task, target in targets.items()]
    shape = {spec.task: (spec.nodes, spec.procs_per_node, spec.on_ray) for spec in specs}
    assert shape == {
        "train": (4, 8, False), "build": (4, 1, True), "encode": (4, 1, True), "vocab": (1, 1, False),
        "evaluate": (1, 1, False),
    }  # fmt: skip


def test_a_build_takes_the_processors_of_its_nodes_unless_told() -> None:
    place = SlurmCluster(nodes=2, procs_per_node=8, cpus_per_proc=8)
    assert "data build configs/data/folder.yaml workers=128 " in slurm.render(describe(BUILD, [], place), place)
    assert "workers=5 " in slurm.render(describe(BUILD, ["workers=5"], place), place)
    encode = describe("data/mine", ["--image-tokenizer", "t"], place, task="encode")
    assert '--workers=128 --ray-address="$MASTER_ADDR:$MASTER_PORT"' in slurm.render(encode, place)


def test_what_is_read_and_written_is_listed() -> None:
    spec = describe("configs/demo/gpt.yaml", ["train.checkpoints=s3://bucket/gpt"], LocalCluster())
    assert set(spec.storage) == {
        "runs/demo/gpt", "s3://bucket/gpt", "runs/demo/data", "runs/demo/heldout", "runs/demo/vocab/vocab.model",
        "runs/demo/tokenizer",
    }  # fmt: skip


def test_an_option_that_the_task_lacks_is_refused_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch(monkeypatch, "slurm", "runs/gpt", "--task", "generate", "--", "--promt", "a cat") == 64
    assert "No such option: --promt" in capsys.readouterr().err


def test_a_task_with_options_is_launched(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch(monkeypatch, "slurm", "runs/gpt", "--task", "generate", "--dry-run", "--", "--prompt", "a cat") == 0
    assert "launchers.cli generate runs/gpt --prompt 'a cat' ||" in capsys.readouterr().out


def test_an_unknown_key_of_a_cluster_file_is_named_with_the_nearest(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "site.yaml"
    path.write_text("kind: slurm\npartitions: gpu\n")
    assert launch(monkeypatch, "slurm", TRAIN, "--cluster", str(path), "--dry-run") == 64
    assert "partitions: unknown key; did you mean 'partition'?" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ pipelines


def pipeline(folder: Path, *steps: dict[str, Any]) -> str:
    path = folder / "pipeline.yaml"
    path.write_text(json.dumps({"steps": list(steps)}))
    return str(path)


def test_steps_wait_for_the_one_above_unless_told() -> None:
    steps = plan_steps(SlurmCluster, "configs/demo/pipeline.yaml")
    assert {step.name: step.after for step in steps} == {
        "build-data": (),
        "build-heldout": (),
        "vocab-vocab": ("build-data",),
        "clip": ("build-heldout", "vocab-vocab"),
        "evaluate-clip": ("clip",),
    }


def test_codes_stand_between_the_build_and_the_training_that_reads_them() -> None:
    steps = {step.name: step for step in plan_steps(SlurmCluster, "configs/demo/pipeline-codes.yaml")}
    assert steps["encode-data"].after == ("export-vqgan",) and "encode-data" in steps["gpt"].after
    assert steps["export-vqgan"].after == ("vqgan",) and not steps["export-vqgan"].spec.wants_gpus
    assert steps["encode-data"].spec.storage == ("runs/demo/data", "runs/demo/tokenizer")
    assert steps["export-vqgan"].spec.storage == ("runs/demo/vqgan", "runs/demo/tokenizer")


@pytest.mark.parametrize("words", [["--image-tokenizer", "t", "--crops", "10"], ["--crops=10", "--image-tokenizer=t"]])
def test_the_tokenizer_of_an_encoding_is_among_what_it_reads(words: list[str]) -> None:
    assert describe("data/mine", words, SlurmCluster(), task="encode").storage == ("data/mine", "t")


def test_a_step_has_a_place_and_a_size_of_its_own(tmp_path: Path) -> None:
    place = tmp_path / "cpu.yaml"
    place.write_text("kind: slurm\npartition: cpu\n")
    build, train = {"target": BUILD, "cluster": str(place), "nodes": 3}, {"target": TRAIN}
    first, second = plan_steps(SlurmCluster, pipeline(tmp_path, build, train))
    assert (first.cluster.partition, first.spec.nodes) == ("cpu", 3)
    assert (second.cluster.partition, second.spec.nodes) == ("gpu", 2)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([], "`steps:` is empty"),
        ([{"target": BUILD}, {"target": BUILD}], "two steps are called 'build-mine'"),
        ([{"target": BUILD, "after": ["train"]}], "waits for 'train', which is not an earlier step"),
        ([{"target": TRAIN}, {"target": TRAIN, "name": "again"}], "use the same run folder runs/clip-vit-b-32"),
        ([{"target": BUILD, "worker": 3}], "unknown key"),
    ],
)
def test_a_pipeline_that_cannot_run_is_refused(steps: list[dict[str, Any]], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_steps(SlurmCluster, pipeline(tmp_path, *steps))


def test_overrides_belong_to_a_step() -> None:
    with pytest.raises(ConfigError, match="overrides belong to a step"):
        plan_steps(SlurmCluster, "configs/demo/pipeline.yaml", ["optim.lr=1"])


def test_a_pipeline_runs_step_by_step_on_this_machine(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch(monkeypatch, "local", "configs/demo/pipeline.yaml", "--dry-run") == 0
    lines = capsys.readouterr().out.splitlines()
    told = [line.partition("launchers.cli ")[2].removesuffix(" &") for line in lines if line != "wait"]
    assert lines[5] == "wait"  # for the two processes of the training, before the evaluation
    assert told == [
        "data build configs/demo/data.yaml", "data build configs/demo/heldout.yaml",
        "vocab train configs/demo/vocab.yaml", "train configs/demo/clip.yaml", "train configs/demo/clip.yaml",
        "evaluate runs/demo/clip",
    ]  # fmt: skip


# ------------------------------------------------------------------------------- changes on the way of a run


@pytest.mark.parametrize("place", ["local", "slurm", "kubernetes"])
def test_a_change_reaches_the_processes_of_every_attempt_in_every_place(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster = tmp_path / "cluster.yaml"
    needed = (
        {"image": "example.com/tessera:1", "claims": {"work": "/work", "data": "/data"}}
        if place == "kubernetes"
        else {}
    )
    cluster.write_text(json.dumps({"kind": place} | needed))
    words = [place, TRAIN, "seed=3", "--change", "optim.lr=1e-4", "--change", "train.steps=70000", "--dry-run"]
    monkeypatch.setattr(sys, "argv", ["tessera", "launch", *words, "--cluster", str(cluster)])
    assert cli.run() == 0
    shown = capsys.readouterr().out
    carried = "seed: 3" if place == "kubernetes" else "seed=3"  # there the recipe goes along with its overrides in it
    for word in (carried, "--change=optim.lr=1e-4", "--change=train.steps=70000"):
        assert word in shown


def test_a_changed_value_is_that_of_the_described_run_in_either_spelling() -> None:
    plain = describe(TRAIN, ["train.steps=70000"], PLACES[0])
    for words in (["--change", "train.steps=70000"], ["--change=train.steps=70000"]):
        assert describe(TRAIN, words, PLACES[0]).config_hash == plain.config_hash


def test_a_step_of_a_pipeline_may_change_its_run(tmp_path: Path) -> None:
    path = tmp_path / "pipeline.yaml"
    path.write_text(json.dumps({"steps": [{"target": TRAIN, "arguments": ["--change", "optim.lr=1e-4"]}]}))
    (step,) = plan_steps(LocalCluster, str(path))
    assert step.spec.arguments == ("train", TRAIN, "--change", "optim.lr=1e-4")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["local", TRAIN, "--change", "model.embed_dim=3"], "--change model.embed_dim: a run may change train.steps"),
        (["slurm", TRAIN, "--change", "seed=3", "--dry-run"], "--change seed: a run may change train.steps"),
        (["local", TRAIN, "--change", "optim.lr"], "optim.lr"),
        (["local", TRAIN, "--change", "optim.lr=-1"], "optim.lr"),
        (["local", BUILD, "--change", "optim.lr=1e-4"], "--change"),
    ],
)
def test_a_change_that_cannot_be_is_refused_before_anything_starts(
    words: list[str], told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["tessera", "launch", *words])
    assert cli.run() == 64
    assert told in capsys.readouterr().err
