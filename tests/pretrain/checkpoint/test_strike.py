"""The same strike against our saves and stock DeepSpeed's: rank 1 is killed while its shard is not written."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.pretrain.processes import run_ranks, start_ranks

WORKER = Path(__file__).with_name("strike_worker.py")
pytestmark = [pytest.mark.slow, pytest.mark.real]


def rank_0_is_done_with_ours(folder: Path) -> bool:
    return any(path.stat().st_size for path in folder.glob("step-00000002*/r00000.safetensors"))


def rank_0_is_done_with_stock(folder: Path) -> bool:
    latest = folder / "latest"
    return latest.exists() and latest.read_text() == "step-2"


def struck(way: str, folder: Path, done: Callable[[Path], bool]) -> None:
    """Kill both ranks once rank 0 has done all that it does before it waits for rank 1."""
    deadline = time.monotonic() + 120
    with start_ranks(WORKER, [str(folder), way, "save"], world=2) as processes:
        while not done(folder):
            assert all(process.poll() is None for process in processes)
            assert time.monotonic() < deadline, "the second save was never begun"
            time.sleep(0.05)


def test_our_run_goes_on_from_the_save_before(tmp_path: Path) -> None:
    struck("ours", tmp_path, rank_0_is_done_with_ours)
    assert run_ranks(WORKER, [str(tmp_path), "ours", "load"], world=2) == [{"step": 1}, {"step": 1}]


def test_a_run_of_stock_deepspeed_cannot_go_on(tmp_path: Path) -> None:
    """The negative control: `latest` names the second save, of which rank 1 finds no shard."""
    struck("stock", tmp_path, rank_0_is_done_with_stock)
    found = run_ranks(WORKER, [str(tmp_path), "stock", "load"], world=2)
    assert any("error" in rank for rank in found), found
