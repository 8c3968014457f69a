"""Runs for the planner's tests: whole configurations from a few words. Imports no torch."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_pipeline.settings import check_settings
from launchers.plan.clusters import GIGA, Cluster, Device
from pretrain.config import OBJECTIVE_OF, RunConfig

ROOT = Path(__file__).parents[3]
DESK = Device("cpu", {"fp32": 50e9, "bf16": 50e9}, 24e9, 10e9, GIGA, GIGA)
"""A CPU whose figures do not depend on the machine that runs the tests."""


def recipes() -> Iterator[str]:
    """Every training recipe of configs/."""
    for folder in ("clip", "text", "text_to_image", "image_tokenizer", "small", "demo"):
        for path in sorted((ROOT / "configs" / folder).glob("*.yaml")):
            if path.stem not in ("vocab", "data", "heldout"):
                yield str(path.relative_to(ROOT))


def run_of(model: dict[str, Any], **train: Any) -> RunConfig:
    """A run of this model in bf16; only what the planner reads means something."""
    tree = {
        "run": "runs/planned",
        "model": model,
        "objective": {"kind": OBJECTIVE_OF[model["kind"]]},
        "data": {"dataset": "unused", "vocabulary": "unused", "tokenizer": "unused"},
        "train": {"steps": 1000, "global_batch": 8, "zero_stage": 0 if model["kind"] == "vqgan" else 1} | train,
        "optim": {"lr": 1e-3},
    }
    return check_settings(RunConfig, tree, "test")


def desk(processes: int) -> Cluster:
    """One machine of so many processes."""
    return Cluster(DESK, 1, processes, GIGA)
