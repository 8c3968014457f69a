"""Parameters that stand still, for a while or throughout, in every family. Real processes over gloo."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.errors import ConfigError
from data_pipeline.settings import check_settings
from pretrain.checkpoint.catalog import committed
from pretrain.checkpoint.trained import weights_of
from pretrain.config import OptimConfig
from pretrain.engine.optim import check_names, parameter_groups
from tests.families import PAIRS, Material, task_of
from tests.pretrain.commands import recipe, tessera
from tests.pretrain.freezing_worker import STEPS, UNTIL, cases
from tests.pretrain.processes import run_ranks

WORKER = Path(__file__).with_name("freezing_worker.py")
real = [pytest.mark.slow, pytest.mark.real]
NAMES = ["/".join(map(str, case)) for case in cases()]
ROUNDING = {"fp32": 3e-6, "bf16": 3e-3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("freezing")


@pytest.fixture(scope="module")
def played(folder: Path) -> list[dict[str, Any]]:
    return run_ranks(WORKER, [str(folder), "play"], world=2)


@pytest.fixture(scope="module")
def gone_on(folder: Path, played: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """By one and by three ranks, from what two have saved."""
    return {world: run_ranks(WORKER, [str(folder), "go-on"], world)[0] for world in (1, 3)}


def near(losses: list[float], name: str) -> Any:
    return pytest.approx(losses, rel=ROUNDING[name.rpartition("/")[2]])


class TestUnfreezing:
    pytestmark = real

    @pytest.mark.parametrize("name", NAMES)
    def test_a_run_interrupted_around_the_step_is_bitwise_the_uninterrupted_one(
        self, name: str, played: list[dict[str, Any]]
    ) -> None:
        """From checkpoints of the step before, of the step itself and of the one after: weights, moments and counts."""
        for rank in played:
            assert rank[name]["same"] == {str(step): True for step in (UNTIL - 1, UNTIL, UNTIL + 1)}

    @pytest.mark.parametrize("name", NAMES)
    def test_losses_are_those_of_torch_with_an_optimizer_that_begins_at_the_step(
        self, name: str, played: list[dict[str, Any]]
    ) -> None:
        assert played[0][name]["losses"] == near(played[0][name]["alone"], name)

    @pytest.mark.parametrize("name", NAMES)
    def test_other_numbers_of_ranks_go_on_the_same_up_to_rounding(
        self, name: str, played: list[dict[str, Any]], gone_on: dict[int, dict[str, Any]]
    ) -> None:
        for found in gone_on.values():
            for step, losses in found[name]["losses"].items():
                assert losses == near(played[0][name]["losses"][int(step) :], name)

    @pytest.mark.parametrize("name", NAMES)
    def test_averages_of_weights_are_those_of_a_loop_over_whole_weights(
        self, name: str, played: list[dict[str, Any]], gone_on: dict[int, dict[str, Any]]
    ) -> None:
        """Of those that stand still, the weights themselves; on one, two and three ranks up to rounding."""
        bound = {"fp32": 2e-5, "bf16": 2e-3}[name.rpartition("/")[2]]
        assert max(found[name]["far"] for found in (played[0], *gone_on.values())) < bound

    @pytest.mark.parametrize("name", NAMES)
    def test_a_checkpoint_without_averages_begins_them_at_its_weights(
        self, name: str, played: list[dict[str, Any]]
    ) -> None:
        assert all(rank[name]["begun"] for rank in played)

    @pytest.mark.parametrize("name", NAMES)
    def test_the_optimizer_holds_nothing_of_what_is_frozen_and_counts_from_the_step_on(
        self, name: str, played: list[dict[str, Any]]
    ) -> None:
        for rank in played:
            before, after = rank[name]["moments"][:UNTIL], rank[name]["moments"][UNTIL:]
            assert len(set(before)) == len(set(after)) == 1 and before[0] < after[0] / 4
            main = {group: n for group, n in rank[name]["updates"].items() if "." not in group}
            assert {n for group, n in main.items() if "@" in group} == {STEPS - UNTIL}
            assert {n for group, n in main.items() if "@" not in group} == {STEPS}


@pytest.mark.slow
@pytest.mark.real
def test_a_run_unfreezes_at_its_step_and_begins_its_average_on_demand(material: Material, tmp_path: Path) -> None:
    """By the command: what is frozen stands still up to the step, and moves from then on."""
    run = tmp_path / "run"
    tree = PAIRS["bert"].run(material, run, steps=4, checkpoint_every_steps=1, keep_checkpoints=9)
    tree["optim"]["freeze"] = [{"pattern": "embeddings", "until_step": 2}]
    path = recipe(tree, tmp_path / "run.yaml")
    done = tessera("train", path)
    assert done.returncode == 0, done.stdout[-3000:]
    words = [weights_of(saved)["embeddings.word.weight"] for saved in committed(run / "checkpoints")]
    moved = [not torch.equal(*pair) for pair in itertools.pairwise(words)]
    assert moved == [False, True, True]
    consent = ("--change", "train.steps=5", "--change", "optim.ema=0.5")
    done = tessera("train", path, *consent)
    assert done.returncode == 0 and "optim.ema begins at the weights" in done.stdout, done.stdout[-3000:]
    last = committed(run / "checkpoints")[-1]
    before, after = words[-1], weights_of(last)["embeddings.word.weight"]
    average = weights_of(last, ema=True)["embeddings.word.weight"]
    torch.testing.assert_close(average, before + (1 - 5 / 14) * (after - before))


# ------------------------------------------------------------------------------------------------ which


def optim(*freeze: Any, **more: Any) -> OptimConfig:
    return check_settings(OptimConfig, {"lr": 1.0, "freeze": freeze} | more, "test")


def test_the_latest_of_several_patterns_counts_and_one_without_a_step_is_for_good() -> None:
    task = task_of(PAIRS["bert"].config())
    settings = optim({"pattern": "embeddings", "until_step": 2}, {"pattern": "norm", "until_step": 4}, "word")
    trained: dict[int, set[str]] = {
        step: {name for group in parameter_groups(task, settings, step) for name in group["names"]} for step in range(6)
    }
    every = {name for name, _ in task.named_parameters()}
    word = {name for name in every if "word" in name}
    norms = {name for name in every if "norm" in name}
    assert trained[1] == {name for name in every - word - norms if "embeddings" not in name}
    assert trained[2] == trained[3] == every - word - norms
    assert trained[4] == trained[5] == every - word


def test_freezing_leaves_the_groups_of_a_run_without_it_as_they_were() -> None:
    task = task_of(PAIRS["electra"].config())
    assert [group["name"] for group in parameter_groups(task, optim())] == ["decay", "no_decay"]


@pytest.mark.parametrize("name", PAIRS)
def test_a_pattern_that_matches_nothing_or_leaves_a_role_nothing_is_refused(name: str) -> None:
    task = task_of(PAIRS[name].config())
    role = {"vqgan": " of the discriminator"}.get(name)
    with pytest.raises(ConfigError, match="'no_such' matches no parameter of .*; names are like model"):
        check_names(task, optim("weight", "no_such"))
    for every in ("^", ".*", {"pattern": "a|e|i|o|u", "until_step": 4}):
        with pytest.raises(ConfigError, match="every"):
            check_names(task, optim(every))
    if role:
        with pytest.raises(ConfigError, match="conv_out.weight, whose gradient the loss needs from step 6 on"):
            check_names(task, optim({"pattern": "decoder.conv_out", "until_step": 7}))
        check_names(task, optim({"pattern": "decoder.conv_out", "until_step": 6}))
        with pytest.raises(ConfigError, match=f"every parameter{role}"):
            check_names(task, optim("^discriminator"))


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("(", "not a regular expression"),
        ({"pattern": "x", "until_step": -3}, "until_step"),
        ({"pattern": "x", "until_step": 0}, "until_step"),
        ({"pattern": "x", "until": 3}, "until_step"),
        ({"until_step": 3}, "pattern"),
    ],
)
def test_an_entry_that_is_none_is_refused(entry: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        optim(entry)


@pytest.mark.parametrize("step", [12, 13])
def test_an_unfreezing_step_beyond_the_run_is_refused(step: int) -> None:
    config = PAIRS["bert"].config()
    tree = config.model_dump() | {"optim": {"lr": 1.0, "freeze": [{"pattern": "word", "until_step": step}]}}
    with pytest.raises(ConfigError, match=f"'word' until_step={step} must be below train.steps=12"):
        check_settings(type(config), tree, "test")


def test_frozen_parameters_are_of_the_whole_task_and_not_repeated_by_its_roles() -> None:
    settings = optim("word", roles={"discriminator": {"lr": 2.0}})
    assert settings.freeze[0].pattern == "word" and settings.of("discriminator").lr == 2.0
