"""Commands before a run and frozen parameters: the plan counts them, all refuse patterns that do not fit."""

import json
from pathlib import Path
from typing import Any

import pytest

from launchers.plan.clusters import cluster_of
from launchers.plan.figures import FP32
from launchers.plan.make import RunPlan, as_json, make_plan
from launchers.plan.show import notes
from pretrain.config import RunConfig
from tests.families import PAIRS
from tests.launchers.test_cli import call

TOWER = [r"^model\.vision", {"pattern": r"^model\.text\.(word|positions)", "until_step": 5}]


def planned(freeze: list[Any], name: str = "clip", **train: Any) -> RunPlan:
    config = PAIRS[name].config(**train)
    tree = config.model_dump() | {"optim": {"lr": 1e-3, "freeze": freeze}}
    return make_plan(RunConfig.model_validate(tree), cluster_of("h100", 1, 2))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_plan_counts_gradients_and_optimizer_of_what_trains_only(stage: int) -> None:
    free, held = planned([], zero_stage=stage), planned(TOWER, zero_stage=stage)
    said = as_json(held, None)
    vision = said["frozen_parameters"]
    assert said["trained_parameters"] + vision == said["parameters"] == free.parameters
    assert as_json(free, None)["frozen_parameters"] == 0 < vision < free.parameters
    share = 2 if stage else 1
    items = {item.what: item.bytes for item in held.memory.items}
    assert items["Adam's moments"] == 2 * FP32 * said["trained_parameters"] / share
    assert items["weights"] == FP32 * free.parameters / (2 if stage == 3 else 1)
    sent = {one.what: one.bytes for one in held.transfers}
    assert sent["gradients"] < {one.what: one.bytes for one in free.transfers}["gradients"]
    assert held.sample_flops < free.sample_flops
    assert any("as from step 5 on" in line for line in notes(held, None))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert", "clip"])
def test_the_plan_counts_what_dropped_paths_keep_for_the_backward(name: str) -> None:
    family = PAIRS[name]
    plans = []
    for rate in (0.0, 0.2):
        model = family.dropping(rate) | ({"dropout": 0.0} if name == "bert" else {})
        plans.append(make_plan(family.config(model), cluster_of("h100", 1, 2)))
    without, dropping = (sum(i.bytes for i in plan.memory.items if i.kind == "activations") for plan in plans)
    assert without < dropping < 2 * without and plans[0].sample_flops == plans[1].sample_flops


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["plan", "--gpus-per-node", "2"],
        ["preflight"],
        ["launch", "slurm", "--dry-run"],
        ["launch", "local", "--dry-run"],
    ],
)
@pytest.mark.parametrize(
    ("freeze", "said"),
    [
        (["no_such"], "'no_such' matches no parameter"),
        ([".*"], "matches every name"),
        (["e"], "matches every parameter"),
        ([{"pattern": "word", "until_step": 12}], "must be below train.steps=12"),
        ([{"pattern": "word", "until_step": -1}], "until_step"),
    ],
)
def test_patterns_that_do_not_fit_are_refused_before_a_run_starts(
    words: list[str], freeze: list[Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    tree = json.loads(PAIRS["bert"].config().model_dump_json()) | {"optim": {"lr": 1e-3, "freeze": freeze}}
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(tree))
    at = 2 if words[0] == "launch" else 1
    assert call(monkeypatch, *words[:at], str(path), *words[at:]) == 64
    assert said in capfd.readouterr().err
