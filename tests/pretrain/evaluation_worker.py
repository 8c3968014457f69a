"""One rank of test_evaluation_in_training.py: trains the runs of a JSON file, one after the other, in this process.

Each entry: {"config": path of the recipe, "overrides": [...], "strike": "", "killed" or "stopped"}. A strike falls in
the second group of an evaluation of step 4: the attempt ends there as if killed, or is asked to stop.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from data_pipeline.errors import Requeue, TesseraError
from pretrain.config import load_run
from pretrain.evaluations import evaluated, prompts, retrieval
from pretrain.runtime.mesh import Mesh
from pretrain.train import Run, train

SIZES = {"BATCH": 8, "CANDIDATES": 8, "PROMPTS": 5, "DRAWN_AT_ONCE": 2}
STRUCK_STEP = 4


class Stop:
    """What the training loop reads of StopSignals."""

    count = 0


class Killed(Exception):
    """Stands for the death of the process."""


def make_small() -> None:
    """Several groups on few samples."""
    for module in (evaluated, retrieval, prompts):
        for name, size in SIZES.items():
            if hasattr(module, name):
                setattr(module, name, size)


def striking(run: Run, strike: str, stop: Stop) -> None:
    """Make the strike fall in the second group of the evaluation of STRUCK_STEP."""
    calls = [0]

    def armed(inner: Any) -> Any:
        def call(compute: Any, batch: Any) -> Any:
            if run.step == STRUCK_STEP:
                calls[0] += 1
                if calls[0] == 2 and strike == "killed":
                    raise Killed
                stop.count = int(calls[0] == 2 and run.mesh.rank == run.mesh.world - 1)
            return inner(compute, batch)

        return call

    for given in run.held_out.given.values():
        given.ranks = dataclasses.replace(given.ranks, run=armed(given.ranks.run))


def once(mesh: Mesh, entry: dict[str, Any]) -> str:
    """Train one attempt -> how it ended."""
    stop = Stop()
    try:
        run = Run.start(load_run(entry["config"], entry.get("overrides", [])), mesh)
    except TesseraError as error:
        return f"refused with {error.exit_code}: {error}"
    if entry.get("strike"):
        striking(run, entry["strike"], stop)
    try:
        train(run, stop)  # type: ignore[arg-type]
        end = "done"
    except (Killed, Requeue) as error:
        end = type(error).__name__
    run.close("")
    return end


def main() -> None:
    torch.set_num_threads(1)
    make_small()
    mesh = Mesh.start(60)
    ends = []
    for number, entry in enumerate(json.loads(Path(sys.argv[1]).read_text())):
        store = dist.PrefixStore(str(number), mesh.store)  # attempts have keys of their own, as processes do
        ends.append(once(dataclasses.replace(mesh, store=store), entry))
    mesh.stop()
    print(json.dumps({"ends": ends}))


if __name__ == "__main__":
    main()
