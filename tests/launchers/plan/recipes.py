"""Runs for the planner's tests: whole configurations from a few words. Imports no torch."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_pipeline.settings import check_settings, read_yaml
from launchers.plan.clusters import GIGA, Cluster, Device
from launchers.plan.memory import activations
from launchers.plan.models import trace, trace_contrast
from launchers.plan.tape import BATCH, Tape
from pretrain.config import OBJECTIVE_OF, RunConfig

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
        "objective": {"kind": OBJECTIVE_OF[model["kind"]]},
        "data": {"dataset": "unused", "vocabulary": "unused", "tokenizer": "unused"},
        "train": {"steps": 1000, "global_batch": 8, "zero_stage": 0 if model["kind"] == "vqgan" else 1} | train,
        "optim": {"lr": 1e-3},
    }
    return check_settings(RunConfig, tree, "test")


def desk(processes: int) -> Cluster:
    """One machine of so many processes."""
    return Cluster(DESK, 1, processes, GIGA)


def tapes_of(config: RunConfig, rows: int) -> list[Tape]:
    """A micro-batch on a CPU, and CLIP's loss, of a global batch of `rows`."""
    train = config.train.model_copy(update={"global_batch": rows})
    config = config.model_copy(update={"train": train})
    loss = [trace_contrast(config, on_gpu=False)] if config.model.kind == "clip" else []
    return [trace(config, rows, on_gpu=False), *loss]


def kept(tapes: list[Tape]) -> int:
    """Bytes that wait for the backward, without the batch."""
    return sum(tape.saved_bytes() - tape.saved_bytes(BATCH) + tape.copied_bytes() for tape in tapes)


def kept_by_recomputing(tapes: list[Tape]) -> float:
    """Bytes that wait for the backward where the blocks are computed again in it, without the batch."""
    items = [item for tape in tapes for item in activations(tape, stage=0, spares_copies=False, recompute=True)]
    return sum(item.bytes for item in items if item.what not in ("batch", "temporary"))


def computed(tapes: list[Tape]) -> int:
    """FLOPs of a forward and backward, what is computed twice counted twice."""
    return sum(tape.forward_flops + tape.backward_flops + tape.repeated_flops for tape in tapes)
