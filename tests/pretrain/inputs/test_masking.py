"""Whole words are masked whole, Chinese ones as jieba cuts them, n-grams as often as they should be."""

import hashlib
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import ConfigError
from pretrain.inputs import masking
from pretrain.inputs.masking import (
    draw_positions,
    mask_slots,
    maskable_at,
    masked_positions,
    masked_words,
    replace_bert,
    replace_electra,
    word_starts,
)


class Pieces:
    """A vocabulary of the given pieces behind the specials, SentencePiece's way of writing them."""

    pad, unk, cls, sep, mask = range(5)

    def __init__(self, *pieces: str) -> None:
        self.pieces = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *pieces)
        self.size = len(self.pieces)
        self.specials = frozenset(range(5))
        self.ordinary = np.arange(5, self.size)

    def piece(self, number: int) -> str:
        return self.pieces[number].replace("\u2581", " ")

    def starts_word(self, number: int) -> bool:
        return number < 5 or self.pieces[number][0] == "\u2581"

    def ids(self, *pieces: str) -> list[int]:
        return [2, *(self.pieces.index(piece) for piece in pieces), 3]


def maskable(tokens: Any) -> np.ndarray:
    """Where ids stand for text, if 0 to 4 are special."""
    vocabulary: Any = Pieces()
    return maskable_at(np.asarray(tokens), vocabulary)


def cut(*pieces: str) -> list[str]:
    """The words that pieces are grouped to, [CLS] and [SEP] aside."""
    vocabulary: Any = Pieces(*dict.fromkeys(piece for piece in pieces if piece != "[UNK]"))
    starts = word_starts(vocabulary.ids(*pieces), vocabulary)[1:-1]
    words: list[str] = []
    for piece, begins in zip(pieces, starts, strict=True):
        words = [*words, piece] if begins else [*words[:-1], words[-1] + piece]
    return [word.replace("\u2581", "_") for word in words]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pieces", "words"),
    [
        (("\u2581a", "\u2581red", "dish", "\u2581cat"), ["_a", "_reddish", "_cat"]),
        (("\u2581我", "来", "到", "北", "京", "清", "华", "大", "学"), ["_我", "来到", "北京", "清华大学"]),
        (("\u2581我", "来到", "北京", "清华", "大学"), ["_我", "来到", "北京", "清华大学"]),
        (("\u2581", "北", "京", "\u2581cat", "s", "大", "学"), ["_", "北京", "_cats", "大学"]),
        (("\u2581北", "京", "[UNK]", "大", "学"), ["_北京", "[UNK]", "大学"]),
        (("\u2581北", "京", "\u2581", "大", "学"), ["_北京", "_", "大学"]),
        (("\u2581北", "京", "[UNK]", "[UNK]", "大", "学"), ["_北京", "[UNK]", "[UNK]", "大学"]),
    ],
)
def test_words_are_what_spaces_or_jieba_part(pieces: tuple[str, ...], words: list[str]) -> None:
    assert cut(*pieces) == words


def test_a_text_may_begin_without_a_special() -> None:
    vocabulary: Any = Pieces("北", "京", "\u2581a", "b")
    assert word_starts([5, 6], vocabulary).tolist() == [True, False]
    assert word_starts([7, 8, 5, 6, 3], vocabulary).tolist() == [True, False, True, False, True]
    assert word_starts([8, 7, 2], vocabulary).tolist() == [False, True, True]


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
    positions = masked_words(maskable(tokens), starts, rate, len(tokens), longest, np.random.default_rng(seed))
    words = np.cumsum(starts)[1:-1]
    chosen = np.isin(np.arange(1, len(tokens) - 1), positions)
    assert all(chosen[words == word].all() or not chosen[words == word].any() for word in set(words.tolist()))
    wanted = max(1, round(rate * len(tokens)))
    assert len(positions) <= max(wanted, min(lengths)) and (np.diff(positions) > 0).all()
    if longest == 1 and set(lengths) == {1}:
        assert len(positions) == min(wanted, len(lengths))
    assert len(positions) or min(lengths) > mask_slots(rate, len(tokens))


