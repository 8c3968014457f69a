"""One rank of the planner's checks: a recipe and overrides in, one JSON line out.

What the engine holds between steps, and what it sends in a step, read from the kernel's counters of its own sockets.
"""

import contextlib
import fcntl
import gc
import json
import os
import socket
import stat
import statistics
import struct
import sys
import termios
import time
from collections.abc import Callable
from typing import Any

import torch

from data_pipeline.settings import load_settings
from pretrain.config import RunConfig, micro_batch_of
from pretrain.engine.engine import Engine
from pretrain.runtime.mesh import Mesh
from pretrain.tasks.collectives import Collectives
from tests.families import batch_of, task_of

STEPS, WARM, LR = 2, 3, 1e-3
READINGS = 3
BYTES_ACKED = 120
"""Where struct tcp_info of linux/tcp.h has tcpi_bytes_acked, an unsigned 64-bit number."""


def held() -> int:
    """Bytes of all tensors in this process, each memory once."""
    gc.collect()
    storages = [thing.untyped_storage() for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def stays() -> int:
    """Bytes of all tensors that stay: the least of a few readings, for a thread of gloo that has answered a collective
    may hold its result until it runs again.
    """
    return min(held() for _ in range(READINGS))


def sent() -> int:
    """Bytes that the peers of this process's TCP connections have acknowledged, which is all that was sent."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # listdir's own, which is closed by now, or a listening end
            if not stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                continue
            with socket.socket(fileno=os.dup(int(name))) as connection:
                while _unacknowledged(connection):
                    time.sleep(0.001)
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
            total += struct.unpack_from("Q", info, BYTES_ACKED)[0]
    return total


def _unacknowledged(connection: socket.socket) -> int:
    """Bytes that are on their way; Linux counts them where others count what waits for a terminal."""
    return int.from_bytes(fcntl.ioctl(connection, termios.TIOCOUTQ, bytes(4)), sys.byteorder)


def measured(mesh: Mesh, config: RunConfig) -> dict[str, Any]:
    """-> bytes held beside the batches between steps, when the backward has come to the first module, and before an
    update; bytes sent and CPU seconds of a step.
    """
    micro, accumulation = micro_batch_of(config.train, mesh.world)
    batches = [batch_of(config, micro, micro * (mesh.rank * accumulation + i), full=True) for i in range(accumulation)]
    before = stays()
    collectives = Collectives(gather=mesh.gather, sum=mesh.sum, world=mesh.world)
    engine = Engine(task_of(config, collectives), config, mesh, micro, accumulation)
    for _ in range(WARM):  # DeepSpeed learns the order of modules from the first two
        step(engine, batches)
    mesh.maximum([0])
    start, seconds = sent(), []
    for _ in range(STEPS):
        began = time.process_time()
        step(engine, batches)
        seconds.append(time.process_time() - began)
    result: dict[str, Any] = {"cpu_seconds": statistics.median(seconds)}
    result |= {"sent": (sent() - start) / STEPS, "between": stays() - before}
    for name, module in engine.deepspeed.module.named_modules():
        if name.endswith("embed"):  # of a GPT, the last that the backward comes to
            module.register_full_backward_pre_hook(lambda *_: result.update(in_backward=held() - before))
    backward(engine, batches)
    result["before_update"] = stays() - before
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


def speed() -> dict[str, float]:
    """Of this process by its own clock: FLOP/s of a product, bytes/s read and written by a copy; the best of a few."""
    a, source, target = torch.ones(1024, 1024), torch.ones(2**24), torch.empty(2**24)
    products = [_cpu_seconds(lambda: torch.mm(a, a)) for _ in range(5)]
    copies = [_cpu_seconds(lambda: target.copy_(source)) for _ in range(5)]
    return {"peak": 2 * 1024**3 / min(products), "rate": 2 * source.nbytes / min(copies)}


def _cpu_seconds(work: Callable[[], Any]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def main() -> None:
    """A JSON list of lists, a recipe and overrides each: a run of each, bf16 last, which DeepSpeed remembers."""
    torch.set_num_threads(1)
    mesh = Mesh.start(120)
    runs = [load_settings(RunConfig, recipe, overrides) for recipe, *overrides in json.loads(sys.argv[1])]
    results = [measured(mesh, config) for config in runs]
    mesh.stop()
    print(json.dumps({"runs": results} | speed()))


if __name__ == "__main__":
    main()
