"""Runs of the real engine that the planner is held to, and what of a plan they can show."""

import json
from pathlib import Path
from typing import Any

from launchers.plan.make import RunPlan
from launchers.plan.memory import STATE, WORKING
from tests.pretrain.processes import ROOT, run_ranks

TIMEOUT_S = 600
WORKER = Path(__file__).with_name("plan_worker.py")
GPT, CLIP = "configs/demo/gpt.yaml", "configs/demo/clip.yaml"


def gpt(precision: str, stage: int, micro: int, **zero: Any) -> list[str]:
    """A small GPT, a global batch of 4; zero: laid over DeepSpeed's settings."""
    sizes = ["model.layers=2", "train.global_batch=4", f"train.micro_batch={micro}"]
    extra = json.dumps({"zero_optimization": zero})
    return [GPT, f"train.precision={precision}", f"train.zero_stage={stage}", *sizes, f"deepspeed.extra={extra}"]


SPREAD = {"stage3_param_persistence_threshold": 2000, "memory_efficient_linear": True}
LET_GO = SPREAD | {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
RUNS = {  # bf16 last: DeepSpeed remembers it
    "stage 0": gpt("fp32", 0, 2),
    "stage 0, CLIP with wide embeddings": [CLIP, "train.zero_stage=0", "train.global_batch=128", "model.embed_dim=512"],
    "stage 1, 2 accumulated": gpt("fp32", 1, 1),
    "stage 2, 2 accumulated": gpt("fp32", 2, 1),
    "stage 3": gpt("fp32", 3, 2),
    "stage 3, blocks computed again": [*gpt("fp32", 3, 2), "train.recompute=true"],
    "stage 3, 2 accumulated, weights gathered once a micro-batch": gpt("fp32", 3, 1, **SPREAD),
    "stage 3, 2 accumulated, weights gathered twice a micro-batch": gpt("fp32", 3, 1, **LET_GO),
    "stage 2, bf16": gpt("bf16", 2, 2),
    "stage 3, bf16": gpt("bf16", 3, 2),
}

KEPT = {"weights", "master weights", "Adam's moments"}
KEPT_BY_STAGE_3 = KEPT | {"gradients", "buckets", "gathered weights"}


def between(plan: RunPlan) -> float:
    """What stays from step to step; gathered weights that are not kept are let go."""
    kept = KEPT_BY_STAGE_3 if plan.config.train.zero_stage == 3 else KEPT
    kept = kept - {"gathered weights"} if "threshold" in str(plan.config.deepspeed.extra) else kept
    return sum(item.bytes for item in plan.memory.items if item.what in kept)


def in_backward(plan: RunPlan) -> float:
    """The most of a step, without activations and what only the update flattens."""
    held = [item for item in plan.memory.items if item.kind in (STATE, WORKING) and item.what != "flat gradients"]
    return sum(item.bytes for item in held)


def on_ranks(runs: list[list[str]], world: int) -> list[dict[str, Any]]:
    """Each of `runs`, a recipe and overrides, on `world` ranks -> what plan_worker.py says, rank by rank."""
    asked = [[str(ROOT / recipe), *overrides] for recipe, *overrides in runs]
    return run_ranks(WORKER, [json.dumps(asked)], world, TIMEOUT_S)
