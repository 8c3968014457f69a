"""The plan beside the real modules and the real engine: FLOPs, activations, states, bytes on the wire."""

import pytest

from data_pipeline.settings import load_settings
from launchers.plan.make import make_plan
from pretrain.config import RunConfig
from tests.families import FAMILIES
from tests.launchers.plan import measured
from tests.launchers.plan.engine_runs import RUNS, between, in_backward, on_ranks
from tests.launchers.plan.recipes import desk, figures_of, recipes
from tests.pretrain.processes import ROOT

SMALL = [recipe for recipe in recipes() if "/small/" in recipe]
AGAIN = "train.recompute=true"
VARIANTS: list[tuple[str, ...]] = [
    *((recipe, *more) for recipe in SMALL for more in ((), (AGAIN,))),
    ("configs/small/gpt.yaml", "model.dropout=0.1"),
    ("configs/small/gpt.yaml", "model.dropout=0.1", AGAIN),
    ("configs/small/bert.yaml", "model.dropout=0", "task.packing=true", "task.nsp=false"),
    ("configs/small/electra.yaml", "task.packing=true", AGAIN),
]


def within(recipe: str) -> float:
    """A hundredth; of a VQGAN more: a CPU's convolutions lay pictures out in another order, which is kept as well."""
    return 0.06 if "vqgan" in recipe else 0.01


def run(recipe: str, *overrides: str) -> RunConfig:
    return load_settings(RunConfig, ROOT / recipe, overrides)


@pytest.mark.slow
@pytest.mark.parametrize("words", VARIANTS, ids=" ".join)
def test_flops_are_those_that_torch_counts(words: tuple[str, ...]) -> None:
    config = run(*words)
    forward, both = measured.flops(config, 3)
    figures = figures_of(config, 3)
    assert figures.flops == both
    assert figures.forward <= forward  # the loss of CLIP is not the model's


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_flops_of_every_family_are_those_that_torch_counts(name: str, recompute: bool) -> None:
    config = FAMILIES[name].config(recompute=recompute)
    assert figures_of(config, 3).flops == measured.flops(config, 3)[1]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("words", VARIANTS, ids=" ".join)
def test_activations_are_what_is_alive_after_a_forward(words: tuple[str, ...], precision: str) -> None:
    config = run(*words, f"train.precision={precision}")
    assert figures_of(config, 3).kept == pytest.approx(measured.held_bytes(config, 3), rel=within(words[0]))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", SMALL)
def test_activations_are_what_autograd_keeps(recipe: str) -> None:
    config = run(recipe, "train.precision=fp32")
    assert figures_of(config, 3).kept == pytest.approx(measured.saved_bytes(config, 3), rel=within(recipe))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("recipe", SMALL)
def test_activations_and_temporaries_are_within_a_tenth_of_the_peak_of_forward_and_backward(
    recipe: str, precision: str
) -> None:
    config = run(recipe, f"train.precision={precision}")
    assert figures_of(config, 8).most == pytest.approx(measured.peak_bytes(config, 8), rel=0.1)


# ------------------------------------------------------------------------------------------- the engine


@pytest.mark.slow
@pytest.mark.timeout(660)
def test_the_engine_holds_and_sends_what_the_plan_says() -> None:
    ranks = on_ranks(list(RUNS.values()), world=2)
    for number, (name, words) in enumerate(RUNS.items()):
        plan = make_plan(run(*words), desk(2))
        most = {key: max(rank["runs"][number][key] for rank in ranks) for key in ranks[0]["runs"][number]}
        assert plan.sent_per_rank == pytest.approx(most["sent"], rel=0.01), name
        assert between(plan) == pytest.approx(most["between"], rel=0.02), name
        seen = max(most.get("in_backward", 0), most["before_update"])  # at two moments; the worst may be another
        assert 0.95 < in_backward(plan) / seen < 1.3, name
