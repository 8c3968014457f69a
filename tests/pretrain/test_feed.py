"""What a step holds depends on its number alone: not on ranks, micro-batches, prefetching or where the run began."""

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from data_pipeline.errors import ConfigError
from data_pipeline.settings import check_settings
from data_pipeline.stream.reader import Stream
from data_pipeline.text.kinds import open_tokenizer
from pretrain.config import RunConfig
from pretrain.inputs.feed import Feed
from pretrain.models import MODELS
from pretrain.models.noise import noise_of
from pretrain.runtime.mesh import RankPlace, place_from
from pretrain.tasks import TASKS
from pretrain.tasks.collectives import ONE_DEVICE
from pretrain.train import Run, check_batch
from tests.pretrain.commands import Material, electra, vqgan

GLOBAL_BATCH = 48
STEPS = 6  # 288 positions of 200 samples: into the second epoch


def keys(samples: list[Any]) -> dict[str, Any]:
    return {"samples": [(sample.position, sample.key) for sample in samples]}


def by_loop(stream: Stream) -> list[list[tuple[int, str]]]:
    """The reference: position after position, one at a time."""
    return [
        [(at, stream.read(at, at + 1)[0].key) for at in range(step * GLOBAL_BATCH, (step + 1) * GLOBAL_BATCH)]
        for step in range(STEPS)
    ]


def batch_at(feed: Feed, step: int) -> list[Any]:
    return feed.preparer.at(step * GLOBAL_BATCH, GLOBAL_BATCH).batches


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("micro_batch", [None, 2])
def test_world_size_does_not_change_the_batches(world: int, micro_batch: int | None, material: Material) -> None:
    stream = Stream(material.dataset, seed=3)
    micro = micro_batch or GLOBAL_BATCH // world
    feeds = [Feed(stream, keys, GLOBAL_BATCH, (rank, world), micro, 2) for rank in range(world)]
    ranks = [list(feed.steps(0, STEPS)) for feed in feeds]
    one_rank = list(itertools.islice(stream.batches(0, GLOBAL_BATCH), STEPS))
    for step, expected in enumerate(by_loop(stream)):
        assert {rank[step][0] for rank in ranks} == {(step * GLOBAL_BATCH, (step + 1) * GLOBAL_BATCH)}
        found = [pair for rank in ranks for batch in rank[step][1] for pair in batch["samples"]]
        assert sorted(found) == expected
        assert found == keys(one_rank[step])["samples"]


@pytest.mark.parametrize("start", [0, 1, 5])
@pytest.mark.parametrize("ahead", [1, 2, 9])
def test_a_feed_that_begins_later_or_reads_further_ahead_gives_the_same_steps(
    start: int, ahead: int, material: Material
) -> None:
    stream = Stream(material.dataset, seed=3)
    feed = Feed(stream, keys, GLOBAL_BATCH, (1, 2), 24, ahead)
    plain = [batch_at(feed, step) for step in range(start, STEPS)]
    assert [batches for _, batches in feed.steps(start, STEPS)] == plain


