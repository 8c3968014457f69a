"""The models under ZeRO-3 in two processes, against plain AdamW in one: tied weights are gathered rightly."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

WORKER = Path(__file__).with_name("zero3_worker.py")
REPOSITORY = WORKER.parents[3]


def load_worker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("zero3_worker", WORKER)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def one_process_losses(kind: str) -> list[float]:
    worker = load_worker()
    module = worker.Mean(kind)
    optimizer = worker.optimizer_of(module)
    losses = []
    for step in range(worker.STEPS):
        loss = module(worker.batch(kind, step))
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


def sharded_losses(kind: str, world: int = 2) -> list[float]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    shared |= {"PYTHONPATH": REPOSITORY, "DS_ACCELERATOR": "cpu"}
    processes = []
    for rank in range(world):
        settings = {**shared, "RANK": rank, "LOCAL_RANK": rank}
        environment = os.environ | {key: str(value) for key, value in settings.items()}
        command = [sys.executable, str(WORKER), kind]
        processes.append(subprocess.Popen(command, env=environment, stdout=-1, stderr=subprocess.STDOUT, text=True))
    try:
        outputs = [process.communicate(timeout=180)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    lines = [line for line in outputs[0].splitlines() if line.startswith("LOSSES ")]
    assert lines, "\n".join(outputs)[-3000:]
    return json.loads(lines[0].removeprefix("LOSSES "))


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.parametrize("kind", ["bert", "electra", "clip"])
def test_two_sharded_ranks_train_like_one_plain_process(kind: str) -> None:
    torch.testing.assert_close(sharded_losses(kind), one_process_losses(kind), rtol=1e-5, atol=1e-5)
