"""Whole words are masked whole, Chinese ones as jieba cuts them, n-grams as often as they should be."""

import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import ConfigError
from pretrain.inputs import masking
from pretrain.inputs.masking import draw_positions, mask_slots, masked_words, word_starts


class Pieces:
    """A vocabulary of the given pieces behind the specials, SentencePiece's way of writing them."""

    pad, unk, cls, sep, mask = range(5)

    def __init__(self, *pieces: str) -> None:
        self.pieces = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *pieces)
        self.size = len(self.pieces)

    def piece(self, number: int) -> str:
        return self.pieces[number]

    def starts_word(self, number: int) -> bool:
        return number < 5 or self.pieces[number][0] == "\u2581"

    def ids(self, *pieces: str) -> list[int]:
        return [2, *(self.pieces.index(piece) for piece in pieces), 3]


def cut(*pieces: str) -> list[str]:
    """The words that pieces are grouped to, [CLS] and [SEP] aside."""
    vocabulary: Any = Pieces(*dict.fromkeys(piece for piece in pieces if piece != "[UNK]"))
    starts = word_starts(vocabulary.ids(*pieces), vocabulary)[1:-1]
    words: list[str] = []
    for piece, begins in zip(pieces, starts, strict=True):
        words = [*words, piece] if begins else [*words[:-1], words[-1] + piece]
    return [word.replace("\u2581", "_") for word in words]


@pytest.mark.parametrize(
    ("pieces", "words"),
    [
        (("\u2581a", "\u2581red", "dish", "\u2581cat"), ["_a", "_reddish", "_cat"]),
        (("\u2581我", "来", "到", "北", "京", "清", "华", "大", "学"), ["_我", "来到", "北京", "清华大学"]),
        (("\u2581我", "来到", "北京", "清华", "大学"), ["_我", "来到", "北京", "清华大学"]),
        (("\u2581", "北", "京", "\u2581cat", "s", "大", "学"), ["_", "北京", "_cats", "大学"]),
        (("\u2581北", "京", "[UNK]", "大", "学"), ["_北京", "[UNK]", "大学"]),
    ],
)
def test_words_are_what_spaces_or_jieba_part(pieces: tuple[str, ...], words: list[str]) -> None:
    assert cut(*pieces) == words


def test_without_jieba_chinese_words_are_refused_and_not_masked_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jieba", None)
    masking._segmenter.cache_clear()
    with pytest.raises(ConfigError, match="pip install"):
        cut("\u2581北", "京")
    assert cut("\u2581red", "dish") == ["_reddish"]
    masking._segmenter.cache_clear()


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 4), min_size=1, max_size=40), rate=st.floats(0.05, 0.6), longest=st.integers(1, 3),
    seed=st.integers(0, 10**6),
)  # fmt: skip
def test_a_word_is_masked_whole_or_not_at_all_and_the_number_is_kept(
    lengths: list[int], rate: float, longest: int, seed: int
) -> None:
    starts = np.concatenate([[True], *([True] + [False] * (n - 1) for n in lengths), [True]])
    tokens = np.where(np.arange(len(starts)) % (len(starts) - 1), 7, 2)
    positions = masked_words(tokens, starts, rate, len(tokens), longest, np.random.default_rng(seed))
    words = np.cumsum(starts)[1:-1]
    chosen = np.isin(np.arange(1, len(tokens) - 1), positions)
    assert all(chosen[words == word].all() or not chosen[words == word].any() for word in set(words.tolist()))
    wanted = max(1, round(rate * len(tokens)))
    assert len(positions) <= max(wanted, min(lengths)) and (np.diff(positions) > 0).all()
    if longest == 1 and set(lengths) == {1}:
        assert len(positions) == min(wanted, len(lengths))
    assert len(positions) or min(lengths) > mask_slots(rate, len(tokens))


def test_ngrams_of_one_two_and_three_words_come_in_their_proportions() -> None:
    tokens, starts = np.array([2, *[7] * 400, 3]), np.ones(402, bool)
    runs = []
    for seed in range(400):
        positions = masked_words(tokens, starts, 0.01, 402, 3, np.random.default_rng(seed))  # 4 words: room for one
        runs.append(int(np.split(positions, np.flatnonzero(np.diff(positions) > 1) + 1)[0].size))
    shares = np.bincount(runs, minlength=5)[1:4] / len(runs)
    assert np.allclose(shares, np.array([6, 3, 2]) / 11, atol=0.09)


@pytest.mark.parametrize("masking_kind", ["piece", "word", "ngram"])
def test_the_generator_alone_decides(masking_kind: str) -> None:
    vocabulary: Any = Pieces("\u2581a", "b", "\u2581c")
    tokens = np.array(vocabulary.ids(*["\u2581a", "b", "b", "\u2581c"] * 8))
    drawn = [
        draw_positions(tokens, masking_kind, 0.3, 40, vocabulary, np.random.default_rng(seed)).tolist()
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2] and 1 <= len(drawn[0]) <= 10