@pytest.mark.parametrize("describe", [electra, vqgan])
@pytest.mark.parametrize("world", [2, 3, 8])
def test_world_size_does_not_change_a_single_number_of_the_tensors(
    describe: Any, world: int, material: Material, tmp_path: Path
) -> None:
    config = check_settings(RunConfig, describe(material, tmp_path), "test")
    config = config.model_copy(update={"data": config.data.model_copy(update={"flip": True, "crop_scale": (0.5, 1.0)})})
    inputs = TASKS[config.task.kind].inputs(
        config, stream := Stream(material.dataset, 0), open_tokenizer(material.vocabulary)
    )
    whole = batch_at(Feed(stream, inputs, GLOBAL_BATCH, (0, 1), GLOBAL_BATCH, 1), 4)[0]
    parts = [batch_at(Feed(stream, inputs, GLOBAL_BATCH, (rank, world), 2, 1), 4) for rank in range(world)]
    for name, tensor in whole.items():
        assert torch.equal(torch.cat([batch[name] for rank in parts for batch in rank]), tensor), name


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bert", "electra"])
def test_the_mean_over_unequal_micro_batches_is_the_loss_of_the_whole_batch(
    kind: str, material: Material, tmp_path: Path
) -> None:
    tree = electra(material, tmp_path)
    tree["model"] |= {"kind": kind, "dropout": 0.1}
    if kind == "bert":
        del tree["model"]["generator_fraction"]
        tree["task"] = {"kind": "mlm"}
    tree["task"] |= {"mask_rate": 0.4}  # enough that captions of other lengths have other counts
    config = check_settings(RunConfig, tree, "test")
    stream = Stream(material.dataset, 0)
    inputs = TASKS[config.task.kind].inputs(config, stream, open_tokenizer(material.vocabulary))
    objective = TASKS[config.task.kind](MODELS[kind](config.model), config.task, ONE_DEVICE)
    run: Any = SimpleNamespace(task=objective, mesh=SimpleNamespace(mean=lambda values: values))
    batches = [inputs(stream.read(at, at + 2)) for at in range(0, 16, 2)]
    assert len({int(batch["label_weights"].sum()) for batch in batches}) > 1
    parts = [with_noise(objective, batch) for batch in Run.with_counts(run, batches)]
    whole = with_noise(objective, inputs(stream.read(0, 16)))
    torch.testing.assert_close(torch.stack(parts).mean(), whole, rtol=1e-5, atol=0)


def with_noise(objective: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with noise_of(batch["noise"], batch.get("places")):
        return objective(batch)["loss"]


# ------------------------------------------------------------------------------------- batch and processes


@pytest.mark.parametrize(
    ("global_batch", "micro_batch", "world", "expected"),
    [
        (16, None, 2, (8, 1)),
        (16, 2, 2, (2, 4)),
        (16, 16, 1, (16, 1)),
        (16, None, 3, "use 15 or 18"),
        (16, 3, 2, "2 ranks x micro_batch 3 = 6; use 12 or 18"),
        (2, None, 8, r"8 ranks x micro_batch 1 = 8; use 8$"),
    ],
)
def test_a_batch_divides_over_ranks_and_accumulation_or_usable_ones_are_named(
    global_batch: int, micro_batch: int | None, world: int, expected: Any, material: Material, tmp_path: Path
) -> None:
    tree = electra(material, tmp_path, global_batch=global_batch, micro_batch=micro_batch)
    config = check_settings(RunConfig, tree, "test")
    if isinstance(expected, tuple):
        assert check_batch(config, world) == expected
    else:
        with pytest.raises(ConfigError, match=expected):
            check_batch(config, world)


TORCHRUN = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "n0", "MASTER_PORT": "99"}
AGENT = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "mine"}
SRUN = {
    "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NTASKS": "4", "SLURM_STEP_ID": "0",
    "MASTER_ADDR": "n0", "MASTER_PORT": "99",
}  # fmt: skip


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        (TORCHRUN | {"TORCHELASTIC_RUN_ID": "mine"}, RankPlace(3, 1, 4, "n0", 99)),
        (TORCHRUN | AGENT, RankPlace(3, 1, 4, "n0", 99, agent="mine")),
        (SRUN, RankPlace(3, 1, 4, "n0", 99)),
        (SRUN | TORCHRUN | {"RANK": "2", "LOCAL_RANK": "0"}, RankPlace(2, 0, 4, "n0", 99)),
    ],
)
def test_a_process_knows_its_place_from_torchrun_s_variables_or_srun_s(
    environment: dict[str, str], place: RankPlace
) -> None:
    assert place_from(environment) == place


@pytest.mark.parametrize("environment", [{}, {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0"}])
def test_a_process_without_launcher_is_alone(environment: dict[str, str]) -> None:
    place = place_from(environment)
    assert (place.rank, place.local_rank, place.world, place.host) == (0, 0, 1, "127.0.0.1")


@pytest.mark.parametrize("environment", [TORCHRUN, SRUN])
def test_a_process_that_is_not_told_where_to_meet_says_what_is_missing(environment: dict[str, str]) -> None:
    partial = {name: value for name, value in environment.items() if name != "MASTER_ADDR"}
    with pytest.raises(ConfigError, match="rank 3 of 4 has no MASTER_ADDR; start with"):
        place_from(partial)
