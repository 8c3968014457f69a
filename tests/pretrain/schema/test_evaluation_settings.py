"""Settings of evaluation in training: what is refused before anything starts, and how the data are named."""

from typing import Any

import pytest

from data_pipeline.errors import ConfigError
from data_pipeline.settings import check_settings, digest, override_settings
from pretrain.config import RunConfig
from pretrain.evaluations.patience import Progress
from pretrain.schema.saved import saved_run
from tests.families import FAMILIES, PAIRS


def run_of(name: str = "electra", evaluation: Any = "held-out", **train: Any) -> RunConfig:
    """A run with these held-out data."""
    tree = FAMILIES[name].config().model_dump(mode="json")
    tree["data"]["evaluation"] = evaluation
    tree["train"] |= train
    return check_settings(RunConfig, tree, "test")


def test_data_have_one_path_or_several_by_name() -> None:
    assert run_of(evaluation="a").data.evaluations == {"": "a"}
    assert run_of(evaluation={"val": "a", "test-1.b": "b"}).data.evaluations == {"val": "a", "test-1.b": "b"}
    for nothing in ("", None, {}):
        assert run_of(evaluation=nothing).data.evaluations == {}
    assert set(run_of(evaluation={"val": "a", "b": "c"}).data.paths) >= {"a", "c"}


@pytest.mark.parametrize("name", ["", "a/b", "ä", "..", ".hidden", "a b", "a:b", "a\n", "-x", "a" * 65, 3, True, None])
def test_a_name_with_other_characters_is_refused(name: Any) -> None:
    with pytest.raises(ConfigError, match="data.evaluation.*the name .* of an evaluation"):
        run_of(evaluation={name: "a"})


@pytest.mark.parametrize("evaluation", [{"val": ""}, {"val": None}, {"val": 3}, {"val": {"a": "b"}}, 3, ["a"], True])
def test_what_names_no_data_is_refused(evaluation: Any) -> None:
    with pytest.raises(ConfigError, match="data.evaluation"):
        run_of(evaluation=evaluation)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.evaluation=other", {"": "other"}),
        ("data.evaluation=", {}),
        ("data.evaluation.val=1e3", {"val": "1e3"}),
        ("data.evaluation={val: a, few: 12}", {"val": "a", "few": "12"}),
    ],
)
def test_the_command_line_names_data(override: str, expected: dict[str, str]) -> None:
    tree = FAMILIES["electra"].config().model_dump(mode="json")
    assert override_settings(RunConfig, tree, [override], "test").data.evaluations == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evaluate_every_steps": 5, "evaluation": None}, "evaluate_every_steps=5 has no data to evaluate on"),
        ({"patience": 2}, "patience=2 counts evaluations, and there are none"),
        (
            {"patience": 2, "evaluate_every_steps": 5, "keep_best": "loss"},
            "keep_best='loss' names no figure of",
        ),
        ({"patience": 2, "evaluate_every_steps": 5, "evaluation": {"a": "x", "b": "y"}}, "min:eval/a/loss"),
        ({"keep_best": "eval/loss"}, "needs data.evaluation and train.evaluate_every_steps"),
        ({"evaluate_every_steps": 5, "keep_best": "eval/val/loss"}, "eval/rtd_accuracy"),
        ({"evaluate_every_steps": 5, "keep_best": "min:eval/lr"}, "yields no such metric"),
        ({"evaluate_every_steps": -1}, "evaluate_every_steps"),
    ],
)
def test_evaluations_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run_of(**changes)


@pytest.mark.parametrize("name", PAIRS)
def test_every_figure_of_an_evaluation_may_choose_the_best(name: str) -> None:
    figures = FAMILIES[name].config().task.figures()
    assert {"loss", FAMILIES[name].figure} <= figures.keys() and "lr" not in figures
    for figure in figures:
        for data, prefix in ("a", "eval/"), ({"v-1": "a", "w": "b"}, "eval/v-1/"):
            best = f"max:{prefix}{figure}"
            config = run_of(name, data, evaluate_every_steps=2, keep_best=best, patience=1)
            assert config.watched == best
            assert check_settings(RunConfig, saved_run(config.model_dump(mode="json")), "saved") == config


def test_settings_that_are_left_out_change_no_digest() -> None:
    """Recipes keep the hash that they had before there was evaluation in training."""
    tree = FAMILIES["electra"].config()
    assert "evaluate_every_steps" in tree.model_dump()["train"]
    assert digest(run_of(evaluation=None)) != digest(run_of(evaluation="a"))
    assert digest(run_of()) != digest(run_of(evaluate_every_steps=2))


def test_patience_counts_evaluations_without_improvement_across_a_resume() -> None:
    progress = Progress("max:eval/val/accuracy", patience=2)
    for step, value in ((2, 0.5), (4, 0.5), (6, 0.6), (8, float("nan"))):
        progress.note(step, {"eval/val/accuracy": value})
        assert not progress.exhausted
    resumed = Progress("max:eval/val/accuracy", patience=2)
    resumed.load(progress.state())
    resumed.note(10, {"eval/val/accuracy": 0.6})
    assert resumed.exhausted and "not better than 0.6 of step 6 in 2 evaluations" in resumed.told()
    other = Progress("min:eval/loss", patience=2)
    other.load(progress.state())
    assert (other.step, other.misses, other.best) == (8, 0, None)
    fresh = Progress("max:eval/val/accuracy", patience=2)
    fresh.load(progress.state(), other_data=True)
    assert (fresh.step, fresh.misses, fresh.best) == (8, 0, None)
    with pytest.raises(ConfigError, match="yields no such figure of these data, but eval/val/accuracy"):
        other.note(10, {"eval/val/accuracy": 0.6})
