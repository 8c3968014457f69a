"""Choice and replacement of masked tokens, as in BERT (arXiv:1810.04805, also whole-word masking), ALBERT (n-grams,
arXiv:1909.11942, section 3.1) and ELECTRA (arXiv:2003.10555).

All random numbers come from the given generator, which is the sample's own.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from data_pipeline.errors import ConfigError

if TYPE_CHECKING:
    from data_pipeline.text.tokenizer import TextTokenizer

LONGEST_NGRAM = 3


def mask_slots(rate: float, context: int) -> int:
    """Return M, the number of masked pieces in a full context."""
    return max(1, round(rate * context))


def draw_positions(
    tokens: np.ndarray,
    masking: str,
    rate: float,
    context: int,
    tokenizer: TextTokenizer,
    generator: np.random.Generator,
) -> np.ndarray:
    """Mask by "piece", whole "word" or "ngram" of up to three words: tokens int64 [length] -> int64 [n], ascending."""
    maskable = maskable_at(tokens, tokenizer)
    if masking == "piece":
        return masked_positions(maskable, rate, context, generator)
    longest = LONGEST_NGRAM if masking == "ngram" else 1
    return masked_words(maskable, word_starts(tokens.tolist(), tokenizer), rate, context, longest, generator)


def maskable_at(tokens: np.ndarray, tokenizer: TextTokenizer) -> np.ndarray:
    """Return which tokens may be masked, bool [length]: all but special ones; [UNK] may, as it stands for a word."""
    return ~np.isin(tokens, list(tokenizer.specials - {tokenizer.unk}))


def masked_positions(maskable: np.ndarray, rate: float, context: int, generator: np.random.Generator) -> np.ndarray:
    """Draw max(1, round(rate * length)) of the maskable positions, bool [length] -> int64 [n], ascending.

    The length is without padding and counts [CLS] and [SEP]. n is 0 if there is no word.
    """
    candidates = np.flatnonzero(maskable)
    return np.sort(generator.permutation(candidates)[: _wanted(len(maskable), rate, context)])


def masked_words(
    maskable: np.ndarray, starts: np.ndarray, rate: float, context: int, longest: int, generator: np.random.Generator
) -> np.ndarray:
    """As `masked_positions`, but only whole words; they begin at `starts`, bool [length].

    Words are taken in random order. With longest > 1 they are n-grams of n words, n drawn with probability proportional
    to 1 / n and reduced where n words do not fit. Words that would exceed the number of positions are skipped; if no
    word fits, the shortest is masked, unless it exceeds even the number of a full context.
    """
    words = _words(maskable, starts)
    chosen, room = np.zeros(len(maskable), bool), _wanted(len(maskable), rate, context)
    chances = np.cumsum(1 / np.arange(1, longest + 1))
    for first in generator.permutation(len(words)).tolist():
        if not room:
            break
        drawn = 1 + int(np.searchsorted(chances, generator.random() * chances[-1], side="right"))
        for count in range(min(drawn, len(words) - first), 0, -1):
            gram = np.concatenate(words[first : first + count])
            if len(gram) <= room and not chosen[gram].any():
                chosen[gram] = True
                room -= len(gram)
                break
    shortest = min(words, key=len, default=None)
    if not chosen.any() and shortest is not None and len(shortest) <= mask_slots(rate, context):
        chosen[shortest] = True
    return np.flatnonzero(chosen)


def word_starts(ids: list[int], tokenizer: TextTokenizer) -> np.ndarray:
    """Return which pieces begin a word, bool [n]. Text with Chinese characters is split into words by jieba.

    Raises ConfigError when jieba is needed but not installed: without it the masks would differ.
    """
    pieces = [" " if i in tokenizer.specials else tokenizer.piece(i) for i in ids]
    text = "".join(pieces)
    if not any("\u3400" <= letter <= "\u9fff" for letter in text):
        return np.array([tokenizer.starts_word(i) for i in ids], bool)
    words = [len(word) for word in _segmenter().cut(text)]
    begins = {0, *np.cumsum(words).tolist()}
    offsets = np.cumsum([0, *(len(piece) for piece in pieces)])[:-1].tolist()
    return np.array([offset in begins for offset in offsets], bool)  # jieba makes every space a word of its own


@lru_cache(maxsize=1)
def _segmenter() -> Any:
    try:
        import jieba
    except ImportError:
        raise ConfigError(
            "task.masking by whole words needs jieba for Chinese text; pip install 'tessera[chinese]', or mask by piece"
        ) from None
    tokenizer = jieba.Tokenizer()
    # jieba's own initialisation loads a cache from the temporary folder, where any user may have written one
    tokenizer.FREQ, tokenizer.total = tokenizer.gen_pfdict(tokenizer.get_dict_file())
    tokenizer.initialized = True
    return tokenizer


def replace_bert(
    tokens: np.ndarray, positions: np.ndarray, tokenizer: TextTokenizer, generator: np.random.Generator
) -> np.ndarray:
    """Per position: 80 % [MASK], 10 % unchanged, 10 % a random non-special piece -> int64 [length]."""
    chance = generator.random(len(positions))
    pieces = tokenizer.ordinary[generator.integers(0, len(tokenizer.ordinary), len(positions))]
    masked = tokens.copy()
    masked[positions] = np.where(chance < 0.8, tokenizer.mask, np.where(chance < 0.9, tokens[positions], pieces))
    return masked


def replace_electra(
    tokens: np.ndarray, positions: np.ndarray, tokenizer: TextTokenizer, generator: np.random.Generator
) -> np.ndarray:
    """Per position: 85 % [MASK], 15 % unchanged -> int64 [length]."""
    masked = tokens.copy()
    masked[positions] = np.where(generator.random(len(positions)) < 0.85, tokenizer.mask, tokens[positions])
    return masked


def _wanted(length: int, rate: float, context: int) -> int:
    return min(mask_slots(rate, context), max(1, round(rate * length)))


def _words(maskable: np.ndarray, starts: np.ndarray) -> list[np.ndarray]:
    """Return the indices of each word's pieces; tokens that cannot be masked separate words."""
    places = np.flatnonzero(maskable)
    begins = starts[places].copy()
    begins[1:] |= np.diff(places) > 1
    return np.split(places, np.flatnonzero(begins[1:]) + 1) if len(places) else []
