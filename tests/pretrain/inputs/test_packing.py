"""Several samples in a row give the loss and the gradients that each gives alone."""

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
from data_pipeline.vocabulary import Vocabulary
from pretrain.config import RunConfig
from pretrain.inputs import INPUTS
from pretrain.inputs.packing import Example, fill, packed, padded
from pretrain.models import MODELS
from pretrain.objectives import OBJECTIVES
from pretrain.objectives.collectives import ONE_DEVICE
from tests.pretrain.commands import Material, electra


def described(kind: str, material: Material, run: Path, **objective: Any) -> RunConfig:
    tree = electra(material, run)
    tree["model"] |= {"kind": kind, "dropout": 0.0, "context": 64}
    if kind == "bert":
        del tree["model"]["generator_fraction"]
        tree["objective"] = {"kind": "mlm", "nsp": False}
    tree["objective"] |= objective
    return check_settings(RunConfig, tree, "test")


@pytest.mark.parametrize("masking", ["piece", "word", "ngram"])
@pytest.mark.parametrize("kind", ["bert", "electra"])
def test_loss_and_gradients_of_packed_rows_are_those_of_padded_ones(
    kind: str, masking: str, material: Material, tmp_path: Path
) -> None:
    stream, results = Stream(material.dataset, 0), []
    for packing in (False, True):
        config = described(kind, material, tmp_path, masking=masking, packing=packing)
        batch = INPUTS[config.objective.kind](config, stream, Vocabulary(material.vocabulary))(stream.read(0, 24))
        torch.manual_seed(0)
        objective = OBJECTIVES[config.objective.kind](MODELS[kind](config.model), config.objective, ONE_DEVICE)
        loss = objective(batch)["loss"]
        loss.backward()
        results.append((loss.detach(), [p.grad for p in objective.parameters()], batch["attention"]))
    (loss, gradients, padded), (other, others, packed) = results
    torch.testing.assert_close(other, loss, rtol=1e-5, atol=1e-5)
    for one, two in zip(others, gradients, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=2e-5)
    assert padded.sum() == packed.sum() and packed.float().mean() > 0.8 > padded.float().mean()


def test_pairs_of_sentences_cannot_be_packed(material: Material, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="set objective.nsp=false"):
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
    batch = padded(rows, 5, 0.4)
    assert as_lists(batch) == {
        "tokens": [[2, 4, 8, 3, 0], [2, 4, 9, 4, 3]],
        "types": [[0, 0, 1, 1, 0], [0, 0, 1, 1, 2]],
        "noise": [[11, 11, 11, 11, 0], [22] * 5],
        "attention": [[True] * 4 + [False], [True] * 5],
        "positions": [[1, 0], [1, 3]],
        "labels": [[7, 0], [9, 9]],
        "label_weights": [[1.0, 0.0], [1.0, 1.0]],
        "is_random": [1, 0],
        "uniforms": [[0.25, 0.5], [0.75, 1.0]],
    }
    assert batch["is_random"].dtype == torch.int64 and batch["uniforms"].dtype == torch.float32


def test_packed_rows_are_these() -> None:
    """A row that two samples fill to its end, and one with padding, whose segment is nobody's."""
    drawn = [np.array(values, np.float32) for values in ([0.25, 9.0], [0.5, 9.0], [0.75, 1.0])]
    samples = [([2, 7, 8, 3], [1], 11), ([2, 6, 3], [1], 22), ([2, 5, 9, 3], [1, 2], 33)]
    batch = packed([example(*sample, uniforms=u) for sample, u in zip(samples, drawn, strict=True)], 8)
    assert as_lists(batch) == {
        "tokens": [[2, 4, 8, 3, 2, 4, 4, 3], [2, 4, 3, 0, 0, 0, 0, 0]],
        "types": [[0, 0, 1, 1, 0, 0, 1, 1], [0, 0, 1, 0, 0, 0, 0, 0]],
        "noise": [[11] * 4 + [33] * 4, [22] * 3 + [0] * 5],
        "attention": [[True] * 8, [True] * 3 + [False] * 5],
        "positions": [[1, 5, 6], [1, 0, 0]],
        "labels": [[7, 5, 9], [6, 0, 0]],
        "label_weights": [[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]],
        "uniforms": [[0.25, 0.75, 1.0], [0.5, 9.0, 0.0]],
        "segments": [[0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 0, -1, -1, -1, -1, -1]],
        "places": [[0, 1, 2, 3, 0, 1, 2, 3], [0, 1, 2, 0, 0, 0, 0, 0]],
    }


def test_a_batch_without_a_masked_piece_has_one_empty_slot() -> None:
    batch = as_lists(packed([example([2, 3], [], 1)], 4))
    assert (batch["positions"], batch["labels"], batch["label_weights"]) == ([[0]], [[0]], [[0.0]])
    assert not {"uniforms", "is_random"} & batch.keys()


def test_the_longest_come_first_and_a_row_is_filled_to_its_end() -> None:
    assert fill([3, 5, 5, 2, 8], 8) == [[4], [1, 0], [2, 3]]
    assert fill([4, 4, 4], 8) == [[0, 1], [2]]
