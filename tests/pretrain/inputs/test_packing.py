"""Several samples in a row give the loss and the gradients that each gives alone."""

from pathlib import Path
from typing import Any

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
from pretrain.inputs.packing import fill
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
