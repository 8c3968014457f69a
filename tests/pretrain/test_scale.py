"""What grows with ranks is counted at thousands of simulated ones: questions to the store, files, bytes of an index.

Counts, not times: a step that asks for ranks times ranks, or ranks times parameters, would fail on any machine.
"""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from data_pipeline.errors import NodeFault
from data_pipeline.storage import open_storage
from launchers import slurm
from launchers.kubernetes import submit as kubernetes
from launchers.spec import KubernetesCluster, SlurmCluster
from pretrain.checkpoint.layout import (
    Even,
    RankShard,
    Share,
    Slices,
    even_part,
    index_of,
    parts_of,
    told_of,
    write_shard,
)
from pretrain.checkpoint.saver import ASKED_AT_ONCE, _gather
from pretrain.runtime.mesh import RankPlace, _meet
from tests.benchmarks.bench_scale import Simulated, spec
from tests.pretrain.checkpoint.simulated import KINDS

WORLD = 4096


class Counted:
    """A store that counts questions and the keys in them."""

    def __init__(self) -> None:
        self.inner, self.questions, self.keys = dist.HashStore(), 0, 0

    def __getattr__(self, name: str) -> Any:
        def call(first: Any, *more: Any) -> Any:
            self.questions += 1
            self.keys += len(first) if isinstance(first, list) else 1
            return getattr(self.inner, name)(first, *more)

        return call


def place(rank: int) -> RankPlace:
    return RankPlace(rank, 0, WORLD, "node", 1)


def test_only_rank_0_looks_for_every_rank() -> None:
    store: Any = Counted()
    for rank in range(WORLD):
        store.inner.set(f"here/{rank}", "")
    _meet(store, place(0), 1)
    assert WORLD <= store.keys < WORLD + 5
    store.keys = 0
    _meet(store, place(7), 1)
    assert store.keys < 5


def test_who_does_not_come_is_named_to_all() -> None:
    store: Any = Counted()
    for rank in set(range(WORLD)) - {5, 4000}:
        store.inner.set(f"here/{rank}", "")
    for rank in (0, 7):
        with pytest.raises(
            NodeFault, match="2 of 4096 ranks did not join node:1 within 0.05 s: rank 5, 4000;"
        ) as raised:
            _meet(store, place(rank), 0.05)
        assert raised.value.blamed == (5, 4000)


def test_reports_are_heard_many_at_a_time_and_the_silent_are_told_apart() -> None:
    store: Any = Counted()
    for rank in set(range(WORLD)) - {300}:
        store.inner.set(f"save/{rank}", json.dumps({"result": rank}))
    heard = list(_gather(store, [f"save/{rank}" for rank in range(WORLD)], 0.05))
    assert [told and told["result"] for told in heard] == [*range(300), None, *range(301, WORLD)]
    assert store.questions < 2 * WORLD / ASKED_AT_ONCE + 3 * ASKED_AT_ONCE


def test_a_job_of_many_nodes_is_not_longer_than_one_of_few() -> None:
    few, many = spec(16), spec(16384)
    assert len(slurm.render(many, SlurmCluster())) - len(slurm.render(few, SlurmCluster())) < 20
    place = KubernetesCluster(image="a/b:1")
    assert len(kubernetes.render(many, place)) - len(kubernetes.render(few, place)) < 60


@pytest.mark.slow
def test_what_many_ranks_saved_is_committed_found_whole_and_opened(tmp_path: Path) -> None:
    """Every step of the benchmark at a size for a test: it must not rot."""
    run = Simulated(96, 20, tmp_path)
    for _, step in run.steps():
        step()
    assert run.index_bytes < 100 * 96 + 100 * 20


# ------------------------------------------------------------------------------------------- even splits


def shards(sizes: dict[str, int], world: int) -> list[RankShard]:
    """Every element of every kind is a number of its own; the second tensor is frozen, so that it has one kind."""
    made = []
    for rank in range(world):
        shares = []
        for number, (name, size) in enumerate(sizes.items()):
            lo, hi = even_part(size, rank, world)
            kinds = KINDS[: 1 if number == 1 else 3]
            views = {kind: torch.arange(lo, hi) + 1000.0 * number + 1e5 * KINDS.index(kind) for kind in kinds}
            shares += [Share(name, (size,), lo, hi, views)] if lo < hi else []
        buffers = {"count": torch.tensor(7), "mean": torch.full((3,), float(rank))}
        made.append(RankShard(rank, f"r{rank:05d}.safetensors", shares, buffers))
    return made


def reports(folder: Path, made: list[RankShard]) -> list[dict[str, Any]]:
    storage = open_storage(folder)
    return [write_shard(storage, shard) for shard in made]


