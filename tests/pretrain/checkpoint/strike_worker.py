"""One rank of test_strike.py: two saves, the second of which rank 1 never gets done; or what a new run finds of them.

FOLDER ours|stock save|load
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from pretrain.checkpoint import saver
from pretrain.checkpoint.catalog import Retention
from pretrain.checkpoint.restore import restore
from pretrain.engine.engine import Engine
from pretrain.runtime.mesh import Mesh
from tests.pretrain.checkpoint.state_worker import engine_at, step


def stuck(*_: Any, **__: Any) -> Any:
    """A disk that does not answer."""
    time.sleep(600)


def save(way: str, folder: Path, engine: Engine, mesh: Mesh) -> None:
    """A whole save after step 1, half of one after step 2."""
    checkpoints = saver.Checkpoints(folder, mesh, 0, Retention(2))
    for number in (1, 2):
        step(engine, mesh, number)
        if number == 2 and mesh.rank == 1:
            saver.write_shard = stuck
            engine.deepspeed.checkpoint_engine.save = stuck
        if way == "stock":
            engine.deepspeed.save_checkpoint(str(folder), tag=f"step-{number}")
        else:
            checkpoints.save(engine, number, {"step": number, "optimizer": engine.scalars()})
            checkpoints.finish()


def load(way: str, folder: Path, engine: Engine, mesh: Mesh) -> dict[str, Any]:
    """-> the step that a new run goes on from, or the error that ends it."""
    try:
        if way == "stock":
            path, _ = engine.deepspeed.load_checkpoint(str(folder))
            return {"step": int(Path(path).parent.name.removeprefix("step-"))}
        saved = saver.Checkpoints(folder, mesh, 1, Retention(2)).newest()
        assert saved is not None
        restore(saved, engine)
        return {"step": saved.step}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def main() -> None:
    folder, way, mode = sys.argv[1:]
    torch.set_num_threads(1)
    mesh = Mesh.start(60)
    engine = engine_at(3, mesh, 0)
    if mode == "save":
        save(way, Path(folder), engine, mesh)
    else:
        found = load(way, Path(folder), engine, mesh)
        if way == "ours":
            mesh.sum(torch.zeros(1))  # as every run does before it ends: nobody leaves while another still works
        mesh.stop()
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
