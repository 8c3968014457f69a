"""The plan beside the real modules and the real engine: parameters, FLOPs, activations, states, bytes on the wire."""

import pytest

from data_pipeline.settings import load_settings
from launchers.plan.make import make_plan
from launchers.plan.models import trace
from pretrain.config import RunConfig
from tests.launchers.plan import measured
from tests.launchers.plan.engine_runs import RUNS, between, in_backward, on_ranks
from tests.launchers.plan.recipes import computed, desk, kept, kept_by_recomputing, recipes, tapes_of
from tests.pretrain.processes import ROOT

SMALL = [recipe for recipe in recipes() if "/small/" in recipe]


def run(recipe: str, *overrides: str) -> RunConfig:
    return load_settings(RunConfig, ROOT / recipe, overrides)


@pytest.mark.parametrize("recipe", recipes())
def test_a_recipe_has_exactly_the_parameters_of_its_module(recipe: str) -> None:
    config = run(recipe)
    assert sorted(weight.numel for weight in trace(config, 1).weights) == sorted(measured.parameters(config))


@pytest.mark.parametrize("recipe", SMALL)
def test_flops_are_those_that_torch_counts(recipe: str) -> None:
    tapes = tapes_of(run(recipe), 3)
    forward, both = measured.flops(run(recipe), 3)
    assert sum(tape.forward_flops for tape in tapes) == forward
    assert computed(tapes) == both


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("recipe", SMALL)
def test_activations_are_within_a_tenth_of_what_autograd_keeps(recipe: str, precision: str) -> None:
    config = run(recipe, f"train.precision={precision}")
    assert kept(tapes_of(config, 3)) == pytest.approx(measured.saved_bytes(config, 3), rel=0.1)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("recipe", SMALL)
def test_activations_that_are_computed_again_are_within_a_tenth_of_what_is_alive_after_a_forward(
    recipe: str, precision: str
) -> None:
    config = run(recipe, f"train.precision={precision}", "train.recompute=true")
    assert kept_by_recomputing(tapes_of(config, 8)) == pytest.approx(measured.held_bytes(config, 8), rel=0.1)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("recipe", SMALL)
def test_activations_and_temporaries_are_within_a_tenth_of_the_peak_of_forward_and_backward(
    recipe: str, precision: str
) -> None:
    config = run(recipe, f"train.precision={precision}")
    tapes = tapes_of(config, 8)
    planned = kept(tapes) + sum(tape.transient for tape in tapes)
    assert planned == pytest.approx(measured.peak_bytes(config, 8), rel=0.1)


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
