"""The plan beside the real modules and the real engine: parameters, FLOPs, activations, states, bytes on the wire."""

import json
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.settings import load_settings
from launchers.plan.make import Plan, make_plan
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
LET_GO = SPREAD | {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
RUNS = [
    ("fp32", 0, 2, {}),
    ("fp32", 1, 1, {}),
    ("fp32", 2, 1, {}),
    ("fp32", 3, 2, {}),
    ("fp32", 3, 1, SPREAD),
    ("fp32", 3, 1, LET_GO),
    ("bf16", 2, 2, {}),
    ("bf16", 3, 2, {}),
]
ENGINE_TIMEOUT_S = 600
RECIPE = "configs/demo/gpt.yaml"


def overrides_of(precision: str, stage: int, micro: int, zero: dict[str, Any]) -> list[str]:
    """What is laid over the recipe for one of RUNS."""
    extra = json.dumps({"zero_optimization": zero})
    sizes = ["model.layers=2", "train.global_batch=4", f"train.micro_batch={micro}"]
    return [f"train.precision={precision}", f"train.zero_stage={stage}", *sizes, f"deepspeed.extra={extra}"]


KEPT = {"weights", "master weights", "Adam's moments"}
KEPT_BY_STAGE_3 = KEPT | {"gradients", "buckets", "gathered weights"}


def between(plan: Plan, zero: dict[str, Any]) -> float:
    """What stays from step to step; weights that are not kept gathered are let go."""
    kept = KEPT_BY_STAGE_3 if plan.config.train.zero_stage == 3 else KEPT
    return sum(
        item.bytes for item in plan.memory.items if item.what in kept - ({"gathered weights"} if zero else set())
    )


def in_backward(plan: Plan) -> float:
    """The most of a step, without activations and what only the update flattens."""
    held = [item for item in plan.memory.items if item.kind in (STATE, WORKING) and item.what != "flat gradients"]
    return sum(item.bytes for item in held)


@pytest.mark.slow
def test_the_engine_holds_and_sends_what_the_plan_says() -> None:
    every = [overrides_of(*one) for one in RUNS]
    asked = json.dumps([[str(ROOT / RECIPE), *overrides] for overrides in every])
    ranks = run_ranks(WORKER, [asked], 2, ENGINE_TIMEOUT_S)
    for number, overrides in enumerate(every):
        plan = make_plan(run(RECIPE, *overrides), desk(2))
        most = {key: max(rank["runs"][number][key] for rank in ranks) for key in ranks[0]["runs"][number]}
        assert plan.sent_per_rank == pytest.approx(most["sent"], rel=0.01), overrides
        assert between(plan, RUNS[number][3]) == pytest.approx(most["between"], rel=0.02), overrides
        seen = max(most["in_backward"], most["before_update"])  # at two moments; the worst may be another
        assert 0.95 < in_backward(plan) / seen < 1.3, overrides
