"""Classification: labels of samples, the loss against a loop, the initial model, and accuracy over all samples."""

import contextlib
import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from data_pipeline.errors import BadSample, ConfigError
from data_pipeline.shards.codes import DECODE_S
from data_pipeline.stream.reader import Stream
from pretrain.evaluations import evaluated
from pretrain.evaluations.classification import figures, hits
from pretrain.evaluations.evaluated import Evaluated
from pretrain.inputs.lethal import looking_decoder
from pretrain.models.vit import Vit
from pretrain.schema.tasks import ClassifyConfig
from pretrain.schema.vit import VitConfig
from pretrain.tasks.classify import Classify, ClassifyInputs
from pretrain.tasks.collectives import ONE_DEVICE
from tests.families import FAMILIES, Material, Samples, batch_of

FAMILY = FAMILIES["vit"]


def inputs() -> tuple[ClassifyInputs, Samples]:
    stream: Any = Samples(FAMILY.reads, full=True)
    return ClassifyInputs(FAMILY.config(), stream, None), stream


@pytest.mark.parametrize(
    ("label", "told"),
    [
        (None, "'k3' has no label; classification needs one, use tars with .cls members"),
        (7, "'k3' has label 7, model.classes=7 allows 0 to 6"),
        (10**12, "'k3' has label 1000000000000"),
        (-1, "'k3' has label -1"),
    ],
)
def test_a_sample_without_a_usable_label_is_a_bad_sample(label: int | None, told: str) -> None:
    batch, stream = inputs()
    with pytest.raises(BadSample, match=told.replace(".", r"\.")):
        batch([stream.fetch(2), dataclasses.replace(stream.fetch(3), label=label)])


def test_an_image_is_needed_too_and_pixels_are_between_minus_one_and_one() -> None:
    batch, stream = inputs()
    with pytest.raises(BadSample, match="has no image"):
        batch([dataclasses.replace(stream.fetch(3), image=None)])
    made = batch([stream.fetch(number) for number in range(9)])
    assert made["label"].tolist() == [0, 1, 2, 3, 4, 5, 6, 0, 1]
    assert made["pixels"].min() == -1 and made["pixels"].max() == 1


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_that_of_a_loop_over_classes(smoothing: float) -> None:
    """Of a model that returns these logits: every class has smoothing / classes of the target, the label the rest."""
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = [0, 6, 3, 3, 1]
    total = 0.0
    for row, label in zip(logits.tolist(), labels, strict=True):
        norm = math.log(sum(map(math.exp, row)))
        for number, value in enumerate(row):
            share = smoothing / 7 + (1 - smoothing) * (number == label)
            total += share * (norm - value)
    given: Any = SimpleNamespace(model=lambda _: logits, config=ClassifyConfig(label_smoothing=smoothing))
    found = Classify.forward(given, {"pixels": torch.zeros(0), "label": torch.tensor(labels)})
    assert float(found["loss"]) == pytest.approx(total / 5, rel=1e-12)
    best = [row.index(max(row)) for row in logits.tolist()]
    assert float(found["accuracy"]) == pytest.approx(np.mean([a == b for a, b in zip(best, labels, strict=True)]))


def test_an_untrained_model_is_undecided() -> None:
    """The head starts at 0, so the loss is that of a guess; the blocks' matrices have Xavier's bound."""
    torch.manual_seed(0)
    config = FAMILY.config().model
    assert isinstance(config, VitConfig)
    task = Classify(Vit(config), ClassifyConfig(), ONE_DEVICE)
    assert task(batch_of(FAMILY.config(), 8))["loss"].item() == pytest.approx(math.log(7))
    block: Any = task.model.get_submodule("blocks.0")
    bound = math.sqrt(6 / (32 + 32))
    for part in block.attention.qkv.weight.chunk(3):
        assert 0.9 * bound < part.abs().max() <= bound
    assert 0 < block.mlp.rise.bias.abs().max() < 1e-5
    deviation = Vit(VitConfig(layers=1, classes=2)).patch.weight.std().item()
    assert deviation == pytest.approx((3 * 16 * 16) ** -0.5, rel=0.02)


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ({"classes": 1}, "model.classes=1 leaves nothing to predict"),
        ({"classes": 0}, "classes"),
        ({"patch_size": 7}, "image_size=32 is not divisible by patch_size=7; use 28 pixels"),
        ({"heads": 5}, "width=32 is not divisible by heads=5; use 4 heads"),
        ({"dropout": 1.0}, "dropout"),
    ],
)
def test_what_no_machine_could_run_is_refused(model: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told.replace(".", r"\.")):
        FAMILY.config(model)


# ---------------------------------------------------------------------------------------------- evaluation


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), min_size=8, max_size=8), min_size=1, max_size=6), st.data())
def test_hits_are_those_of_sorting_every_row(rows: list[list[int]], data: st.DataObject) -> None:
    """Python's sort keeps equal logits in the order of their classes."""
    labels = [data.draw(st.integers(0, 7)) for _ in rows]
    orders = [sorted(range(8), key=lambda number, row=row: -row[number]) for row in rows]  # type: ignore[misc]
    ranks = [order.index(label) for order, label in zip(orders, labels, strict=True)]
    expected = [sum(rank < top for rank in ranks) for top in (1, 5)]
    assert hits(torch.tensor(rows).float(), torch.tensor(labels)).tolist() == expected


@pytest.mark.parametrize("batch", [64, 7])
def test_every_sample_counts_once_to_the_last(
    batch: int, material: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that is right for all labels but 6 and ranks label 5 sixth: 200 samples in batches that do not divide."""
    monkeypatch.setattr(evaluated, "BATCH", batch)
    config = FAMILY.config()
    stream = Stream(material.labelled(7), 0)
    labels = [sample.label for sample in stream.take(np.arange(stream.samples))]
    seen = iter(labels)

    def model(pixels: Tensor) -> Tensor:
        logits = torch.arange(7.0).flip(0).repeat(len(pixels), 1)  # 0 is the likeliest, 6 the least likely
        for row in logits:
            label = next(seen)
            assert label is not None
            if label < 5:
                row[label] = 9.0
        return logits

    task: Any = SimpleNamespace(model=model, inputs=ClassifyInputs)
    with contextlib.closing(looking_decoder(DECODE_S)) as decoder:
        found = figures(Evaluated(task, config, stream, None, tmp_path, stream.samples, decoder), {})
    share = [np.mean([label is not None and label < top for label in labels]) for top in (5, 5)]
    assert (found["top_1"], found["top_5"]) == pytest.approx(share)
    assert found["samples"] == 200 and next(seen, None) is None


def test_classes_fewer_than_five_have_a_top_5() -> None:
    assert hits(torch.tensor([[0.0, 1.0]]), torch.tensor([0])).tolist() == [0, 1]
