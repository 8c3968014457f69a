"""Whole runs by the public command that go on with something else than before: refused by name, or changed on purpose.

One process each, tiny models. `base` is at step 4; what goes on from it is compared with runs that were not struck.
"""

import hashlib
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.settings import check_settings
from data_pipeline.text.config import VocabConfig
from data_pipeline.text.training import train_vocabulary
from pretrain.checkpoint.fingerprints import UNKNOWN
from pretrain.checkpoint.layout import Slices
from pretrain.config import RunConfig
from pretrain.interchange.folder import export_model
from pretrain.models import MODELS
from tests.pretrain.commands import (
    TRACEBACK,
    Material,
    command,
    electra,
    interrupted,
    loss_bits,
    recipe,
    steps_of,
    tessera,
)
from tests.pretrain.test_training import assert_every_position_once, assert_same_state, final

pytestmark = [pytest.mark.slow, pytest.mark.real]
BATCH = 16


def tree_of(material: Material, run: Path, **train: Any) -> dict[str, Any]:
    tree = electra(material, run, **({"steps": 4, "zero_stage": 0, "precision": "fp32"} | train))
    tree["optim"] |= {"schedule": "constant"}
    return tree | {"initial": str(material.vocabulary.parent / "initial")}


def export_initial(material: Material, seed: int) -> None:
    config = check_settings(RunConfig, electra(material, Path("r")), "test").model
    torch.manual_seed(seed)
    shutil.rmtree(material.vocabulary.parent / "initial", ignore_errors=True)
    export_model(material.vocabulary.parent / "initial", config, MODELS["electra"](config).state_dict())


@pytest.fixture(scope="module")
def base(material: Material, tmp_path_factory: pytest.TempPathFactory) -> tuple[Material, Path]:
    """Data of this module's own, and a run over them that ended with step 4."""
    folder = tmp_path_factory.mktemp("base")
    shutil.copytree(material.dataset, folder / "scenes")
    shutil.copy(material.vocabulary, folder / "vocab.model")
    own = Material(folder / "scenes", folder / "vocab.model")
    export_initial(own, 1)
    done = tessera("train", recipe(tree_of(own, folder / "run"), folder / "run.yaml"))
    assert done.returncode == 0, done.stdout[-3000:]
    return own, folder / "run"


@pytest.fixture
def copied(base: tuple[Material, Path], tmp_path: Path) -> tuple[Material, Path]:
    own, run = base
    shutil.copytree(own.vocabulary.parent, tmp_path / "copied")
    return Material(own.dataset, tmp_path / "copied" / "vocab.model"), tmp_path / "copied" / "run"


def again(material: Material, run: Path, *arguments: str, **train: Any) -> Any:
    return tessera("train", recipe(tree_of(material, run, **train), run.with_suffix(".yaml")), *arguments)


def refused(done: Any, *parts: str) -> None:
    assert done.returncode == 64, done.stdout[-3000:]
    assert TRACEBACK not in done.stdout
    for part in parts:
        assert part in done.stdout, done.stdout[-3000:]


def rewrite_state(run: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """The newest checkpoint as another version of the program would have written it."""
    folder = Path(final(run).folder)
    state, manifest = (json.loads((folder / name).read_text()) for name in ("state.json", "MANIFEST.json"))
    edit(state)
    data = json.dumps(state).encode()
    (folder / "state.json").write_bytes(data)
    for entry in manifest["files"]:
        if entry["name"] == "state.json":
            entry |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "MANIFEST.json").write_text(json.dumps(manifest))


# ----------------------------------------------------------------------------------------------- who is who


def test_a_run_and_its_checkpoint_say_what_they_depend_on(base: tuple[Material, Path]) -> None:
    _, run = base
    told = json.loads((run / "config.json").read_text())["fingerprints"]
    assert set(told) == {"data.text_tokenizer", "data.dataset", "initial"}
    assert final(run).state["fingerprints"] == told and all(len(value) == 64 for value in told.values())


def test_a_vocabulary_of_the_same_size_is_refused_by_name(copied: tuple[Material, Path]) -> None:
    material, run = copied
    train_vocabulary(
        VocabConfig(dataset=str(material.dataset), output=str(run / "other"), size=200, kind="bpe",
                    character_coverage=1.0, max_captions=90)
    )  # fmt: skip
    shutil.copy(run / "other" / "vocab.model", material.vocabulary)
    before = (run / "config.json").read_bytes()
    refused(again(material, run, steps=8), "train.steps: 4 saved, 8 now")
    done = again(material, run, "--change", "train.steps=8")
    refused(done, "was trained with another data.text_tokenizer", str(material.vocabulary))
    assert (run / "config.json").read_bytes() == before and max(steps_of(run)) == 4


