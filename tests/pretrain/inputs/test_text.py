"""Masks, captions and sentence pairs: their statistics, their exact properties, and that the sample alone decides."""

from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import DataError
from data_pipeline.schema import Sample
from data_pipeline.stream.order import sample_generator
from pretrain.config import RunConfig
from pretrain.inputs.masking import mask_slots, maskable_at, masked_positions, replace_bert, replace_electra
from pretrain.inputs.text import trim
from pretrain.tasks import TASKS

CONTEXT, VOCABULARY = 16, 60


class Letters:
    """A vocabulary whose pieces are letters."""

    size, pad, unk, cls, sep, mask = VOCABULARY, 0, 1, 2, 3, 4
    specials, ordinary = frozenset(range(5)), np.arange(5, VOCABULARY)

    def encode(self, text: str) -> list[int]:
        return [5 + ord(letter) % 50 for letter in text]


class Samples:
    """Ten samples with one, two or three captions."""

    samples = 10

    def fetch(self, sample_id: int) -> Sample:
        return sample(sample_id)


def sample(number: int, epoch: int = 0) -> Sample:
    captions = tuple(chr(97 + number) * (3 + number + extra) for extra in range(1 + number % 3))
    return Sample(number, epoch, -1, f"k{number}", texts=captions)


def inputs(kind: str, vocabulary: Any = None, **objective: Any) -> Any:
    model = {"mlm": "bert", "rtd": "electra"}[kind]
    tower = {"vocab_size": VOCABULARY, "context": CONTEXT, "layers": 1, "width": 8, "heads": 1, "embedding_width": 8}
    tree = {
        "run": "r",
        "seed": 5,
        "model": {"kind": model, **tower},
        "task": {"kind": kind, **objective},
        "data": {"dataset": "d", "text_tokenizer": "v"},
        "train": {"steps": 10, "global_batch": 2},
        "optim": {"lr": 1e-3},
    }
    return TASKS[kind].inputs(RunConfig.model_validate(tree), cast(Any, Samples()), vocabulary or Letters())


KINDS = [("mlm", {}), ("mlm", {"nsp": False}), ("rtd", {})]


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_a_row_does_not_depend_on_its_batch_nor_on_what_came_before(kind: str, options: dict[str, Any]) -> None:
    together = inputs(kind, **options)([sample(n) for n in range(6)])
    reader = inputs(kind, **options)
    for number in reversed(range(6)):
        for key, row in reader([sample(number)]).items():
            assert torch.equal(row[0], together[key][number]), key


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_another_epoch_draws_another_mask(kind: str, options: dict[str, Any]) -> None:
    first, second = (inputs(kind, **options)([sample(n, epoch) for n in range(10)]) for epoch in (0, 1))
    assert not torch.equal(first["tokens"], second["tokens"])


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_labels_are_the_words_under_the_mask_and_padding_is_left_alone(kind: str, options: dict[str, Any]) -> None:
    batch = inputs(kind, **options)([sample(n, epoch) for n in range(10) for epoch in range(5)])
    assert batch["tokens"].shape == (50, CONTEXT) and batch["labels"].shape == (50, mask_slots(0.15, CONTEXT))
    filled = batch["label_weights"] > 0
    at = batch["tokens"].gather(1, batch["positions"])
    assert ((batch["labels"] >= 5) & (batch["attention"].gather(1, batch["positions"])))[filled].all()
    assert ((at == 4) | (at == batch["labels"]) | (kind == "mlm"))[filled].all()
    assert (batch["tokens"][~batch["attention"]] == 0).all()
    original = batch["tokens"].clone()
    for row, slot in filled.nonzero().tolist():
        original[row, batch["positions"][row, slot]] = batch["labels"][row, slot]
    assert (original[:, 0] == 2).all() and not (original == 4).any()


@settings(deadline=None)
@given(length=st.integers(2, 128), rate=st.floats(0.05, 0.9), seed=st.integers(0, 2**31))
def test_the_number_of_masked_words_follows_the_rule_and_specials_are_never_masked(
    length: int, rate: float, seed: int
) -> None:
    tokens = np.array([2, *range(5, 5 + length - 2), 3], np.int64)
    positions = masked_positions(maskable_at(tokens, cast(Any, Letters())), rate, 128, np.random.default_rng(seed))
    assert len(positions) == min(length - 2, max(1, round(rate * length)))
    assert (np.diff(positions) > 0).all() and not np.isin(positions, (0, length - 1)).any()


