"""Several samples in a row give the loss and the gradients that each gives alone."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import ConfigError
from data_pipeline.settings import check_settings
from data_pipeline.stream.reader import Stream
from data_pipeline.text.kinds import open_tokenizer
from pretrain.config import RunConfig
from pretrain.inputs.packing import Example, fill, packed, pad, padded, stack
from pretrain.models import MODELS
from pretrain.tasks import TASKS
from pretrain.tasks.collectives import ONE_DEVICE
from tests.pretrain.commands import Material, electra

PAD = 99


def described(kind: str, material: Material, run: Path, **objective: Any) -> RunConfig:
    tree = electra(material, run)
    tree["model"] |= {"kind": kind, "dropout": 0.0, "context": 64}
    if kind == "bert":
        del tree["model"]["generator_fraction"]
        tree["task"] = {"kind": "mlm", "nsp": False}
    tree["task"] |= objective
    return check_settings(RunConfig, tree, "test")


@pytest.mark.parametrize("masking", ["piece", "word", "ngram"])
@pytest.mark.parametrize("kind", ["bert", "electra"])
def test_loss_and_gradients_of_packed_rows_are_those_of_padded_ones(
    kind: str, masking: str, material: Material, tmp_path: Path
) -> None:
    stream, results = Stream(material.dataset, 0), []
    for packing in (False, True):
        config = described(kind, material, tmp_path, masking=masking, packing=packing)
        batch = TASKS[config.task.kind].inputs(config, stream, open_tokenizer(material.vocabulary))(stream.read(0, 24))
        torch.manual_seed(0)
        objective = TASKS[config.task.kind](MODELS[kind](config.model), config.task, ONE_DEVICE)
        loss = objective(batch)["loss"]
        loss.backward()
        results.append((loss.detach(), [p.grad for p in objective.parameters()], batch["attention"]))
    (loss, gradients, padded), (other, others, packed) = results
    torch.testing.assert_close(other, loss, rtol=1e-5, atol=1e-5)
    for one, two in zip(others, gradients, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=2e-5)
    assert padded.sum() == packed.sum() and packed.float().mean() > 0.8 > padded.float().mean()


def test_pairs_of_sentences_cannot_be_packed(material: Material, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="set task.nsp=false"):
        described("bert", material, tmp_path, nsp=True, packing=True)


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 20), max_size=60))
def test_every_sample_stands_in_one_row_and_no_two_rows_would_fit_in_one(lengths: list[int]) -> None:
    rows = fill(lengths, 20)
    assert sorted(sum(rows, [])) == list(range(len(lengths)))
    sizes = sorted(sum(lengths[i] for i in row) for row in rows)
    assert all(size <= 20 for size in sizes)
    assert len(sizes) < 2 or sizes[0] + sizes[1] > 20


def example(tokens: list[int], positions: list[int], noise: int, **more: Any) -> Example:
    masked = np.array(tokens)
    masked[positions] = 4
    types = np.arange(len(tokens)) // 2
    return Example(np.array(tokens), masked, types, np.array(positions, np.int64), noise, **more)


def as_lists(batch: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {name: tensor.tolist() for name, tensor in batch.items()}


def test_padded_rows_are_these() -> None:
    given = [np.array([0.25, 0.5], np.float32), np.array([0.75, 1.0], np.float32)]
    rows = [
        example([2, 7, 8, 3], [1], 11, is_random=True, uniforms=given[0]),
        example([2, 9, 9, 9, 3], [1, 3], 22, is_random=False, uniforms=given[1]),
    ]
    batch = padded(rows, 5, 0.4, PAD)
    assert as_lists(batch) == {
        "tokens": [[2, 4, 8, 3, PAD], [2, 4, 9, 4, 3]],
        "types": [[0, 0, 1, 1, 0], [0, 0, 1, 1, 2]],
        "noise": [[11, 11, 11, 11, 0], [22] * 5],
        "attention": [[True] * 4 + [False], [True] * 5],
        "positions": [[1, 0], [1, 3]],
        "labels": [[7, PAD], [9, 9]],
        "label_weights": [[1.0, 0.0], [1.0, 1.0]],
        "is_random": [1, 0],
        "uniforms": [[0.25, 0.5], [0.75, 1.0]],
    }
    assert batch["is_random"].dtype == torch.int64 and batch["uniforms"].dtype == torch.float32


def test_packed_rows_are_these() -> None:
    """A row that two samples fill to its end, and one with padding, whose segment is nobody's."""
    drawn = [np.array(values, np.float32) for values in ([0.25, 9.0], [0.5, 9.0], [0.75, 1.0])]
    samples = [([2, 7, 8, 3], [1], 11), ([2, 6, 3], [1], 22), ([2, 5, 9, 3], [1, 2], 33)]
    batch = packed([example(*sample, uniforms=u) for sample, u in zip(samples, drawn, strict=True)], 8, PAD)
    assert as_lists(batch) == {
        "tokens": [[2, 4, 8, 3, 2, 4, 4, 3], [2, 4, 3, *[PAD] * 5]],
        "types": [[0, 0, 1, 1, 0, 0, 1, 1], [0, 0, 1, 0, 0, 0, 0, 0]],
        "noise": [[11] * 4 + [33] * 4, [22] * 3 + [0] * 5],
        "attention": [[True] * 8, [True] * 3 + [False] * 5],
        "positions": [[1, 5, 6], [1, 0, 0]],
        "labels": [[7, 5, 9], [6, PAD, PAD]],
        "label_weights": [[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]],
        "uniforms": [[0.25, 0.75, 1.0], [0.5, 9.0, 0.0]],
        "segments": [[0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 0, -1, -1, -1, -1, -1]],
        "places": [[0, 1, 2, 3, 0, 1, 2, 3], [0, 1, 2, 0, 0, 0, 0, 0]],
    }


