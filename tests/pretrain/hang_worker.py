"""One rank of test_running.py's hang: CONFIG in; rank 1 stands still in the middle of its fourth step, alive."""

import sys
import time
from typing import Any

import torch

from data_pipeline.settings import load_settings
from pretrain.config import RunConfig
from pretrain.runtime.mesh import Mesh
from pretrain.runtime.signals import StopSignals
from pretrain.train import Run, train


def main() -> None:
    torch.set_num_threads(1)
    config = load_settings(RunConfig, sys.argv[1], [])
    mesh = Mesh.start(config.train.collective_timeout_s)
    run = Run.start(config, mesh)
    update = run.engine.update

    def stands(*given: Any) -> float:
        if run.step == 3:
            time.sleep(600)
        return update(*given)

    if mesh.rank == 1:
        run.engine.update = stands  # type: ignore[method-assign]
    train(run, StopSignals())


if __name__ == "__main__":
    main()