def test_ngrams_of_one_two_and_three_words_come_in_their_proportions() -> None:
    words, starts = maskable([2, *[7] * 400, 3]), np.ones(402, bool)
    runs = []
    for seed in range(400):
        positions = masked_words(words, starts, 0.01, 402, 3, np.random.default_rng(seed))  # 4 words: room for one
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


# ------------------------------------------------------------------------------- boundaries, each from the rule


@pytest.mark.parametrize(
    ("rate", "context", "count"),
    [(0.15, 1, 1), (0.15, 3, 1), (0.01, 20, 1), (0.15, 10, 2), (0.15, 16, 2), (0.5, 5, 2), (0.15, 128, 19)],
)
def test_a_context_masks_its_share_rounded_and_at_least_one_piece(rate: float, context: int, count: int) -> None:
    assert mask_slots(rate, context) == count


def positions_of(tokens: list[int], rate: float, context: int = 99) -> list[int]:
    return masked_positions(maskable(tokens), rate, context, np.random.default_rng(0)).tolist()


@pytest.mark.parametrize(
    ("tokens", "rate", "positions"),
    [
        ([2, 5, 3], 0.1, [1]),  # the first id that is no special
        ([2, 1, 3], 0.1, [1]),  # [UNK] stands for a word
        ([2, 0, 3], 0.9, []),
        ([2, 4, 3], 0.9, []),
        ([2, 3], 0.9, []),
        ([2, 0, 1, 2, 3, 4, 5, 6, 3], 0.9, [2, 6, 7]),
    ],
)
def test_every_piece_but_specials_can_be_masked(tokens: list[int], rate: float, positions: list[int]) -> None:
    assert positions_of(tokens, rate) == positions
    starts = np.ones(len(tokens), bool)
    assert masked_words(maskable(tokens), starts, rate, 99, 1, np.random.default_rng(0)).tolist() == positions


@pytest.mark.parametrize(
    ("length", "rate", "context", "count"), [(10, 0.15, 99, 2), (4, 0.05, 99, 1), (12, 0.5, 4, 2), (12, 0.5, 24, 6)]
)
def test_the_number_counts_both_ends_and_is_at_most_that_of_a_full_context(
    length: int, rate: float, context: int, count: int
) -> None:
    assert len(positions_of([2, *[7] * (length - 2), 3], rate, context)) == count


@pytest.mark.parametrize(
    ("starts", "rate", "context", "positions"),
    [
        ("110", 0.5, 99, [1, 2]),  # a word that fills the number exactly is taken
        ("110", 0.15, 14, [1, 2]),  # one that exceeds it, if a full context has room for it
        ("110", 0.15, 7, []),
        ("110", 0.15, 20, [1, 2]),  # a full context has room for three
        ("111", 0.5, 99, [1, 2]),
    ],
)
def test_words_fill_the_number_and_the_shortest_may_exceed_it(
    starts: str, rate: float, context: int, positions: list[int]
) -> None:
    begins = np.array([letter == "1" for letter in starts] + [True])
    for longest in (1, 3):
        found = masked_words(maskable([2, 7, 7, 3]), begins, rate, context, longest, np.random.default_rng(0))
        assert found.tolist() == positions


def test_what_cannot_be_masked_parts_words() -> None:
    words, starts = maskable([2, 7, 3, 7, 3]), np.array([True, True, True, False, True])
    found = {tuple(masked_words(words, starts, 0.2, 99, 1, np.random.default_rng(s)).tolist()) for s in range(20)}
    assert found == {(1,), (3,)}


