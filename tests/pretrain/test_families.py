"""Every family trains over ranks as on one device, however the work is split, and goes on when it was killed.

Real ranks over gloo train the runs of all families one after the other, because starting processes takes longest.
"""

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from data_pipeline.settings import load_settings
from pretrain.config import RunConfig
from pretrain.engine.optim import build_optimizer, parameter_groups
from pretrain.engine.schedule import learning_rate
from pretrain.inputs.source import open_data
from pretrain.models.noise import noise_of
from pretrain.schema.common import MAIN
from tests.families import FAMILIES, Material, task_of
from tests.pretrain.commands import loss_bits, recipe, steps_of
from tests.pretrain.processes import run_ranks, start_ranks
from tests.pretrain.test_training import assert_every_position_once, assert_same_state

WORKER = Path(__file__).with_name("family_worker.py")
STEPS, BATCH, EVERY, KILLED = 6, 12, 2, 3
PLACED: dict[str, dict[str, Any]] = {
    "stage 0": {"zero_stage": 0},
    "stage 1": {"zero_stage": 1},
    "stage 2": {"zero_stage": 2},
    "stage 3": {"zero_stage": 3},
    "recompute": {"zero_stage": 3, "recompute": True},
    "accumulation": {"zero_stage": 2, "micro_batch": 2},
}
pytestmark = [pytest.mark.slow, pytest.mark.real]


def described(name: str, folder: Path, material: Material, **train: Any) -> Path:
    """The configuration of a short run with dropout in fp32, its folder beside it.

    The large eps keeps rounding in gradients near zero (key biases) from being blown up to whole steps.
    """
    family = FAMILIES[name]
    if family.config().task.replicated:
        train["zero_stage"] = 0
    lengths = {"steps": STEPS, "global_batch": BATCH, "checkpoint_every_steps": EVERY, "precision": "fp32"}
    tree = family.run(material, folder / "run", **lengths | train)
    tree["optim"] |= {"lr": 3e-3, "eps": 1e-3}
    folder.mkdir(parents=True, exist_ok=True)
    return recipe(tree, folder / "run.yaml")


def legs(folder: Path, names: list[str], until: int = STEPS) -> str:
    """What family_worker.py is told."""
    return json.dumps([(str(folder / name / "run.yaml"), until) for name in names])


def places(name: str) -> list[str]:
    """The ways to place the work in which a family is tried; one that is replicated has one stage."""
    replicated = FAMILIES[name].config().task.replicated
    return [place for place in PLACED if not replicated or place not in ("stage 1", "stage 2", "stage 3")]


def highest(name: str) -> str:
    """The highest stage of a family."""
    return max(place for place in places(name) if place.startswith("stage"))


CASES = [f"{name}/{place}" for name in FAMILIES for place in places(name)]


def plain(path: Path) -> list[float]:
    """The losses of the same run by torch alone, on one device: an AdamW for each role."""
    config = load_settings(RunConfig, path)
    task, steps = task_of(config), config.train.steps
    stream, tokenizer = open_data(config)
    inputs, groups = task.inputs(config, stream, tokenizer), parameter_groups(task, config.optim)
    own = {role: [group for group in groups if group["role"] == role] for role in task.roles}
    optimizers = {role: build_optimizer(own[role]) for role in task.roles}
    losses = []
    for step, samples in zip(range(steps), stream.batches(0, BATCH), strict=False):
        batch = inputs(samples) | {"step": torch.tensor(step)}
        for role in task.turns(step):
            with noise_of(batch.get("noise"), batch.get("places")):
                loss = task(batch | {"turn": torch.tensor(task.roles.index(role))})["loss"]
            task.zero_grad()
            loss.backward()
            parameters = [parameter for group in own[role] for parameter in group["params"]]
            nn.utils.clip_grad_norm_(parameters, config.train.clip_norm)
            for group in optimizers[role].param_groups:
                group["lr"] = learning_rate(step, steps, config.optim.of(role))
            optimizers[role].step()
            losses += [loss.item()] if role == MAIN else []
        task.after_step(step + 1)
    return losses


def losses_of(run: Path) -> list[float]:
    return [row["loss"] for _, row in sorted(steps_of(run).items())]


def assert_up_to_rounding(losses: list[float], others: list[float]) -> None:
    """The same but for other orders of summation in fp32."""
    torch.testing.assert_close(losses, others, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def trained(complete: Material, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FAMILY/PLACE: the run of a family on two ranks, placed in this way, from start to end."""
    folder = tmp_path_factory.mktemp("families")
    for case in CASES:
        name, _, place = case.rpartition("/")
        described(name, folder / case, complete, **PLACED[place])
    run_ranks(WORKER, [legs(folder, CASES)], world=2)
    return folder


@pytest.fixture(scope="module")
def killed(complete: Material, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FAMILY: the same run at its highest stage, its two processes killed after step KILLED; a copy under moved/."""
    folder = tmp_path_factory.mktemp("killed")
    for name in FAMILIES:
        described(name, folder / name, complete, zero_stage=3)
    with start_ranks(WORKER, [legs(folder, list(FAMILIES), KILLED), "and wait"], world=2) as processes:
        for process in processes:
            said = list(itertools.takewhile(lambda line: not line.startswith("["), process.stdout or ()))
            assert process.poll() is None, "".join(said)[-3000:]
    return folder


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_train_like_one_plain_process(case: str, trained: Path) -> None:
    assert_up_to_rounding(losses_of(trained / case / "run"), plain(trained / case / "run.yaml"))


@pytest.mark.parametrize("name", FAMILIES)
def test_blocks_that_are_computed_again_change_no_bit(name: str, trained: Path) -> None:
    runs = [trained / name / place / "run" for place in (highest(name), "recompute")]
    assert loss_bits(runs[0]) == loss_bits(runs[1])
    assert_same_state(*runs)


@pytest.fixture(scope="module")
def gone_on(killed: Path, complete: Material) -> Path:
    """FAMILY: the killed run, finished by two other processes. moved/FAMILY: by three, at another stage."""
    for name in FAMILIES:
        shutil.copytree(killed / name / "run", killed / "moved" / name / "run")
        described(name, killed / "moved" / name, complete, zero_stage=2, micro_batch=2)
    for folder, world in ((killed, 2), (killed / "moved", 3)):
        for started in run_ranks(WORKER, [legs(folder, list(FAMILIES))], world):
            assert started == [KILLED // EVERY * EVERY] * len(FAMILIES)
    return killed


@pytest.mark.parametrize("name", FAMILIES)
def test_a_killed_run_goes_on_bitwise(name: str, gone_on: Path, trained: Path) -> None:
    run, whole = gone_on / name / "run", trained / name / highest(name) / "run"
    assert loss_bits(run) == loss_bits(whole)
    assert_same_state(run, whole)
    assert_every_position_once(run, STEPS, BATCH)


@pytest.mark.parametrize("name", FAMILIES)
def test_another_world_size_stage_and_micro_batch_go_on_up_to_rounding(name: str, gone_on: Path, trained: Path) -> None:
    run, whole = gone_on / "moved" / name / "run", trained / name / "stage 0" / "run"
    assert_up_to_rounding(losses_of(run), losses_of(whole))
