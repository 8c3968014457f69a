"""A run of one process for test_running.py: CONFIG in; at step 8 the guards are shown a NaN from the discriminator."""

import hashlib
import json
import math
import sys

import torch

from data_pipeline.settings import load_settings
from pretrain.config import RunConfig
from pretrain.engine.engine import Engine
from pretrain.runtime.mesh import Mesh
from pretrain.runtime.signals import StopSignals
from pretrain.train import Run, train


def digest(engine: Engine) -> str:
    """Of all that the engine keeps."""
    found = hashlib.sha256(json.dumps(engine.scalars()).encode())
    for owned in engine.owned():
        for tensor in owned.tensors.values():
            found.update(tensor.numpy().tobytes())
    return found.hexdigest()


def main() -> None:
    torch.set_num_threads(1)
    config = load_settings(RunConfig, sys.argv[1], [])
    mesh = Mesh.start(60)
    run = Run.start(config, mesh)
    accepts, log, digests, rows = run.guards.accepts, run.log, [digest(run.engine)], [{}]

    def shown(loss: float, norm: float, role: str, last: bool) -> bool:
        return accepts(loss, math.nan if run.step == 8 and role == "discriminator" else norm, role, last)

    def logged(positions: tuple[int, int], means: dict[str, float]) -> None:
        digests.append(digest(run.engine))
        rows.append(run.guards.told())
        log(positions, means)

    run.guards.accepts, run.log = shown, logged  # type: ignore[method-assign,assignment]
    train(run, StopSignals())
    run.close("FINISHED")
    mesh.stop()
    print(json.dumps({"digests": digests, "told": rows}))


if __name__ == "__main__":
    main()
