"""Captions and codes of the GPT: padded, truncated, dropped by the sample, and refused when they do not fit."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from data_pipeline.errors import DataError
from data_pipeline.schema import Sample
from pretrain.config import RunConfig
from pretrain.inputs.text import text_ids
from pretrain.tasks.autoregressive import AutoregressiveInputs

SAMPLE = Sample(3, 0, 17, "key-3", texts=("one two", "three"), codes=np.arange(6, dtype=np.uint16))


class Words:
    """A vocabulary of word lengths, five specials in front."""

    pad, size = 0, 20

    def encode(self, text: str) -> list[int]:
        return [4 + len(word) for word in text.split()]


def inputs(caption_drop: float = 0.0, seed: int = 0) -> AutoregressiveInputs:
    tree: dict[str, Any] = {
        "run": "r", "seed": seed,
        "model": {"kind": "gpt", "text_vocab": 20, "image_vocab": 8, "text_tokens": 3, "image_tokens": 6},
        "task": {"kind": "autoregressive", "caption_drop": caption_drop},
        "data": {"dataset": "d", "text_tokenizer": "v", "image_tokenizer": "t"},
        "train": {"steps": 2, "global_batch": 2}, "optim": {"lr": 1e-3},
    }  # fmt: skip
    return AutoregressiveInputs(RunConfig.model_validate(tree), None, Words())  # type: ignore[arg-type]


def many(count: int) -> list[Sample]:
    return [dataclasses.replace(SAMPLE, id=number) for number in range(count)]


@pytest.mark.parametrize(
    ("caption", "ids"), [("", [0, 0, 0]), ("a bb", [5, 6, 0]), ("a bb ccc", [5, 6, 7]), ("a bb ccc d", [5, 6, 7])]
)
def test_text_is_padded_and_truncated_on_the_right(caption, ids):
    assert text_ids(caption, Words(), 3).tolist() == ids  # type: ignore[arg-type]


def test_a_batch_holds_text_and_codes_in_the_order_of_the_samples():
    batch = inputs()(many(4))
    assert batch["text"].shape == (4, 3) and batch["codes"].tolist() == [[0, 1, 2, 3, 4, 5]] * 4


def test_the_caption_is_the_sample_s_own_draw_whatever_its_batch_and_position():
    together = inputs()(many(20))["text"]
    alone = [inputs()([dataclasses.replace(one, position=0)])["text"][0] for one in many(20)]
    assert all((row == other).all() for row, other in zip(together, alone, strict=True))
    assert {tuple(row.tolist()) for row in together} == {(7, 7, 0), (9, 0, 0)}


def test_captions_are_dropped_whole_and_at_the_asked_rate():
    texts = inputs(caption_drop=0.3)(many(1000))["text"]
    plain = inputs()(many(1000))["text"]
    dropped = (texts == 0).all(1)
    assert 250 < int(dropped.sum()) < 350
    assert (texts[~dropped] == plain[~dropped]).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"texts": ()}, "'key-3' has no caption"),
        ({"codes": None}, "'key-3' has no image codes; run `tessera data encode`"),
        ({"codes": np.arange(5)}, "'key-3' has 5 codes, model.image_tokens=6"),
        ({"codes": np.arange(3, 9)}, "'key-3' has code 8, beyond model.image_vocab=8"),
    ],
)
def test_a_sample_that_does_not_fit_is_named(change, message):
    with pytest.raises(DataError, match=message):
        inputs()([dataclasses.replace(SAMPLE, **change)])


def test_of_several_crops_the_sample_draws_one_anew_each_epoch():
    crops = np.arange(10)[:, None].repeat(6, 1).astype(np.uint16) % 8
    samples = [dataclasses.replace(one, codes=crops, epoch=epoch) for one in many(50) for epoch in (0, 1)]
    together = inputs()(samples)["codes"]
    alone = [inputs()([dataclasses.replace(one, position=5)])["codes"][0] for one in samples]
    assert together.shape == (100, 6) and all((row == other).all() for row, other in zip(together, alone, strict=True))
    assert set(together[:, 0].tolist()) == set(range(8)) and (together == together[:, :1]).all()
    assert (together[::2] != together[1::2]).any(1).sum() > 25
