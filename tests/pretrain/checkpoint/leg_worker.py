"""One rank of a leg of a run: CONFIG UNTIL in; trains from the newest checkpoint to step UNTIL, as if stopped there."""

import contextlib
import json
import sys

import torch

from data_pipeline.errors import Requeue
from data_pipeline.settings import load_settings
from pretrain.config import RunConfig
from pretrain.runtime.mesh import Mesh
from pretrain.train import Run, train


class StopAt:
    """Stands where the signals do: asks to stop once the run has made `step` steps."""

    def __init__(self, run: Run, step: int) -> None:
        self.run, self.step = run, step

    @property
    def count(self) -> int:
        return int(self.run.step >= self.step)


def main() -> None:
    torch.set_num_threads(1)
    path, until, *overrides = sys.argv[1:]
    config = load_settings(RunConfig, path, overrides)
    mesh = Mesh.start(60)
    run = Run.start(config, mesh)
    started = run.step
    try:
        with contextlib.suppress(Requeue):
            train(run, StopAt(run, int(until)))  # type: ignore[arg-type]
    finally:
        run.close("FINISHED")
        mesh.stop()
    print(json.dumps({"from": started, "to": run.step}))


if __name__ == "__main__":
    main()
