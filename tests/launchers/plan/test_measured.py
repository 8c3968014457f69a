"""The plan beside the real modules and the real engine: parameters, FLOPs, activations, states, bytes on the wire."""

import json
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.settings import load_settings
from launchers.plan.make import make_plan
from launchers.plan.memory import STATE, WORKING
from launchers.plan.models import trace, trace_contrast
from launchers.plan.tape import BATCH
from pretrain.config import RunConfig
from tests.launchers.plan import measured
from tests.launchers.plan.recipes import desk, recipes
from tests.pretrain.processes import ROOT, run_ranks

WORKER = Path(__file__).with_name("plan_worker.py")
SMALL = [recipe for recipe in recipes() if "/small/" in recipe]


def run(recipe: str, *overrides: str) -> RunConfig:
    return load_settings(RunConfig, ROOT / recipe, overrides)


@pytest.mark.parametrize("recipe", recipes())
def test_a_recipe_has_exactly_the_parameters_of_its_module(recipe: str) -> None:
    config = run(recipe)
    assert sorted(weight.numel for weight in trace(config, 1).weights) == sorted(measured.parameters(config))


@pytest.mark.parametrize("recipe", SMALL)
def test_flops_are_those_that_torch_counts(recipe: str) -> None:
    config = run(recipe)
    tape = trace(config, 3, on_gpu=False)
    if config.model.kind == "clip":
        config_of_three = run(recipe, "train.global_batch=3")
        loss = trace_contrast(config_of_three, on_gpu=False)
        tape.matmul_flops["loss"] = loss.forward_flops
    forward, both = measured.flops(config, 3)
    assert tape.forward_flops == forward
    # what dropout computes again in the backward is 1 % of these
    assert tape.forward_flops + tape.backward_flops + tape.repeated_flops == pytest.approx(both, rel=0.001)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("recipe", SMALL)
def test_activations_are_within_a_tenth_of_what_autograd_keeps(recipe: str, precision: str) -> None:
    config = run(recipe, f"train.precision={precision}", "train.global_batch=3")
    tapes = [trace(config, 3, on_gpu=False)]
    tapes += [trace_contrast(config, on_gpu=False)] if config.model.kind == "clip" else []
    planned = sum(tape.saved_bytes() - tape.saved_bytes(BATCH) + tape.copied_bytes() for tape in tapes)
    assert planned == pytest.approx(measured.saved_bytes(config, 3), rel=0.1)


# ------------------------------------------------------------------------------------------- the engine

SPREAD = {"stage3_param_persistence_threshold": 2000, "memory_efficient_linear": True}
LET_GO = SPREAD | {"stage3_max_reuse_distance": 0}
RUNS = [
    ("fp32", 0, 8, {}),
    ("fp32", 1, 2, {}),
    ("fp32", 2, 2, {}),
    ("fp32", 3, 8, {}),
    ("fp32", 3, 2, SPREAD),
    ("fp32", 3, 2, LET_GO),
    ("bf16", 2, 8, {}),
    ("bf16", 3, 8, {}),
]


def overrides_of(precision: str, stage: int, micro: int, zero: dict[str, Any]) -> list[str]:
    extra = json.dumps({"zero_optimization": zero})
    sizes = ["train.global_batch=16", f"train.micro_batch={micro}"]
    return [f"train.precision={precision}", f"train.zero_stage={stage}", *sizes, f"deepspeed.extra={extra}"]


@pytest.mark.slow
def test_the_engine_holds_and_sends_what_the_plan_says() -> None:
    every = [overrides_of(*one) for one in RUNS]
    ranks = run_ranks(WORKER, [str(ROOT / "configs/demo/gpt.yaml"), json.dumps(every)], world=2)
    for number, overrides in enumerate(every):
        plan = make_plan(run("configs/demo/gpt.yaml", *overrides), desk(2))
        there = [rank["runs"][number] for rank in ranks]
        sent = max(one["sent"] for one in there)
        assert plan.sent_per_rank == pytest.approx(sent, rel=0.1), (overrides, "sent")
        held = max(one["before_update"] for one in there)
        planned = sum(i.bytes for i in plan.memory.items if i.kind in (STATE, WORKING) and i.what != "flat gradients")
        assert planned == pytest.approx(held, rel=0.1), (overrides, "held", plan.memory.items)
