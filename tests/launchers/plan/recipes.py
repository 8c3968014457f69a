"""Runs for the planner's tests: whole configurations from a few words."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_pipeline.settings import check_settings, read_yaml
from launchers.plan.clusters import GIGA, Cluster, Device
from launchers.plan.figures import Figures
from pretrain.config import RunConfig
from pretrain.schema import tasks_of

ROOT = Path(__file__).parents[3]
DESK = Device("cpu", {"fp32": 50e9, "bf16": 50e9}, 24e9, 10e9, GIGA, GIGA)
"""A CPU whose figures do not depend on the machine that runs the tests."""


def recipes() -> Iterator[str]:
    """Every training recipe of configs/: what has a model."""
    for path in sorted((ROOT / "configs").glob("*/*.yaml")):
        if "model" in read_yaml(path):
            yield str(path.relative_to(ROOT))


def run_of(model: dict[str, Any], **train: Any) -> RunConfig:
    """A run of this model in bf16; only what the planner reads means something."""
    tree = {
        "run": "runs/planned",
        "model": model,
        "task": {"kind": tasks_of(model["kind"])[0]},
        "data": {"dataset": "unused", "text_tokenizer": "unused", "image_tokenizer": "unused"},
        "train": {"steps": 1000, "global_batch": 8, "zero_stage": 0 if model["kind"] == "vqgan" else 1} | train,
        "optim": {"lr": 1e-3},
    }
    return check_settings(RunConfig, tree, "test")


def desk(processes: int) -> Cluster:
    """One machine of so many processes."""
    return Cluster(DESK, 1, processes, GIGA)


def figures_of(config: RunConfig, rows: int, on_gpu: bool = False) -> Figures:
    """A micro-batch of `rows` samples, which is the global batch, on one device; imports torch."""
    from launchers.plan.trace import trace

    return trace(config, rows, accumulation=1, world=1, on_gpu=on_gpu).micro
