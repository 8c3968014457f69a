"""A run goes on on another world, at another ZeRO stage and with other micro-batches: same up to rounding.

What rounding may do is measured: the same run, uninterrupted, on one rank and on three differs by the order of sums
alone. A run that changed its split on the way may differ from the first by as much, times `SLACK`.
"""

from pathlib import Path

import pytest

from tests.families import FAMILIES
from tests.pretrain.commands import Material, recipe, steps_of
from tests.pretrain.processes import run_ranks

WORKER = Path(__file__).with_name("leg_worker.py")
pytestmark = [pytest.mark.slow, pytest.mark.real]
SLACK = 8
SMALLEST = 1.2e-7  # the spacing of float32 at 1
Way = list[tuple[int, int, int, int]]
"""(until step, ranks, ZeRO stage, micro-batch) of each leg."""
STRAIGHT: Way = [(4, 1, 0, 12)]
OTHER_ORDER: Way = [(4, 3, 2, 4)]
SPLIT: Way = [(2, 1, 3, 4), (4, 2, 3, 2)]


def travelled(material: Material, run: Path, way: Way, name: str) -> list[float]:
    """The losses of the run after all legs: each is stopped at its step, and the next goes on from what it saved."""
    tree = FAMILIES[name].run(material, run, steps=8, precision="fp32", checkpoint_every_steps=100)
    config, start = recipe(tree, run.with_suffix(".yaml")), 0
    for until, world, stage, micro in way:
        split = [f"train.zero_stage={stage}", f"train.micro_batch={micro}"]
        for leg in run_ranks(WORKER, [str(config), str(until), *split], world):
            assert leg == {"from": start, "to": until}
        start = until
    rows = steps_of(run)
    return [rows[step]["loss"] for step in range(1, start + 1)]


def apart(losses: list[float], others: list[float]) -> float:
    return max(abs(a / b - 1) for a, b in zip(losses, others, strict=True))


@pytest.mark.parametrize("name", ["clip", "clip with the sigmoid loss", "vit"])
def test_world_stage_and_micro_batch_change_a_run_by_rounding_alone(
    name: str, material: Material, tmp_path: Path
) -> None:
    straight = travelled(material, tmp_path / "straight", STRAIGHT, name)
    rounding = apart(travelled(material, tmp_path / "order", OTHER_ORDER, name), straight)
    assert rounding < 1e-5  # else the measure itself is off
    assert apart(travelled(material, tmp_path / "split", SPLIT, name), straight) <= SLACK * max(rounding, SMALLEST)
