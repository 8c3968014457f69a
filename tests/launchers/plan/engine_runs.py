"""Runs of the real engine that the planner is held to, and what of a plan they can show."""

import json
from pathlib import Path
from typing import Any

from launchers.plan.make import Plan
from launchers.plan.memory import STATE, WORKING
from tests.pretrain.processes import ROOT, run_ranks

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
TIMEOUT_S = 600
WORKER = Path(__file__).with_name("plan_worker.py")
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


def on_ranks(runs: list[list[str]], world: int) -> list[dict[str, Any]]:
    """Each of `runs`, a recipe and overrides, on `world` ranks -> what plan_worker.py says, rank by rank."""
    asked = [[str(ROOT / recipe), *overrides] for recipe, *overrides in runs]
    return run_ranks(WORKER, [json.dumps(asked)], world, TIMEOUT_S)
