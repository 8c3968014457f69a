"""All that an engine holds survives, from every ZeRO stage to every other: real processes over gloo."""

from pathlib import Path
from typing import Any

import pytest

from pretrain.checkpoint.layout import Slices
from tests.pretrain.processes import run_ranks

WORKER = Path(__file__).with_name("state_worker.py")
pytestmark = [pytest.mark.slow, pytest.mark.real]
STAGES = (0, 1, 2, 3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("state")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    return run_ranks(WORKER, [str(folder)], world=2)


@pytest.mark.parametrize("before", STAGES)
@pytest.mark.parametrize("after", STAGES)
def test_the_next_step_is_the_same_after_any_change_of_stage(
    before: int, after: int, ranks: list[dict[str, Any]]
) -> None:
    for rank in ranks:
        found = rank["results"][f"{before} to {after}"]
        assert found["loss"] == pytest.approx(found["expected"], rel=1e-6)


@pytest.mark.parametrize("stage", STAGES)
def test_at_the_same_stage_everything_is_bitwise_what_it_was(stage: int, ranks: list[dict[str, Any]]) -> None:
    """Masters, moments, frozen and tied parameters, counts of both optimizers' groups, every rank's batch norm."""
    for rank in ranks:
        found = rank["results"][f"{stage} to {stage}"]
        assert found["same"] and found["loss"] == found["expected"]


def test_a_group_with_other_settings_is_refused_by_name(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert "parameter group decay differs in weight_decay" in rank["refused"]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_stock_deepspeed_loads_the_universal_export(stage: int, ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        found = rank["universal"][str(stage)]
        assert found["wrong"] == []
        # Under stage 3 DeepSpeed itself gives every group the settings of the first one.
        assert found["decays"] == ([0.1] * 4 if stage == 3 else [0.1, 0.0, 0.3, 0.0])


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_writes_the_same_tensors_once(stage: int, folder: Path, ranks: list[dict[str, Any]]) -> None:
    saved = next((folder / str(stage)).glob("step-*"))
    slices = Slices(str(saved))
    assert slices.shapes == Slices(str(next((folder / "0").glob("step-*")))).shapes
    assert "tied.weight" not in slices.shapes and "inner.weight" in slices.shapes
    assert slices.kinds("frozen.weight") == ("param",) and len(slices.kinds("inner.weight")) == 3
    assert sorted(slices.buffers) == ["norm.num_batches_tracked", "norm.running_mean", "norm.running_var"]
    for name in slices.shapes:
        at = 0
        for piece in slices.pieces(name):
            assert piece.lo == at, (name, slices.pieces(name))
            at = piece.hi
