"""Batch sizes that grow in a warm-up: which samples a step has, whole runs, refusals, plans."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st

from data_pipeline.errors import ConfigError
from data_pipeline.settings import check_settings, digest, override_settings
from data_pipeline.stream.reader import Stream
from launchers.chaos.campaign import Campaign
from launchers.chaos.laws import every_position_once
from launchers.plan.clusters import cluster_of
from launchers.plan.make import candidates, make_plan
from launchers.plan.show import notes
from pretrain.checkpoint.catalog import committed
from pretrain.config import RunConfig, TrainConfig, micro_batch_of
from pretrain.inputs.feed import Feed
from tests.launchers.plan.recipes import run_of
from tests.pretrain.commands import Material, command, electra, finish, loss_bits, recipe, rows_of, tessera
from tests.pretrain.test_feed import keys
from tests.pretrain.test_training import REDUCTION, assert_same_state, final

WARMUP, BATCH = [[2, 6], [2, 12]], 24
POSITIONS = [[0, 6], [6, 12], [12, 24], [24, 36], [36, 60], [60, 84]]


def train(**tree: Any) -> TrainConfig:
    return check_settings(TrainConfig, {"steps": 6, "global_batch": BATCH, "batch_warmup": WARMUP} | tree, "test")


def test_the_batch_of_a_step_is_a_function_of_the_step() -> None:
    assert [train().batch_at(step) for step in range(6)] == [6, 6, 12, 12, 24, 24]
    assert train().samples == 84 and train(batch_warmup=[]).samples == 6 * BATCH


@budget(max_examples=40, deadline=None)
@given(sizes=st.lists(st.integers(1, 50), min_size=1, max_size=5, unique=True), data=st.data())
def test_the_samples_of_all_steps_add_up(sizes: list[int], data: st.DataObject) -> None:
    *warmup, last = [(data.draw(st.integers(1, 9)), size) for size in sorted(sizes)]
    steps = sum(count for count, _ in warmup) + last[0]
    config = train(steps=steps, global_batch=last[1], batch_warmup=warmup)
    assert [config.batch_at(step) for step in range(steps)] == [
        size for count, size in (*warmup, last) for _ in range(count)
    ]
    assert config.samples == sum(config.batch_at(step) for step in range(steps))


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("start", [0, 3])
def test_ranks_and_a_later_start_share_the_positions_of_every_step(world: int, start: int, material: Material) -> None:
    stream, config = Stream(material.dataset, seed=3), train()
    feeds = [Feed(stream, keys, BATCH, (rank, world), 1, 2, batch_at=config.batch_at) for rank in range(world)]
    ranks = [list(feed.steps(start, 6, POSITIONS[start][0])) for feed in feeds]
    for step, (low, high) in enumerate(POSITIONS[start:]):
        assert {rank[step][0] for rank in ranks} == {(low, high)}
        found = [pair for rank in ranks for batch in rank[step][1] for pair in batch["samples"]]
        assert [at for at, _ in sorted(found)] == list(range(low, high))
        assert {len(rank[step][1]) for rank in ranks} == {(high - low) // world}


# ---------------------------------------------------------------------------------------------------- refusals


def run(**tree: Any) -> RunConfig:
    return check_settings(RunConfig, electra(Material(Path("d"), Path("v")), Path("r"), **tree), "test")


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"batch_warmup": [[2, 8], [2, 4]]}, r"train.batch_warmup: the batches are 8, 4, 16 .* each must be above"),
        ({"batch_warmup": [[2, 8], [2, 8]]}, r"the batches are 8, 8, 16 with train.global_batch last"),
        ({"batch_warmup": [[2, 16]]}, r"the batches are 16, 16 with"),
        ({"batch_warmup": [[2, 32]]}, r"the batches are 32, 16 with"),
        ({"batch_warmup": [[6, 8]]}, r"train.batch_warmup takes 6 steps, which must be below train.steps=6"),
        ({"batch_warmup": [[3, 4], [4, 8]]}, r"train.batch_warmup takes 7 steps"),
        ({"batch_warmup": [[0, 8]]}, r"train.batch_warmup.0.0 = 0"),
        ({"batch_warmup": [[2, 0]]}, r"train.batch_warmup.0.1 = 0"),
        ({"batch_warmup": [[2]]}, r"train.batch_warmup.0"),
        ({"batch_warmup": "slow"}, r"train.batch_warmup = 'slow'"),
    ],
)
def test_a_warm_up_that_does_not_grow_or_end_is_refused(tree: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(steps=6, global_batch=16, **tree)


@pytest.mark.parametrize(
    ("tree", "world", "message"),
    [
        ({}, 5, r"global_batch=24 is not divisible by 5 ranks x micro_batch 1 = 5; use 20 or 25"),
        ({"micro_batch": 4}, 1, r"batch_warmup: batch 6 is not divisible by 1 ranks x micro_batch 4 = 4; use 4 or 8"),
        ({"micro_batch": 4}, 3, r"batch_warmup: batch 6 is not divisible by 3 ranks x micro_batch 4 = 12; use 12"),
        ({}, 4, r"batch_warmup: batch 6 is not divisible by 4 ranks x micro_batch 1 = 4; use 4 or 8"),
    ],
)
def test_every_batch_must_divide(tree: dict[str, Any], world: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        micro_batch_of(train(**tree), world)
    assert micro_batch_of(train(micro_batch=2), 3) == (2, 4) and micro_batch_of(train(), 3) == (8, 1)


def test_a_run_without_a_warm_up_keeps_its_digest() -> None:
    assert digest(run()) == digest(run(batch_warmup=[])) != digest(run(steps=24, batch_warmup=[[2, 8]]))
    given = override_settings(TrainConfig, {}, ["steps=6", "global_batch=24", "batch_warmup=[[2, 6]]"], "test")
    assert given.batch_warmup == ((2, 6),)


def test_the_planner_counts_the_samples_and_advises_what_divides_every_batch() -> None:
    small = {"kind": "bert", "vocab_size": 100, "context": 16, "layers": 1, "width": 16, "heads": 2}
    own = {"steps": 6, "global_batch": BATCH}
    plain, grown = (
        make_plan(run_of(small, **own, **more), cluster_of("h100", 1, 2)) for more in ({}, {"batch_warmup": WARMUP})
    )
    assert grown.days[1] == pytest.approx(plain.days[1] * 84 / (6 * BATCH))
    assert "the first 4 steps have batches of 6, 12" in " ".join(notes(grown, None))
    assert "batches of" not in " ".join(notes(plain, None))
    assert {plan.micro for plan in candidates(grown.config, grown.cluster, False)} == {1, 3}
    with pytest.raises(ConfigError, match="batch_warmup: batch 6 is not divisible by 4 ranks"):
        make_plan(grown.config, cluster_of("h100", 1, 4))


def test_positions_of_other_sizes_than_the_warm_up_s_break_the_law(tmp_path: Path) -> None:
    config = run(steps=6, global_batch=BATCH, batch_warmup=WARMUP)
    campaign = Campaign(config, tmp_path / "reference", tmp_path / "struck", "", [], 0)
    campaign.struck.mkdir()

    def complaints(positions: list[list[int]]) -> list[str]:
        rows = [{"step": step, "attempt": 0, "positions": span} for step, span in enumerate(positions, 1)]
        (campaign.struck / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return list(every_position_once(campaign))

    assert complaints(POSITIONS) == []
    assert len(complaints([[0, 6], [6, 18], *POSITIONS[3:]])) > 1


# ------------------------------------------------------------------------------------------------- whole runs


def tree_of(material: Material, run: Path, **more: Any) -> dict[str, Any]:
    """6 steps with dropout in fp32."""
    own = {"steps": 6, "precision": "fp32", "zero_stage": 0, "checkpoint_every_steps": 3, "global_batch": BATCH}
    tree = electra(material, run, **own | more)
    tree["model"]["dropout"] = 0.1
    tree["optim"] |= {"schedule": "constant", "warmup_steps": 0}
    return tree


def trained(tree: dict[str, Any], *words: str, world: int = 1) -> Path:
    run = Path(tree["run"])
    config = recipe(tree, run.with_suffix(".yaml"))
    launch = ("launch", "local", config, "--procs-per-node", str(world)) if world > 1 else ("train", config)
    done = finish(command(*launch, *words)) if world > 1 else tessera(*launch, *words)
    assert done.returncode == 0, done.stdout[-3000:]
    return run


@pytest.fixture(scope="module")
def grown(material: Material, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, micro-batches of 6: 1, 2 and 4 of them a step."""
    run = tmp_path_factory.mktemp("grown") / "run"
    return trained(tree_of(material, run, batch_warmup=WARMUP, micro_batch=6))