@pytest.mark.parametrize(("kind", "longest"), [("word", 1), ("ngram", 3)])
def test_words_are_drawn_one_by_one_and_ngrams_of_up_to_three(
    kind: str, longest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(masking, "masked_words", lambda *given: asked.append(given[4]))
    vocabulary: Any = Pieces("\u2581a")
    draw_positions(np.array([2, 5, 3]), kind, 0.3, 9, vocabulary, np.random.default_rng(0))
    assert asked == [longest]


def test_an_ngram_has_three_words_at_most_and_ends_with_the_text() -> None:
    tokens, starts = np.array([2, *[7] * 30, 3]), np.ones(32, bool)
    for seed in range(100):
        positions = masked_words(maskable(tokens), starts, 4 / 32, 99, 3, np.random.default_rng(seed))
        assert len(positions) == 4
    one = np.array([2, 7, 3])
    assert masked_words(maskable(one), np.ones(3, bool), 0.3, 99, 3, np.random.default_rng(1)).tolist() == [1]


@pytest.mark.parametrize(("letter", "cuts"), [("\u33ff", False), ("\u3400", True), ("\u9fff", True), ("\ua000", False)])
def test_jieba_cuts_text_with_a_chinese_character(letter: str, cuts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    class Segmenter:
        def cut(self, text: str) -> list[str]:
            asked.append(text)
            return list(text)

    monkeypatch.setattr(masking, "_segmenter", Segmenter)
    cut(f"\u2581{letter}")
    assert asked == ([f"  {letter} "] if cuts else [])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pieces", "words"),
    [
        (("\u2581cat", "\u2581北", "京", "s"), ["_cat", "_北京", "s"]),
        (("\u2581\u2581北", "京", "\u2581大", "学"), ["__北京", "_大学"]),
        (("北", "京", "\u2581\u2581cat", "s"), ["北京", "__cats"]),
    ],
)
def test_a_word_begins_behind_the_spaces_of_its_piece(pieces: tuple[str, ...], words: list[str]) -> None:
    assert cut(*pieces) == words


class Draws:
    """A generator that draws the given chances and the second ordinary piece, and notes among how many."""

    def __init__(self, *chances: float) -> None:
        self.chances, self.among = np.array(chances), (0, 0)

    def random(self, count: int) -> np.ndarray:
        assert count == len(self.chances)
        return self.chances

    def integers(self, low: int, high: int, count: int) -> np.ndarray:
        self.among = (low, high)
        return np.ones(count, int)


def test_a_masked_piece_becomes_mask_itself_or_a_piece_that_is_no_special() -> None:
    vocabulary: Any = Pieces("a", "b", "c")
    tokens, places = np.array([2, 7, 7, 7, 7, 7, 7, 3]), np.arange(1, 7)
    draws: Any = Draws(0.0, 0.79, 0.81, 0.89, 0.91, 0.99)
    assert masking.replace_bert(tokens, places, vocabulary, draws).tolist() == [2, 4, 4, 7, 7, 6, 6, 3]
    assert draws.among == (0, 3)
    draws = Draws(0.0, 0.84, 0.86, 0.9, 0.99, 0.5)
    assert masking.replace_electra(tokens, places, vocabulary, draws).tolist() == [2, 4, 4, 7, 7, 7, 4, 3]
    assert tokens.tolist() == [2, 7, 7, 7, 7, 7, 7, 3]
    draws = Draws(0.8, 0.9, 0.8, 0.9, 0.5, 0.5)  # a bound itself belongs to what is behind it
    assert replace_bert(tokens, places, vocabulary, draws).tolist() == [2, 7, 6, 7, 6, 4, 4, 3]
    draws = Draws(0.85, 0.85, 0.5, 0.5, 0.5, 0.5)
    assert replace_electra(tokens, places, vocabulary, draws).tolist() == [2, 7, 7, 4, 4, 4, 4, 3]


# ------------------------------------------------------------------- what is pinned: another draw is another run


@pytest.mark.parametrize(("longest", "expected"), [(1, "d45a8ad65298792f"), (3, "d07ea5a61b95b7dc")])
def test_drawn_positions_are_pinned_by_a_digest(longest: int, expected: str) -> None:
    digest = hashlib.sha256()
    for seed in range(60):
        generator = np.random.default_rng(seed)
        length = int(generator.integers(3, 60))
        tokens, starts = generator.integers(0, 40, length), generator.random(length) < 0.6
        for rate in (0.05, 0.15, 0.4):
            digest.update(masked_words(maskable(tokens), starts, rate, 48, longest, generator).astype("<i8").tobytes())
            digest.update(masked_positions(maskable(tokens), rate, 48, generator).astype("<i8").tobytes())
    assert digest.hexdigest()[:16] == expected


def test_replaced_pieces_are_pinned() -> None:
    vocabulary: Any = Pieces(*map(str, range(55)))
    tokens, places = np.arange(5, 25), np.arange(2, 18)
    found = [
        replace(tokens, places, vocabulary, np.random.default_rng(7)) for replace in (replace_bert, replace_electra)
    ]
    assert found[0].tolist() == [5, 6, 4, 8, 4, 4, 4, 12, 4, 14, 4, 4, 4, 4, 4, 4, 4, 4, 23, 24]
    assert found[1].tolist() == [5, 6, 4, 8, 4, 4, 4, 12, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 23, 24]
    few: Any = Pieces("a", "b", "c")
    drawn = replace_bert(np.full(2000, 7), np.arange(2000), few, np.random.default_rng(0))
    assert set(drawn.tolist()) == {4, 5, 6, 7}  # every piece, no special one but [MASK]


@pytest.mark.parametrize("kind", ["piece", "word", "ngram"])
def test_a_kind_of_masking_is_its_rule_with_the_same_generator(kind: str) -> None:
    vocabulary: Any = Pieces("\u2581a", "b", "\u2581c")
    tokens = np.array(vocabulary.ids(*["\u2581a", "b", "b", "\u2581c"] * 8))
    starts = word_starts(tokens.tolist(), vocabulary)
    for seed in range(20):
        found = draw_positions(tokens, kind, 0.3, 25, vocabulary, np.random.default_rng(seed)).tolist()
        generator = np.random.default_rng(seed)
        if kind == "piece":
            expected = masked_positions(maskable(tokens), 0.3, 25, generator)
        else:
            expected = masked_words(maskable(tokens), starts, 0.3, 25, {"word": 1, "ngram": 3}[kind], generator)
        assert found == expected.tolist()


class InOrder:
    """A generator that takes words in their order and draws one chance."""

    def __init__(self, chance: float) -> None:
        self.chance = chance

    def permutation(self, count: int) -> np.ndarray:
        return np.arange(count)

    def random(self) -> float:
        return self.chance


@pytest.mark.parametrize(
    ("chance", "longest", "count"),
    [
        (0.0, 3, 1), (0.54, 3, 1), (0.55, 3, 2), (0.81, 3, 2), (9 / 11, 3, 3), (0.99, 3, 3), (0.99, 1, 1),
        (0.66, 2, 1), (0.67, 2, 2), (2 / 3, 2, 2),
    ],
)  # fmt: skip
def test_an_ngram_of_n_words_has_a_chance_in_proportion_to_one_nth(chance: float, longest: int, count: int) -> None:
    """Two pieces a word, room for one n-gram and a rest that no second one of its length fits in."""
    starts = np.array([True, *[True, False] * 12, True])
    tokens = np.array([2, *[7] * 24, 3])
    generator: Any = InOrder(chance)
    rate = 2 * count / 26
    found = masked_words(maskable(tokens), starts, rate, 99, longest, generator).tolist()
    assert found == list(range(1, 2 * count + 1))
    wider = masked_words(maskable(tokens), starts, 6 / 26, 99, longest, generator)
    assert len(wider) == 6 and wider.tolist() == list(range(1, 7))


def test_an_ngram_that_does_not_fit_is_shortened_and_no_word_is_taken_twice() -> None:
    starts, tokens = np.array([True, *[True, False] * 4, True]), np.array([2, *[7] * 8, 3])
    generator: Any = InOrder(0.99)
    for wanted, expected in ((2, 2), (3, 2), (4, 4), (5, 4), (6, 6), (7, 6), (8, 8), (9, 8)):
        found = masked_words(maskable(tokens), starts, wanted / 10, 99, 3, generator)
        assert found.tolist() == list(range(1, expected + 1))


@pytest.mark.slow
def test_jieba_reads_its_dictionary_and_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache in the temporary folder may be anybody's."""
    import jieba

    def refuse(*_: object) -> None:
        raise AssertionError("jieba's own start-up would load a cache")

    monkeypatch.setattr(jieba.Tokenizer, "initialize", refuse)
    masking._segmenter.cache_clear()
    assert cut("\u2581北", "京", "大", "学") == ["_北京大学"]
    assert masking._segmenter() is masking._segmenter()