@pytest.mark.parametrize(("replace", "shares"), [(replace_bert, (0.8, 0.1, 0.1)), (replace_electra, (0.85, 0.15, 0.0))])
def test_masked_words_are_replaced_in_the_published_shares(replace: Any, shares: tuple[float, ...]) -> None:
    tokens, everywhere = np.full(40_000, 7), np.arange(40_000)
    vocabulary = Letters()
    vocabulary.ordinary = np.arange(5, 30_000)
    masked = replace(tokens, everywhere, vocabulary, np.random.default_rng(0))
    found = ((masked == 4).mean(), (masked == 7).mean(), ((masked != 4) & (masked != 7)).mean())
    assert np.allclose(found, shares, atol=0.006)
    assert not np.isin(masked, (0, 1, 2, 3)).any() and (tokens == 7).all()


def test_half_of_the_second_segments_come_from_another_sample() -> None:
    reader = inputs("mlm")
    rows = [reader.segments(sample(n, epoch)) for n in range(10) for epoch in range(200)]
    for number, (first, second, is_random) in enumerate(rows):
        own = Letters().encode(chr(97 + number // 200))[0]
        assert set(first) <= {own} and len(first) + len(second) <= CONTEXT - 3
        assert not second or (set(second) == {own}) is not is_random
    assert np.mean([is_random for _, _, is_random in rows]) == pytest.approx(0.5, abs=0.04)


def test_a_caption_of_several_sentences_is_cut_where_one_ends() -> None:
    reader, cuts = inputs("mlm"), set()
    for epoch in range(60):
        one = Sample(2, epoch, 0, "k", texts=("a. b! \u732b\u3002c",))
        first, second = reader.neighbours(one, sample_generator(5, epoch, 2, "segments"))
        cuts.add((len(first), len(second)))
    assert cuts == {(2, 7), (5, 4), (8, 1)}  # letters of "a." | "b! 猫。 c", and so on


@pytest.mark.parametrize("kind", ["mlm", "rtd"])
def test_a_packed_sample_is_the_sample_of_a_row_of_its_own(kind: str) -> None:
    options: dict[str, Any] = {"nsp": False} if kind == "mlm" else {}
    alone = inputs(kind, **options)([sample(n) for n in range(6)])
    both = inputs(kind, packing=True, **options)([sample(n) for n in range(6)])
    assert len(both["tokens"]) < 6 and set(both) - set(alone) == {"segments", "places"}

    def rows(batch: dict[str, Any], row: int, chosen: torch.Tensor) -> tuple[list[int], ...]:
        slots = (batch["label_weights"][row] > 0) & chosen[batch["positions"][row]]
        return batch["tokens"][row, chosen].tolist(), batch["labels"][row, slots].tolist()

    expected = [rows(alone, row, alone["attention"][row]) for row in range(6)]
    found = [
        rows(both, row, both["segments"][row] == segment)
        for row in range(len(both["tokens"]))
        for segment in range(int(both["segments"][row].max()) + 1)
    ]
    assert sorted(found) == sorted(expected)
    assert torch.equal(both["segments"] >= 0, both["attention"])


@settings(deadline=None)
@given(first=st.integers(0, 40), second=st.integers(0, 40), room=st.integers(2, 30), seed=st.integers(0, 99))
def test_trimming_keeps_a_run_of_each_segment_and_shortens_the_longer_one(
    first: int, second: int, room: int, seed: int
) -> None:
    one, two = trim(list(range(first)), list(range(second)), room, np.random.default_rng(seed))
    assert len(one) + len(two) == min(room, first + second)
    assert one == list(range(one[0], one[0] + len(one))) if one else first <= 1 or second > 0
    assert max(len(one), len(two)) <= max((room + 1) // 2, room - min(first, second))


def test_rtd_uniforms_are_the_samples_own() -> None:
    batch = inputs("rtd")([sample(3), sample(4)])
    expected = sample_generator(5, 0, 4, "replace").random(mask_slots(0.15, CONTEXT), dtype=np.float32)
    assert np.array_equal(batch["uniforms"][1].numpy(), expected)


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_a_sample_without_caption_is_named(kind: str, options: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="'k1' has no caption"):
        inputs(kind, **options)([Sample(1, 0, 0, "k1")])