def test_other_initial_weights_are_refused_by_name_and_none_are_needed_any_more(copied: tuple[Material, Path]) -> None:
    material, run = copied
    export_initial(material, 2)
    refused(again(material, run), "was trained with another initial", str(material.vocabulary.parent / "initial"))
    shutil.rmtree(material.vocabulary.parent / "initial")
    done = again(material, run)
    assert done.returncode == 0 and "no longer exist: not checked" in done.stdout, done.stdout[-3000:]


# ------------------------------------------------------------------------------------------- other versions


def test_a_checkpoint_of_before_goes_on_and_says_what_could_not_be_checked(copied: tuple[Material, Path]) -> None:
    """No fingerprints, no changes, nothing of DeepSpeed, and a schema with fewer fields."""
    material, run = copied

    def older(state: dict[str, Any]) -> None:
        del state["fingerprints"], state["changes"], state["identity"]["deepspeed"]
        del state["identity"]["optim"]["power"], state["identity"]["train"]["clip_norm"]
        del state["identity"]["model"]["type_vocab"]

    rewrite_state(run, older)
    done = again(material, run, "deepspeed.extra.gradient_clipping=0.5", "--change", "train.steps=8")
    assert done.returncode == 0, done.stdout[-3000:]
    assert "does not record deepspeed.extra.gradient_clipping: not checked" in done.stdout
    assert "data.text_tokenizer, initial not compared with its training" in done.stdout
    known = final(run).state["fingerprints"]
    assert set(known) == {"data.text_tokenizer", "data.dataset", "initial"} and known["initial"] == UNKNOWN
    done = again(material, run, "deepspeed.extra.gradient_clipping=0.25", steps=8)
    refused(done, "deepspeed.extra.gradient_clipping: 0.5 saved, 0.25 now")


# ---------------------------------------------------------------------------------------------- on purpose


def test_more_steps_are_those_of_a_run_that_had_them_from_the_start(
    copied: tuple[Material, Path], tmp_path: Path
) -> None:
    material, run = copied
    done = again(material, run, "--change", "train.steps=8")
    assert done.returncode == 0 and "from step 4 on train.steps=8, was 4" in done.stdout, done.stdout[-3000:]
    long = tmp_path / "long"
    assert again(material, long, steps=8).returncode == 0
    assert loss_bits(run) == loss_bits(long)
    assert_same_state(run, long)
    assert_every_position_once(run, 8, BATCH)
    refused(again(material, run, "--change", "train.steps=6"), "train.steps=6", "is at step 8 already")


def test_a_changed_rate_holds_from_its_step_on_whatever_strikes_the_run(copied: tuple[Material, Path]) -> None:
    """Killed before it saved, it goes on as a plain restart of the changed configuration, bit for bit."""
    material, whole = copied
    run = whole.parent / "struck" / "run"
    shutil.copytree(whole, run)
    change = ["--change", "optim.lr=5e-4", "--change=train.steps=12"]
    refused(again(material, run, "optim.lr=5e-4"), "--change optim.lr=0.0005")
    assert again(material, whole, *change).returncode == 0

    config = recipe(tree_of(material, run), run.with_suffix(".yaml"))
    code, output = interrupted(command("train", config, *change), run, 6, lambda pid: os.kill(pid, signal.SIGKILL))
    assert code == -signal.SIGKILL and final(run).step == 4, output[-3000:]
    refused(again(material, run, "optim.lr=6e-4", steps=12), "optim.lr: 0.001 saved, 0.0006 now")
    tree = tree_of(material, run, steps=12)
    tree["optim"] |= {"lr": 5e-4}
    plain = recipe(tree, run.with_suffix(".yaml"))
    code, output = interrupted(command("train", plain), run, 10, lambda pid: os.kill(pid, signal.SIGKILL))
    assert code == -signal.SIGKILL and final(run).step == 8, output[-3000:]
    assert tessera("train", plain).returncode == 0
    assert loss_bits(run) == loss_bits(whole)
    assert [row["lr"] for _, row in sorted(steps_of(run).items())] == [5e-4, *[1e-3] * 3, *[5e-4] * 8]
    assert_same_state(run, whole)
    assert_every_position_once(run, 12, BATCH)

    lines = [json.loads(line) for line in (run / "attempts.jsonl").read_text().splitlines()]
    changed = {"optim.lr": {"from": 1e-3, "to": 5e-4}, "train.steps": {"from": 4, "to": 12}}
    assert [line.get("changes") for line in lines] == [None, changed, changed, None]
    assert final(run).state["changes"] == final(whole).state["changes"] == [{"step": 4, "settings": changed}]
    refused(again(material, run, steps=12), "optim.lr: 0.0005 saved, 0.001 now")


