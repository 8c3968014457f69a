"""How an evaluation splits its samples, and how ranks add up what they computed."""

import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from data_pipeline.errors import ConfigError
from pretrain.evaluations.evaluated import EvaluationRanks, StopAsked, balanced, summed
from pretrain.evaluations.retrieval import CANDIDATES, distinct_groups


class Ranks:
    """Threads of this process as ranks."""

    def __init__(self, world: int, asked: int = -1) -> None:
        self.world, self.asked = world, asked
        self.parts: list[Any] = [None] * world
        self.meeting = threading.Barrier(world)

    def sum_of(self, rank: int, value: Tensor) -> Tensor:
        self.parts[rank] = value
        self.meeting.wait(30)
        total = torch.stack(self.parts).sum(0)
        self.meeting.wait(30)
        return total

    def on_all(self, groups: list[np.ndarray]) -> list[Any]:
        found: list[Any] = [None] * self.world

        def compute(batch: dict[str, Tensor]) -> dict[str, Tensor]:
            counts = torch.bincount(batch["at"] % 3, minlength=3)
            return {"sum": (1 / (1 + batch["at"].float())).sum(), "count": torch.tensor(len(batch["at"])), "by": counts}

        def one(rank: int) -> None:
            ranks = EvaluationRanks(
                rank,
                self.world,
                sum=lambda value: self.sum_of(rank, value),
                run=lambda function, batch: function(batch),
                asked=lambda: int(rank == self.asked),
            )
            try:
                found[rank] = summed(ranks, groups, lambda some: {"at": torch.from_numpy(some)}, compute)
            except StopAsked as error:
                found[rank] = error

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found


@settings(max_examples=25, deadline=None)
@given(count=st.integers(1, 60), size=st.integers(1, 9), world=st.integers(2, 5))
def test_sums_are_the_same_at_every_world_size_bit_for_bit(count: int, size: int, world: int) -> None:
    groups = balanced(count, size)
    [alone] = Ranks(1).on_all(groups)
    assert alone["count"] == count and alone["by"].sum() == count
    for totals in Ranks(world).on_all(groups):
        assert all(torch.equal(totals[name], alone[name]) for name in alone) and totals.keys() == alone.keys()


def test_all_ranks_stop_when_one_was_asked_to() -> None:
    assert all(isinstance(end, StopAsked) for end in Ranks(3, asked=1).on_all(balanced(9, 2)))


@given(count=st.integers(1, 500), size=st.integers(1, 64))
def test_groups_hold_every_position_once_and_differ_by_one_at_most(count: int, size: int) -> None:
    groups = balanced(count, size)
    assert np.concatenate(groups).tolist() == list(range(count))
    sizes = [len(group) for group in groups]
    assert max(sizes) <= size and max(sizes) - min(sizes) <= 1


def of_captions(captions: list[list[str]]) -> list[list[int]]:
    """The groups of samples with these captions."""
    usable: Any = SimpleNamespace(
        stream=SimpleNamespace(dataset="data"),
        take=lambda positions: [SimpleNamespace(texts=tuple(captions[at])) for at in positions.tolist()],
    )
    return [group.tolist() for group in distinct_groups(usable, len(captions))]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.sampled_from("abcdef"), max_size=3), min_size=2, max_size=40))
def test_retrieval_groups_share_no_caption_and_leave_no_sample_out_without_need(captions: list[list[str]]) -> None:
    try:
        groups = of_captions(captions)
    except ConfigError:
        groups = []
    positions = [at for group in groups for at in group]
    assert len(set(positions)) == len(positions)
    for group in groups:
        texts = [text for at in group for text in set(captions[at])]
        assert len(set(texts)) == len(texts) and 2 <= len(group) <= CANDIDATES
    for at in set(range(len(captions))) - set(positions):  # it stands alone: it shares a caption with a group's sample
        assert all(any(set(captions[at]) & set(captions[other]) for other in group) for group in groups)


def test_captions_that_are_all_the_same_are_refused() -> None:
    with pytest.raises(ConfigError, match="no two samples with distinct captions"):
        of_captions([["a"], ["a"], ["a"]])


def test_a_full_group_is_followed_by_another() -> None:
    groups = of_captions([[str(number)] for number in range(2 * CANDIDATES + 3)])
    assert [len(group) for group in groups] == [CANDIDATES, CANDIDATES, 3]
