"""A bad sample leaves its place to the same other one everywhere, is written down, and too many stop the run."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.errors import BadSample, DataError
from data_pipeline.schema import Sample
from data_pipeline.stream.reader import Stream
from pretrain.inputs.bad import FREE, Ledger, Replaced
from pretrain.inputs.feed import Feed
from tests.pretrain.commands import Material

BATCH, STEPS = 24, 20  # 480 positions of 200 samples: each sample twice


class Picky(Stream):
    """A dataset in which some samples cannot be read."""

    unreadable: frozenset[int] = frozenset()

    def take(self, positions: np.ndarray) -> list[Sample]:
        return [self.refuse(sample) for sample in super().take(positions)]

    def fetch(self, sample_id: int) -> Sample:
        return self.refuse(super().fetch(sample_id))

    def refuse(self, sample: Sample) -> Sample:
        if sample.id in self.unreadable:
            raise BadSample(f"sample {sample.id} has no image")
        return sample


def picky(dataset: Path, unreadable: set[int]) -> Picky:
    stream = Picky(dataset, seed=3)
    stream.unreadable = frozenset(unreadable)
    return stream


def refusing(bad: set[int]) -> Any:
    def inputs(samples: list[Sample]) -> dict[str, Any]:
        for sample in samples:
            if sample.id in bad:
                raise BadSample(f"sample {sample.id} does not decode")
        return {"samples": [(sample.position, sample.id, sample.epoch) for sample in samples]}

    return inputs


def run(stream: Stream, inputs: Any, world: int, micro_batch: int, ledger: Ledger) -> list[list[Any]]:
    """Every step's (position, id, epoch) of all ranks in a row, all noting in one ledger."""
    feeds = [Feed(stream, inputs, BATCH, (rank, world), micro_batch, 2, ledger=ledger) for rank in range(world)]
    ranks = [list(feed.steps(0, STEPS)) for feed in feeds]
    return [[one for rank in ranks for batch in rank[step][1] for one in batch["samples"]] for step in range(STEPS)]


@pytest.mark.parametrize("unreadable", [set(), {7, 9, 11}])
@pytest.mark.parametrize(("world", "micro_batch"), [(1, 24), (2, 3), (4, 2), (8, 3)])
def test_the_same_samples_stand_in_whatever_the_world_and_nothing_else_moves(
    unreadable: set[int], world: int, micro_batch: int, material: Material
) -> None:
    bad, everywhere = {3, 150}, Ledger(None, 1.0)
    stream = picky(material.dataset, unreadable)
    found = run(stream, refusing(bad), world, micro_batch, everywhere)
    alone = Ledger(None, 1.0)
    assert found == run(stream, refusing(bad), 1, BATCH, alone)
    plain = run(Stream(material.dataset, 3), refusing(set()), 1, BATCH, Ledger(None, 1.0))
    stood_in = {entry.position: entry for entry in alone.entries}
    assert set(everywhere.entries) == set(alone.entries)
    assert {entry.sample for entry in alone.entries} == bad | unreadable
    for one, other in zip(sum(found, []), sum(plain, []), strict=True):
        if one != other:
            assert stood_in[other[0]].sample == other[1] and one == (other[0], stood_in[other[0]].replacement, other[2])


def test_a_restart_takes_the_same_replacements(material: Material) -> None:
    stream = picky(material.dataset, {7, 9, 11})
    whole = [batches for _, batches in Feed(stream, refusing({3}), BATCH, (0, 2), 4, 2).steps(0, STEPS)]
    for start in (1, 7, 19):
        later = Feed(stream, refusing({3}), BATCH, (0, 2), 4, 5).steps(start, STEPS)
        assert [batches for _, batches in later] == whole[start:]


def test_every_replacement_is_a_line_of_the_ledger_with_its_reason(material: Material, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "bad_samples/rank-00000.jsonl", 1.0)
    run(picky(material.dataset, {7}), refusing({3}), 1, BATCH, ledger)
    rows = [json.loads(line) for line in (tmp_path / "bad_samples/rank-00000.jsonl").read_text().splitlines()]
    assert rows == [dataclasses.asdict(entry) for entry in ledger.entries] and ledger.samples == BATCH * STEPS
    reasons = {(row["sample"], row["reason"]) for row in rows}
    assert reasons == {(7, "sample 7 has no image"), (3, "sample 3 does not decode")}
    assert all(row["replacement"] not in (3, 7) for row in rows)


def test_above_the_rate_the_run_stops_with_the_list(tmp_path: Path) -> None:
    entries = [Replaced(position, 0, position, 1, "does not decode") for position in range(40)]
    ledger = Ledger(tmp_path / "bad.jsonl", 0.01)
    ledger.note(entries[:FREE], FREE)  # a few are free, however short the run
    ledger.note([entries[20]], 1000)
    with pytest.raises(DataError) as caught:
        ledger.note(entries[21:24], 10)
    text = str(caught.value)
    assert "12 of 1018 samples cannot be used, more than data.max_bad_rate=0.01" in text
    assert "position 23, sample 23: does not decode" in text and str(tmp_path / "bad.jsonl") in text
    assert len((tmp_path / "bad.jsonl").read_text().splitlines()) == 12


def test_a_dataset_without_a_usable_sample_is_refused_naming_the_fault(material: Material) -> None:
    feed = Feed(Stream(material.dataset, 3), refusing(set(range(200))), BATCH, (0, 1), 8, 2)
    with pytest.raises(DataError, match="nor can 16 replacements"):
        next(feed.steps(0, 1))


def test_a_fault_of_the_storage_is_no_bad_sample(material: Material) -> None:
    stream = Stream(material.dataset, 3)

    def gone(samples: list[Sample]) -> dict[str, Any]:
        raise DataError("connection refused")

    ledger = Ledger(None, 1.0)
    with pytest.raises(DataError, match="connection refused"):
        next(Feed(stream, gone, BATCH, (0, 1), 8, 2, ledger=ledger).steps(0, 1))
    assert not ledger.entries
