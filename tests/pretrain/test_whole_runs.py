"""Families from training to export: two ranks under ZeRO-3, resumed bitwise, evaluated, exported, imported again."""

from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.errors import DataError
from pretrain import evaluate
from pretrain.checkpoint import verbs
from pretrain.checkpoint.catalog import committed
from pretrain.checkpoint.layout import Slices
from pretrain.checkpoint.trained import load_weights
from pretrain.evaluations import retrieval
from pretrain.interchange.foreign import importable
from pretrain.interchange.layouts import LAYOUTS
from tests.families import FAMILIES, PAIRS, Material
from tests.pretrain.commands import loss_bits, recipe, steps_of
from tests.pretrain.processes import run_ranks

WORKER = Path(__file__).with_name("checkpoint") / "leg_worker.py"
pytestmark = [pytest.mark.slow, pytest.mark.real]
ELSEWHERE = ("clip", "electra")
"""Resumed bitwise and exported by other tests."""
NAMES = [
    name
    for name, family in PAIRS.items()
    if name not in ELSEWHERE and not family.reads.codes and not family.config().task.replicated
]


def trained(name: str, material: Material, run: Path, legs: tuple[int, ...]) -> Path:
    """The run on two ranks, stopped after each leg and resumed from what it saved."""
    tree = FAMILIES[name].run(material, run, steps=8, zero_stage=3, checkpoint_every_steps=4)
    config, start = recipe(tree, run.with_suffix(".yaml")), 0
    for until in legs:
        for leg in run_ranks(WORKER, [str(config), str(until)], 2):
            assert leg == {"from": start, "to": until}
        start = until
    return run


def state_of(run: Path) -> dict[str, torch.Tensor]:
    slices = Slices(committed(run / "checkpoints")[-1].folder)
    return {f"{kind}/{name}": slices.whole(kind, name) for name in slices.shapes for kind in ("param", "exp_avg_sq")}


@pytest.fixture(scope="module", params=NAMES)
def whole(request: pytest.FixtureRequest, material: Material, tmp_path_factory: pytest.TempPathFactory) -> Path:
    name = str(request.param)
    return trained(name, material, tmp_path_factory.mktemp("whole") / name.replace(" ", "-"), (8,))


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(whole: Path, material: Material, tmp_path: Path) -> None:
    name = whole.name.replace("-", " ")
    run = trained(name, material, tmp_path / "run", (3, 8))
    assert loss_bits(run) == loss_bits(whole) and len(steps_of(run)) == 8
    mine, theirs = state_of(run), state_of(whole)
    assert mine.keys() == theirs.keys() and not [key for key in mine if not torch.equal(mine[key], theirs[key])]
    assert len({row["loss"] for row in steps_of(run).values()}) == 8


def test_what_was_trained_is_evaluated_and_exported(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retrieval, "CANDIDATES", 8)
    family = FAMILIES[whole.name.replace("-", " ")]
    export = verbs.export(whole, tmp_path / "export")
    of_run, of_export = evaluate.main(whole), evaluate.main(export)
    assert of_run[family.figure] == of_export[family.figure] and 0 <= of_run[family.figure] <= 1
    trained_model = load_weights(export)
    for layout in layouts_of(trained_model[1]):
        verbs.export(whole, tmp_path / layout, form=layout)
        returned = load_weights(verbs.import_(tmp_path / layout, tmp_path / f"from-{layout}", layout))
        assert returned[1] == trained_model[1]
        state, again = trained_model[0].state_dict(), returned[0].state_dict()
        assert state.keys() == again.keys() and all(torch.equal(state[key], again[key]) for key in state)


def layouts_of(config: Any) -> list[str]:
    """The layouts that can hold this model and be imported again."""
    return [
        name
        for name in importable()
        if LAYOUTS[name].kind == config.kind
        and all(getattr(config, field) == value for field, value in LAYOUTS[name].fixed.items())
    ]


def test_the_bias_of_a_sigmoid_loss_is_trained_and_a_layout_without_one_refused(
    material: Material, tmp_path: Path
) -> None:
    run = trained("clip with the sigmoid loss", material, tmp_path / "run", (2,))
    assert load_weights(run)[0].state_dict()["logit_bias"].item() != -10
    with pytest.raises(DataError, match="have logit_bias=None"):
        verbs.export(run, tmp_path / "public", form="transformers-clip")