@pytest.mark.slow
@pytest.mark.real
def test_a_warm_up_is_bitwise_runs_of_each_batch_after_one_another(
    grown: Path, material: Material, tmp_path: Path
) -> None:
    assert [row["positions"] for row in rows_of(grown)] == POSITIONS
    run, changed = tmp_path / "run", []
    for steps, batch in ((2, 6), (4, 12), (6, BATCH)):
        trained(tree_of(material, run, steps=steps, global_batch=batch, micro_batch=6), *changed)
        changed = [f"--change=train.steps={steps + 2}"]
    assert loss_bits(run) == loss_bits(grown)
    assert_same_state(run, grown)


@pytest.mark.slow
@pytest.mark.real
def test_a_run_goes_on_within_the_warm_up_bitwise(grown: Path, material: Material, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(grown, run)
    shutil.rmtree(final(run).folder)
    assert [saved.step for saved in committed(run / "checkpoints")] == [3]
    trained(tree_of(material, run, batch_warmup=WARMUP, micro_batch=6))
    assert loss_bits(run) == loss_bits(grown)
    assert_same_state(run, grown)
    config = recipe(tree_of(material, run, batch_warmup=[[2, 6]]), tmp_path / "run.yaml")
    done = tessera("train", config)
    assert done.returncode == 64 and "train.batch_warmup: [[2, 6], [2, 12]] saved" in done.stdout, done.stdout[-3000:]


@pytest.mark.slow
@pytest.mark.real
def test_three_ranks_at_stage_3_have_the_losses_up_to_rounding(grown: Path, material: Material, tmp_path: Path) -> None:
    run = trained(tree_of(material, tmp_path / "run", batch_warmup=WARMUP, zero_stage=3, micro_batch=2), world=3)
    assert [row["positions"] for row in rows_of(run)] == POSITIONS
    losses = [[row["loss"] for row in rows_of(each)] for each in (grown, run)]
    assert losses[1] == pytest.approx(losses[0], rel=REDUCTION)
    assert len(set(losses[0])) == 6
