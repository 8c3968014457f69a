"""A family from training to an export: two ranks under ZeRO-3, resumed bitwise, evaluated, exported, imported again."""

import json
from pathlib import Path

import pytest
import torch

from data_pipeline.errors import DataError
from pretrain import evaluate
from pretrain.checkpoint import verbs
from pretrain.checkpoint.catalog import committed
from pretrain.checkpoint.layout import Slices
from pretrain.checkpoint.trained import load_trained
from pretrain.evaluations import retrieval
from tests.families import FAMILIES, Material
from tests.pretrain.commands import loss_bits, recipe, steps_of
from tests.pretrain.processes import run_ranks

WORKER = Path(__file__).with_name("checkpoint") / "leg_worker.py"
pytestmark = [pytest.mark.slow, pytest.mark.real]
NEW = ["clip with the sigmoid loss", "vit"]


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


@pytest.fixture(scope="module", params=NEW)
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
    state = load_trained(export).model.state_dict()
    if "logit_bias" in state:
        assert state["logit_bias"].item() != -10  # it was trained
        with pytest.raises(DataError, match="have logit_bias=None"):
            verbs.export(whole, tmp_path / "public", form="transformers-clip")
        return
    verbs.export(whole, tmp_path / "public", form="transformers-vit")
    returned = verbs.import_(tmp_path / "public", tmp_path / "returned", "transformers-vit")
    again = load_trained(returned).model.state_dict()
    assert all(torch.equal(state[key], again[key]) for key in state) and state.keys() == again.keys()
    assert len(json.loads((tmp_path / "public" / "config.json").read_text())["id2label"]) == 7
