"""One rank of test_families.py: LEGS in, a JSON list of (configuration, step); trains each run to its step, in turn.

A leg that ends before the last step of its run is left there as SIGKILL leaves it: what was saved is committed, nothing
more is saved, closed or said. The processes are then killed by the test.
"""

import contextlib
import json
import signal
import sys

import torch

from data_pipeline.settings import load_settings
from pretrain.config import RunConfig
from pretrain.runtime.mesh import Mesh
from pretrain.train import Run, train


class Killed(BaseException):
    """Ends a run between two steps."""


class KillAt:
    """In the place of the stop signals: ends the run once it has made `step` steps, before it saves."""

    def __init__(self, run: Run, step: int) -> None:
        self.run, self.step = run, step

    @property
    def count(self) -> int:
        """Never a request to stop."""
        if self.run.step == self.step < self.run.config.train.steps:
            self.run.checkpoints.finish()
            raise Killed
        return 0


def leg(mesh: Mesh, path: str, until: int) -> int:
    """Train the run to this step -> the step that it started from."""
    run = Run.start(load_settings(RunConfig, path), mesh)
    started = run.step
    try:
        with contextlib.suppress(Killed):
            train(run, KillAt(run, until))  # type: ignore[arg-type]
    finally:
        run.watchdog.stop()
        if run.step == run.config.train.steps:
            run.close("FINISHED")
    return started


def main() -> None:
    torch.set_num_threads(1)
    mesh = Mesh.start(60)
    print(json.dumps([leg(mesh, path, until) for path, until in json.loads(sys.argv[1])]), flush=True)
    if len(sys.argv) > 2:
        signal.pause()
    mesh.stop()


if __name__ == "__main__":
    main()