def test_a_batch_without_a_masked_piece_has_one_empty_slot() -> None:
    batch = as_lists(packed([example([2, 3], [], 1)], 4, PAD))
    assert (batch["positions"], batch["labels"], batch["label_weights"]) == ([[0]], [[PAD]], [[0.0]])
    assert not {"uniforms", "is_random"} & batch.keys()


def test_the_longest_come_first_and_a_row_is_filled_to_its_end() -> None:
    assert fill([3, 5, 5, 2, 8], 8) == [[4], [1, 0], [2, 3]]
    assert fill([4, 4, 4], 8) == [[0, 1], [2]]
    assert fill([5] * 600, 8) == [[index] for index in range(600)]


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 9), max_size=30), room=st.integers(9, 20))
def test_a_sample_goes_into_the_first_row_that_has_room_for_it(lengths: list[int], room: int) -> None:
    rows: list[list[int]] = []
    for length in range(room, 0, -1):
        for index in (index for index, its in enumerate(lengths) if its == length):
            for row in rows:
                if sum(lengths[i] for i in row) + length <= room:
                    row.append(index)
                    break
            else:
                rows.append([index])
    assert fill(lengths, room) == rows


def test_padding_keeps_the_kind_of_the_values() -> None:
    for values, expected in (
        ([3, 4], np.array([3, 4, 0], np.int64)),
        ([], np.zeros(3, np.int64)),
        (np.array([0.5], np.float32), np.array([0.5, 0, 0], np.float32)),
        (np.array([True, True, True]), np.ones(3, bool)),
        (np.array([7], np.int32), np.array([7, 0, 0], np.int32)),
    ):
        found = pad(values, 3)
        assert found.tolist() == expected.tolist() and found.dtype == expected.dtype
        filled = pad(values, 3, fill=1)
        assert filled.tolist() == [*values, *[1] * (3 - len(values))] and filled.dtype == expected.dtype
    with pytest.raises(ValueError, match="broadcast"):
        pad([1, 2, 3, 4], 3)


def test_rows_are_stacked_by_their_keys() -> None:
    batch = stack([{"a": np.array([1, 2]), "b": np.int64(3)}, {"a": np.array([4, 5]), "b": np.int64(6)}])
    assert as_lists(batch) == {"a": [[1, 2], [4, 5]], "b": [3, 6]}


@pytest.mark.parametrize("packing", [False, True])
def test_each_part_of_a_batch_has_its_kind(packing: bool) -> None:
    given = example([2, 7, 8, 3], [1], 11, uniforms=np.array([0.25, 0.5], np.float32), is_random=False)
    batch = packed([given], 6, PAD) if packing else padded([given], 6, 0.3, PAD)
    kinds = {name: tensor.dtype for name, tensor in batch.items()}
    assert kinds == {
        **dict.fromkeys(("tokens", "types", "noise", "positions", "labels", "is_random"), torch.int64),
        **dict.fromkeys(("label_weights", "uniforms"), torch.float32),
        **(dict.fromkeys(("segments", "places"), torch.int64) if packing else {}),
        "attention": torch.bool,
    }
    assert batch["is_random"].tolist() == [0]


def test_padded_rows_have_a_slot_for_each_piece_that_a_full_context_masks() -> None:
    given = example([2, 7, 8, 3], [2], 11, uniforms=np.array([0.25, 0.5, 0.75, 1.0], np.float32))
    batch = as_lists(padded([given, given], 6, 0.5, PAD))
    assert batch["uniforms"] == [[0.25, 0.5, 0.75]] * 2 and batch["label_weights"] == [[1.0, 0.0, 0.0]] * 2
    assert (batch["positions"], batch["labels"]) == ([[2, 0, 0]] * 2, [[8, PAD, PAD]] * 2)


def test_rows_of_three_samples_are_these() -> None:
    """A row of one sample takes as many uniforms as the batch has slots, one of several as many as it masks."""
    drawn = np.array([0.25, 0.5, 0.75, 1.0], np.float32)
    lengths = [(5, [1, 2, 3]), (2, []), (1, []), (1, [0]), (7, [2, 5])]
    given = [example(list(range(5, 5 + n)), at, 10 + n, uniforms=drawn) for n, at in lengths]
    batch = as_lists(packed(given, 8, PAD))
    assert batch["tokens"] == [[5, 6, 4, 8, 9, 4, 11, 5], [5, 4, 4, 4, 9, 5, 6, 4]]
    assert batch["segments"] == [[0] * 7 + [1], [0] * 5 + [1, 1, 2]]
    assert batch["places"] == [[0, 1, 2, 3, 4, 5, 6, 0], [0, 1, 2, 3, 4, 0, 1, 0]]
    assert batch["positions"] == [[2, 5, 0, 0], [1, 2, 3, 7]] and batch["labels"] == [[7, 10, PAD, PAD], [6, 7, 8, 5]]
    assert batch["uniforms"] == [[0.25, 0.5, 0.0, 0.0], [0.25, 0.5, 0.75, 0.25]]
    assert batch["noise"] == [[17] * 7 + [11], [15] * 5 + [12, 12, 11]]
    assert batch["label_weights"] == [[1.0, 1.0, 0.0, 0.0], [1.0] * 4]


def test_an_example_does_not_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        example([2, 3], [], 1).noise = 2  # type: ignore[misc]