def opened(folder: Path, index: dict[str, Any]) -> Slices:
    (folder / "index.json").write_text(json.dumps(index))
    return Slices(str(folder))


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 5, 7])
def test_an_even_split_is_read_without_being_listed(world: int, tmp_path: Path) -> None:
    sizes = {"a": 23, "b": 3, "c": 8, "d": 1}  # of some a rank has nothing
    told = [told_of([report], world)[0] for report in reports(tmp_path, shards(sizes, world))]
    assert all("slices" not in report for report in told[1:])
    index = index_of(told)
    assert "parts" in index and "files" not in index
    slices = opened(tmp_path, index)
    for number, (name, size) in enumerate(sizes.items()):
        assert slices.kinds(name) == KINDS[: 1 if number == 1 else 3]
        for lo, hi in itertools.combinations(range(size + 1), 2):
            for kind in slices.kinds(name):
                expected = [at + 1000.0 * number + 1e5 * KINDS.index(kind) for at in range(lo, hi)]
                assert slices.interval(kind, name, lo, hi).tolist() == expected
    for rank in range(world):
        assert slices.buffer("count", rank) == 7 and slices.buffer("mean", rank).tolist() == [rank] * 3


def test_where_one_rank_is_not_even_its_peers_files_are_asked(tmp_path: Path) -> None:
    """They told nothing, and rank 0's list does not say it for them."""
    made = shards({"a": 24, "b": 3}, 3)
    whole = made[0].shares[0]
    odd = Share("a", (24,), 0, 6, {kind: view[:6] for kind, view in whole.views.items()})
    rest = Share("x", (2,), 0, 2, {"param": torch.tensor([-1.0, -2.0])})
    made[0] = RankShard(0, made[0].file, [odd, *made[0].shares[1:], rest], made[0].buffers)
    told = [told_of([report], 3)[0] for report in reports(tmp_path, made)]
    assert "slices" not in told[1]
    slices = opened(tmp_path, index_of(told, open_storage(tmp_path)))
    assert slices.interval("exp_avg", "a", 8, 24).tolist() == [at + 1e5 for at in range(8, 24)]
    assert slices.interval("param", "b", 0, 3).tolist() == [1000, 1001, 1002]
    assert slices.whole("param", "x").tolist() == [-1, -2]


def test_a_file_of_another_length_than_an_even_split_has_is_not_taken_for_one(tmp_path: Path) -> None:
    """A rank that kept less than its part, evenly as far as it goes."""
    made = shards({"a": 24, "b": 6}, 3)
    made[2] = RankShard(2, made[2].file, made[2].shares[:1], {})
    told = [told_of([report], 3)[0] for report in reports(tmp_path, made)]
    index = index_of(told, open_storage(tmp_path))
    assert "parts" not in index and len(index["files"]["r00002.safetensors"]) == 1


def test_an_index_grows_with_ranks_plus_parameters_not_with_their_product(tmp_path: Path) -> None:
    def size(world: int, parameters: int) -> int:
        run = Simulated(world, parameters, tmp_path)
        run.index()
        return run.index_bytes

    least = size(16, 16)
    assert size(WORLD, 16) - least < 40 * WORLD
    assert size(WORLD, 256) - size(WORLD, 16) < 100 * 256


def test_a_rank_with_several_files_tells_all_their_slices(tmp_path: Path) -> None:
    made = [part for shard in shards({"a": 23, "b": 3}, 2) for part in parts_of(shard, 40)]
    written = reports(tmp_path, made)
    told = [told_of([report for report in written if report["rank"] == rank], 2) for rank in (0, 1)]
    slices = opened(tmp_path, index_of([report for files in told for report in files], open_storage(tmp_path)))
    assert slices.interval("exp_avg", "a", 5, 20).tolist() == [at + 1e5 for at in range(5, 20)]


@pytest.mark.parametrize(("saved", "now"), [(16384, 1024), (1024, 16384), (16384, 16384), (1000, 999)])
def test_a_rank_touches_only_the_files_that_hold_its_part(saved: int, now: int) -> None:
    sizes = [1 << 24, 12_345_678, 5]
    split = Even(sizes, [3] * 3, [f"r{rank}" for rank in range(saved)], [4096] * saved)
    for rank in {0, now // 2, now - 1}:
        for number, size in enumerate(sizes):
            lo, hi = even_part(size, rank, now)
            pieces = list(split.pieces(number, lo, hi)) if lo < hi else []
            assert len(pieces) <= math.ceil(saved / now) + 2
            assert all(piece.lo < hi and piece.hi > lo for piece in pieces)
