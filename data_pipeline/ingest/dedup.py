"""Images that occur more than once, over the whole build: which rows go is a function of the rows in their order.

A row is a duplicate when an earlier row that stays has the same bytes, or looks alike: its perceptual hash, which sees
brightness, differs in at most d bits, and its colours in no place by more than COLOUR_LEVELS. To find the hashes, the
64 bits are cut into d + 1 bands: two that differ in d bits agree in at least one band, so comparing the hashes that
share a band finds every pair, exactly. Letters: n rows.
"""

from collections import defaultdict
from collections.abc import Iterator

import numpy as np

BITS = 64
_PAIRS_AT_ONCE = 1 << 22
COLOUR_LEVELS = 20
"""Of 256. JPEG at quality 30, half the size, 12 levels more or 20 less of brightness change a cell's mean colour by up
to 11 levels, a fifth more contrast by up to 20 (300 emoji, 39 photographs); red instead of blue by some 100."""


def first_of_equals(digests: np.ndarray) -> np.ndarray:
    """digests: uint64 [n, 2] -> int64 [n]: the first row with the same digest, of a first row itself."""
    if not len(digests):
        return np.zeros(0, np.int64)
    ranked = np.lexsort((np.arange(len(digests)), digests[:, 1], digests[:, 0]))
    starts = np.ones(len(ranked), bool)
    starts[1:] = (digests[ranked[1:]] != digests[ranked[:-1]]).any(1)
    firsts = np.empty(len(digests), np.int64)
    firsts[ranked] = ranked[np.flatnonzero(starts)[np.cumsum(starts) - 1]]
    return firsts


def first_of_alike(hashes: np.ndarray, bits: int, colours: np.ndarray | None = None) -> np.ndarray:
    """hashes: uint64 [n], colours: uint8 [n, COLOUR_BYTES] -> int64 [n]: the earliest staying row that looks alike.

    Of a staying row itself. Without colours (of any row, or of one: all zero) the hash alone counts. Rows are taken in
    order: a row goes when a row that stays is alike, so that chains of small steps do not all go.
    """
    values, inverse, counts = np.unique(hashes, return_inverse=True, return_counts=True)
    near: dict[int, list[int]] = defaultdict(list)
    for first, second in _each_once([*_alike(values, bits)] if bits else []):
        near[first].append(second)
        near[second].append(first)
    keeper = np.arange(len(hashes))
    alone = counts == 1
    alone[list(near)] = False
    staying: dict[int, list[int]] = defaultdict(list)  # rows by the number of their hash
    for row in np.flatnonzero(~alone[inverse]).tolist():
        value = int(inverse[row])
        earlier = sorted(one for other in (value, *near.get(value, ())) for one in staying.get(other, ()))
        found = earlier[:1] if colours is None else _same_colours(colours, row, earlier)
        if found:
            keeper[row] = found[0]
        else:
            staying[value].append(row)
    return keeper


def _same_colours(colours: np.ndarray, row: int, rows: list[int]) -> list[int]:
    """Of `rows` those whose colours are the row's, or are not known."""
    if not rows or not colours[row].any():
        return rows
    others = colours[rows]
    apart = np.abs(others.astype(np.int16) - colours[row]).max(1) > COLOUR_LEVELS
    return [one for one, other in zip(rows, apart & others.any(1), strict=True) if not other]


def _alike(values: np.ndarray, bits: int) -> Iterator[np.ndarray]:
    """All pairs of distinct `values` within `bits` differing bits: int64 [pairs, 2], some more than once."""
    edges = np.linspace(0, BITS, bits + 2).astype(int)
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        mask = np.uint64(((1 << int(high - low)) - 1) << int(low))
        ranked = np.argsort(values & mask, kind="stable")
        banded = (values & mask)[ranked]
        ends = np.searchsorted(banded, banded, side="right")
        for first, second in _pairs_in_runs(ends):
            left, right = ranked[first], ranked[second]
            near = np.bitwise_count(values[left] ^ values[right]) <= bits
            yield np.stack([left[near], right[near]], 1)


def _pairs_in_runs(ends: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """ends[i]: end of the run that i is in -> all i < j of one run, a bounded number at a time."""
    counts = ends - np.arange(len(ends)) - 1
    start = 0
    while start < len(ends):
        stop = start + max(1, int(np.searchsorted(np.cumsum(counts[start:]), _PAIRS_AT_ONCE)))
        first = np.repeat(np.arange(start, stop), counts[start:stop])
        begins = np.cumsum(counts[start:stop]) - counts[start:stop]
        second = first + 1 + np.arange(len(first)) - np.repeat(begins, counts[start:stop])
        yield first, second
        start = stop


def _each_once(pairs: list[np.ndarray]) -> list[list[int]]:
    """int64 [k, 2] arrays of pairs -> each pair once."""
    return np.unique(np.sort(np.concatenate(pairs), axis=1), axis=0).tolist() if pairs else []


def duplicates(
    digests: np.ndarray | None,
    hashes: np.ndarray,
    hashed: np.ndarray,
    bits: int | None,
    colours: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """-> (int64 [n] the row that stays in place of each, -1 where it stays itself; bool [n] by its bytes).

    digests: uint64 [n, 2] of the raw bytes, None where equal bytes are not looked for. hashes: uint64 [n], of the rows
    where `hashed`, bool [n]; bits None: not looked for. colours: uint8 [n, COLOUR_BYTES].
    """
    own = np.arange(len(hashes))
    exact = own if digests is None else first_of_equals(digests)
    alike = own.copy()
    if bits is not None:
        candidates = np.flatnonzero(hashed & (exact == own))  # of equal bytes only the first is compared further
        seen = None if colours is None else colours[candidates]
        alike[candidates] = candidates[first_of_alike(hashes[candidates], bits, seen)]
    keeper = np.where(exact != own, exact, alike)
    keeper = keeper[keeper]  # the equal of a row that went as alike stays out for the row that stays
    return np.where(keeper == own, -1, keeper), exact != own
