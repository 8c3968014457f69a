"""Position -> sample, stateless: the order of a run is arithmetic on (samples, seed, position).

Position P >= 0 lies in epoch e = P div N at place q = P mod N. Within an epoch a keyed Feistel network permutes the
places; values at N or above walk on along their cycle until they fall below N, so every epoch is exactly the N samples.
The order has a name and a version, which the state of a stream carries: another order is another name, never a change
of this one (golden values in tests/data_pipeline/stream/test_order.py pin it).
"""

import hashlib
from functools import lru_cache

import numpy as np

from data_pipeline.errors import DataError

ORDER = "feistel"
ORDER_VERSION = 1

_ROUNDS = 8
_MIN_BITS = 4
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MASK64 = (1 << 64) - 1


def order(positions: np.ndarray, samples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """positions: int64 [n] -> (epochs: int64 [n], sample ids: int64 [n]), each epoch a permutation of `samples`.

    Raises DataError for an empty dataset or a position below 0.
    """
    if samples < 1:
        raise DataError(f"samples={samples}: an order needs at least one sample; build the dataset first")
    positions = np.asarray(positions, dtype=np.int64)
    if positions.size and int(positions.min()) < 0:
        raise DataError(f"position {int(positions.min())} is below 0; positions count from 0")
    epochs, places = np.divmod(positions, np.int64(samples))
    return epochs, permute(places, samples, seed, epochs)


def permute(places: np.ndarray, samples: int, seed: int, epochs: np.ndarray) -> np.ndarray:
    """places, epochs: int64 [n] -> int64 [n], a bijection of [0, samples) for each (seed, epoch)."""
    bits = max(_MIN_BITS, (samples - 1).bit_length())
    keys = _mix(_mix(np.full(epochs.shape, seed & _MASK64, np.uint64) + _GOLDEN) ^ epochs.astype(np.uint64))
    values = _feistel(places.astype(np.uint64), keys, bits)
    outside = np.flatnonzero(values >= samples)
    while outside.size:
        values[outside] = _feistel(values[outside], keys[outside], bits)
        outside = outside[values[outside] >= samples]
    return values.astype(np.int64)


def sample_generator(seed: int, epoch: int, sample_id: int, purpose: str) -> np.random.Generator:
    """The random numbers of one sample for one purpose ("crop", "mask", ...): Philox keyed by these four, nothing else.

    The key is (seed, sha256 of purpose), the counter starts at (0, 0, epoch, sample id): no two streams overlap.
    """
    key = np.array([seed & _MASK64, _purpose_key(purpose)], dtype=np.uint64)
    counter = np.array([0, 0, epoch, sample_id], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


@lru_cache(maxsize=256)
def _purpose_key(purpose: str) -> int:
    return int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:8], "little")


def _feistel(values: np.ndarray, keys: np.ndarray, bits: int) -> np.ndarray:
    """Unbalanced Feistel network on `bits` bits: uint64 [n], keyed per element by uint64 [n]."""
    low_bits = np.uint64(bits - bits // 2)
    low_mask = (np.uint64(1) << low_bits) - np.uint64(1)
    high_mask = (np.uint64(1) << np.uint64(bits // 2)) - np.uint64(1)
    high, low = values >> low_bits, values & low_mask
    for number in range(_ROUNDS):
        round_keys = keys + np.uint64((number + 1) * int(_GOLDEN) & _MASK64)
        if number % 2:
            high = high ^ (_mix(low ^ round_keys) & high_mask)
        else:
            low = low ^ (_mix(high ^ round_keys) & low_mask)
    return (high << low_bits) | low


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014): uint64 [n] -> uint64 [n], a bijection that mixes every bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
