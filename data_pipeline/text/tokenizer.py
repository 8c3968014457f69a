"""The interface that every kind of text tokenizer has."""

from typing import Protocol

import numpy as np

ABSENT = -1
"""Special id of a tokenizer that has no such token; equal to no id of a text."""


class TextTokenizer(Protocol):
    """Text <-> ids from 0 to `size` - 1. Special ids may be any of them; each kind says which.

    Only `pad` may be an ordinary id as well, in tokenizers that have no padding token of their own.
    """

    size: int
    pad: int
    """Fills a row behind its text."""
    unk: int
    """Stands for text that no piece covers; ABSENT where every text has pieces."""
    cls: int
    """Begins a row."""
    sep: int
    """Ends a text."""
    mask: int
    """Replaces a masked piece; ABSENT if the tokenizer is not meant for masking."""
    specials: frozenset[int]
    """The ids that stand for no text of their own: those above and any others of the kind."""
    ordinary: np.ndarray
    """The other ids, int64 [n], ascending: what a random replacement is drawn from."""
    fingerprint: str
    """Digest of everything that determines the ids of a text, in hex."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without special ids except `unk`."""
        ...

    def decode(self, ids: list[int]) -> str:
        """Return the text of the ids, leaving out special ids."""
        ...

    def piece(self, number: int) -> str:
        """Return the text of an id, never empty, with a space in front if it begins after one."""
        ...

    def starts_word(self, number: int) -> bool:
        """Return whether an id begins a word; special ids do."""
        ...


def ordinary_ids(size: int, specials: frozenset[int]) -> np.ndarray:
    """Return the ids below `size` that are not special, int64 [n], ascending."""
    return np.setdiff1d(np.arange(size, dtype=np.int64), np.fromiter(specials, np.int64, len(specials)))
