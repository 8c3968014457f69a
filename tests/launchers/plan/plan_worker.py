"""One rank of the planner's checks: a recipe and overrides in, one JSON line out.

What the engine holds between steps, and what it sends in a step, read from the kernel's counters of its own sockets.
"""

import contextlib
import gc
import json
import os
import socket
import stat
import struct
import sys
import time
from typing import Any

import torch

from data_pipeline.settings import load_settings
from pretrain.config import RunConfig, micro_batch_of
from pretrain.engine import Engine
from pretrain.mesh import Mesh
from pretrain.objectives.collectives import Collectives
from tests.launchers.plan.measured import batch_of, objective_of

STEPS, WARM, LR = 2, 3, 1e-3
BYTES_ACKED = 120
"""Where struct tcp_info of linux/tcp.h has tcpi_bytes_acked, an unsigned 64-bit number."""


def held() -> int:
    """Bytes of all tensors in this process, each memory once."""
    gc.collect()
    storages = [thing.untyped_storage() for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def sent() -> int:
    """Bytes that the peers of this process's TCP connections have acknowledged."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # listdir's own, which is closed by now, or a listening end
            if not stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                continue
            with socket.socket(fileno=os.dup(int(name))) as connection:
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
            total += struct.unpack_from("Q", info, BYTES_ACKED)[0]
    return total


def measured(mesh: Mesh, config: RunConfig) -> dict[str, Any]:
    """-> bytes held between steps and before an update, beside the batches; bytes sent and seconds of a step."""
    micro, accumulation = micro_batch_of(config.train, mesh.world)
    batches = [batch_of(config, micro, mesh.rank * accumulation + i) for i in range(accumulation)]
    before = held()
    collectives = Collectives(gather=mesh.gather, sum=mesh.sum, world=mesh.world)
    engine = Engine(objective_of(config, collectives=collectives), config, mesh, micro, accumulation)
    for _ in range(WARM):  # DeepSpeed learns the order of modules from the first two
        step(engine, batches)
    mesh.maximum([0])
    start, began = sent(), time.perf_counter()
    for _ in range(STEPS):
        step(engine, batches)
    result: dict[str, Any] = {"seconds": (time.perf_counter() - began) / STEPS}
    result |= {"sent": (sent() - start) / STEPS, "between": held() - before}
    backward(engine, batches)
    result["before_update"] = held() - before
    engine.update(LR)
    return result


def backward(engine: Engine, batches: list[dict[str, torch.Tensor]]) -> None:
    """Forward and backward of every micro-batch."""
    for batch in batches:
        engine.backward(engine.forward(batch)["loss"])


def step(engine: Engine, batches: list[dict[str, torch.Tensor]]) -> None:
    """As the loop of pretrain/train.py has it."""
    backward(engine, batches)
    engine.update(LR)


def main() -> None:
    """RECIPE and a JSON list of lists of overrides: a run of each, those in bf16 last, which DeepSpeed remembers."""
    torch.set_num_threads(1)
    mesh = Mesh.start(120)
    results = [measured(mesh, load_settings(RunConfig, sys.argv[1], one)) for one in json.loads(sys.argv[2])]
    mesh.stop()
    print(json.dumps({"runs": results}))


if __name__ == "__main__":
    main()