def test_settings_of_the_optimizer_change_on_purpose_with_its_state(copied: tuple[Material, Path]) -> None:
    """Parameters move between the groups with their moments; a run cut in two after the change is bitwise the same."""
    material, whole = copied
    cut = whole.parent / "cut" / "run"
    shutil.copytree(whole, cut)
    words = ["optim.betas=[0.8, 0.99]", "optim.eps=1e-6", "optim.weight_decay=0.2", "optim.no_decay=[attention]"]
    words += [f"data.evaluation={material.dataset}"]
    changes = [part for word in words for part in ("--change", word)]
    refused(again(material, whole, "--change", "optim.lr=1e-3"), "--change optim.lr=0.001 changes nothing")
    done = again(material, whole, *changes, "--change", "train.steps=8")
    assert done.returncode == 0 and "from step 4 on optim.eps=1e-06, was 1e-08" in done.stdout, done.stdout[-3000:]
    assert again(material, cut, *changes, "--change", "train.steps=6").returncode == 0
    done = again(material, cut, *changes, "--change", "train.steps=8")
    assert done.returncode == 0, done.stdout[-3000:]
    assert loss_bits(cut) == loss_bits(whole)
    assert_same_state(cut, whole)
    assert_every_position_once(whole, 8, BATCH)
    groups, state = final(whole).state["optimizer"]["groups"], final(whole).state
    assert {(row["weight_decay"], *row["betas"], row["eps"], row["updates"]) for row in groups.values()} == {
        (0.2, 0.8, 0.99, 1e-6, 8), (0.0, 0.8, 0.99, 1e-6, 8)
    }  # fmt: skip
    assert any("attention" in name and name.endswith("weight") for name in groups["no_decay"]["names"])
    assert set(state["changes"][0]["settings"]) == {word.partition("=")[0] for word in words} | {"train.steps"}
    assert state["identity"]["data"]["evaluation"] == str(material.dataset)
    lines = [json.loads(line) for line in (whole / "attempts.jsonl").read_text().splitlines()]
    assert lines[-1]["changes"] == state["changes"][0]["settings"]


def test_what_is_frozen_changes_on_purpose(copied: tuple[Material, Path]) -> None:
    """Embeddings freeze at step 4 and lose their state; at 6 they train again, from moments of zero."""
    material, run = copied
    before = tensors_of(run)
    words = ["--change=optim.freeze=[embeddings]", "--change=optim.layer_decay=0.5", "--change=train.steps=6"]
    assert again(material, run, *words).returncode == 0
    same = {name: torch.equal(before[name], tensor) for name, tensor in tensors_of(run).items()}
    assert {name for name, equal in same.items() if equal} == {name for name in same if "embeddings" in name} != set()
    words = ["optim.layer_decay=0.5", "--change=train.steps=8"]
    refused(again(material, run, *words, "--change=optim.freeze=[]"), "optim.freeze: ", "was frozen", "until_step")
    later = "--change=optim.freeze=[{pattern: embeddings, until_step: 6}]"
    done = again(material, run, *words, later)
    assert done.returncode == 0, done.stdout[-3000:]
    assert [change["step"] for change in final(run).state["changes"]] == [4, 6]
    groups = final(run).state["optimizer"]["groups"]
    assert {name.partition("@")[2]: row["updates"] for name, row in groups.items()} == {"": 8, "6": 2}
    moved = tensors_of(run)
    assert any(not torch.equal(before[name], moved[name]) for name in moved if "embeddings" in name)


def tensors_of(run: Path) -> dict[str, torch.Tensor]:
    slices = Slices(final(run).folder)
    return {name: slices.whole("param", name) for name in slices.shapes}


def test_a_change_of_a_run_that_has_not_begun_is_refused(base: tuple[Material, Path], tmp_path: Path) -> None:
    refused(again(base[0], tmp_path / "run", "--change", "optim.lr=5e-4"), "the run has no checkpoint yet")


def test_what_may_not_be_changed_is_refused_before_anything_starts(base: tuple[Material, Path], tmp_path: Path) -> None:
    material, _ = base
    run = tmp_path / "run"
    refused(again(material, run, "--change", "model.layers=3"), "--change model.layers", "a run may change train.steps")
    assert not run.exists()
