"""Two optimizers that take turns, against two of torch's own on one device. Real processes over gloo."""

from pathlib import Path
from typing import Any

import pytest

from tests.pretrain.processes import run_ranks

WORKER = Path(__file__).with_name("turns_worker.py")
pytestmark = [pytest.mark.slow, pytest.mark.real]
STAGES = (0, 1, 2, 3)
COUNTS = {"decay": 6, "no_decay": 6, "judge.decay": 4, "judge.no_decay": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("turns")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    return run_ranks(WORKER, [str(folder), "play"], world=2)


@pytest.fixture(scope="module")
def alone(folder: Path, ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """One rank that goes on from what two have saved at stage 3."""
    return run_ranks(WORKER, [str(folder), "go-on"], world=1)[0]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_turns_are_those_of_two_optimizers_one_after_the_other(
    stage: int, accumulation: int, ranks: list[dict[str, Any]]
) -> None:
    """Losses of the second turn are of the weights that the first has left; every norm is its own role's."""
    for rank in ranks:
        found = rank[f"{stage}/{accumulation}"]
        assert found["losses"] == pytest.approx(found["plain"]["losses"], abs=2e-5)
        assert found["norms"] == pytest.approx(found["plain"]["norms"], rel=1e-4)
        assert max(found["norms"]) > 0.5  # clipped, each by its own norm
        assert found["far"] < 2e-5


@pytest.mark.parametrize("stage", STAGES)
def test_every_optimizer_counts_its_own_updates(stage: int, ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank[f"{stage}/1"]["counts"] == COUNTS
        assert rank["groups"] == list(COUNTS)


@pytest.mark.parametrize("stage", STAGES)
def test_both_optimizers_go_on_at_another_world_and_stage(stage: int, alone: dict[str, Any]) -> None:
    found = alone[str(stage)]
    assert found["losses"] == pytest.approx(found["plain"], abs=2e-5)
    assert found["counts"] == COUNTS


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("role", ["main", "judge"])
def test_a_refused_turn_leaves_no_trace_of_the_whole_step(stage: int, role: str, ranks: list[dict[str, Any]]) -> None:
    """Refused after the first optimizer was applied, too: weights, moments and counts of both are bitwise as before."""
    for rank in ranks:
        assert rank[f"{stage}/refused"][role]
