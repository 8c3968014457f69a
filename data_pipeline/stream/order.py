"""Stateless order of samples: the sample at a position is a function of (samples, seed, position).

Position P >= 0 belongs to epoch e = P div N, at place q = P mod N. Every epoch contains each of the N samples once, and
a batch may span two epochs. C lanes read an epoch; they are virtual readers, independent of the hardware, and place q
belongs to lane q mod C. A lane owns blocks of B consecutive samples, which a keyed permutation of all blocks assigns to
the lanes, and shuffles its samples within windows of K blocks. So C * K blocks are open at once, whatever the number of
ranks, and each block is read by one lane within one window. Samples that do not fill a block on every lane form a
short last block of each lane. Every epoch shifts the block boundaries by a random offset. Datasets below C * K blocks
have fewer lanes, and those below one window are permuted as a whole.

The order has a name and a version, which the state of a stream records. A different order gets a new name; this one
never changes (golden values in tests/data_pipeline/stream/test_order.py pin it).
"""

import dataclasses
import hashlib
import threading
from functools import lru_cache

import numpy as np

from data_pipeline.errors import DataError

ORDER = "lanes"
ORDER_VERSION = 1

_ROUNDS = 8
_MIN_BITS = 4
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MASK64 = (1 << 64) - 1
_ONE = np.array(1, np.uint64)
_S30, _S27, _S31 = (np.array([bits], np.uint64) for bits in (30, 27, 31))  # SplitMix64's shifts and factors
_M1, _M2 = (np.array([factor], np.uint64) for factor in (0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
_ROUND_KEYS = np.array([[number * int(_GOLDEN) & _MASK64] for number in range(1, _ROUNDS + 1)], np.uint64)
_KEPT_IDS = 1 << 20  # 8 MB
_SHIFT, _BLOCKS, _WINDOWS = range(3)  # purposes of derived keys


@dataclasses.dataclass(frozen=True)
class Geometry:
    """lanes C: virtual readers; block B: consecutive samples; window K: blocks that a lane shuffles together."""

    lanes: int = 64
    block: int = 64
    window: int = 16

    def lanes_for(self, samples: int) -> int:
        """Return the number of lanes that a dataset of this size fills with a window each, at least one."""
        return max(1, min(self.lanes, samples // (self.block * self.window)))


DEFAULT = Geometry()


def order(
    positions: np.ndarray, samples: int, seed: int, geometry: Geometry = DEFAULT
) -> tuple[np.ndarray, np.ndarray]:
    """Map positions: int64 [n] -> (epochs: int64 [n], sample ids: int64 [n]); each epoch permutes all samples.

    Raises DataError for an empty dataset or a position below 0.
    """
    epochs, places = _divide(positions, samples)
    keys = _key(np.full(epochs.shape, seed & _MASK64, np.uint64), epochs)
    lanes, block = geometry.lanes_for(samples), geometry.block
    rows, lane = np.divmod(places, np.int64(lanes))  # index within the lane, and the lane
    full = samples // lanes // block  # whole blocks of each lane
    rows = _shuffle_windows(rows, lane, keys, samples, lanes, full, geometry)
    number, inside = np.divmod(rows, np.int64(block))
    raw = _short_block(rows, lane, samples, lanes, full * block)
    whole = np.flatnonzero(number < full)
    if whole.size:
        slots, sizes = number[whole] * lanes + lane[whole], np.full(whole.shape, full * lanes)
        raw[whole] = _permute(slots, sizes, _key(keys[whole], _BLOCKS)) * block + inside[whole]
    shift = (_key(keys, _SHIFT) % np.uint64(samples)).astype(np.int64)
    return epochs, (raw - (samples - shift)) % np.int64(samples)


def lanes_of(positions: np.ndarray, samples: int, geometry: Geometry = DEFAULT) -> np.ndarray:
    """Return the lane that reads each position: int64 [n] -> int64 [n]."""
    return _divide(positions, samples)[1] % geometry.lanes_for(samples)


def share(positions: np.ndarray, lanes: np.ndarray, shard: tuple[int, int]) -> np.ndarray:
    """Return the part of a batch for rank `shard[0]` of `shard[1]`: positions, lanes int64 [n] -> int64 [n / world].

    Positions are sorted by lane and cut into equal parts. So the concatenated parts of all ranks are the same for every
    world size, and a rank keeps reading the blocks that it has begun. Raises DataError when the batch is not divisible.
    """
    rank, world = shard
    size = len(positions)
    if size % world or not 0 <= rank < world:
        fits = max(1, size // world) * world
        raise DataError(f"batch of {size} for rank {rank} of {world}: not divisible; use {fits}, a rank < {world}")
    part = size // world
    return positions[np.argsort(lanes, kind="stable")][rank * part : (rank + 1) * part]


def sample_generator(seed: int, epoch: int, sample_id: int, purpose: str) -> np.random.Generator:
    """Return a Philox generator for one sample and purpose ("crop", "mask", ...), a function of the arguments alone.

    The key is (seed, first 64 bits of the sha256 of purpose), the counter starts at (0, 0, epoch, sample id): no two
    streams overlap.
    """
    key = np.array([seed & _MASK64, _purpose_key(purpose)], dtype=np.uint64)
    counter = np.array([0, 0, epoch, sample_id], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


@lru_cache(maxsize=256)
def _purpose_key(purpose: str) -> int:
    return int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:8], "little")


class Windows:
    """`order` for a sequential reader: permutes whole windows at first use and keeps the last two per lane.

    The same numbers at lower cost: a permutation takes as long for 256 positions as for a few thousand.
    """

    def __init__(self, samples: int, seed: int, geometry: Geometry = DEFAULT) -> None:
        self._of = samples, seed, geometry
        self._lanes = geometry.lanes_for(samples)
        self._span = geometry.window * geometry.block
        self._windows = max(1, samples // self._lanes // geometry.block // geometry.window)  # per lane and epoch
        longest = -(-samples // self._lanes) - (self._windows - 1) * self._span
        self._ids = np.empty((min(2 * self._lanes, _KEPT_IDS // longest), longest), np.int64)
        self._rows: dict[int, int] = {}  # window -> row of `_ids`, oldest first
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type["Windows"], tuple[int, int, Geometry]]:
        return Windows, self._of

    def order(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Map positions: int64 [n] -> (epochs: int64 [n], sample ids: int64 [n]), the same as `order`."""
        epochs, places = _divide(positions, self._of[0])
        inside, lane = np.divmod(places, np.int64(self._lanes))
        number = np.minimum(inside // self._span, self._windows - 1)
        windows, which = np.unique((epochs * self._windows + number) * self._lanes + lane, return_inverse=True)
        if len(windows) > len(self._ids):
            return order(positions, *self._of)
        with self._lock:
            rows = np.array(self._rows_of(windows.tolist()), np.int64)
            return epochs, self._ids[rows[which], inside - number * self._span]

    def _rows_of(self, windows: list[int]) -> list[int]:
        missing = [window for window in windows if window not in self._rows]
        if missing:
            for window in [window for window in self._rows if window not in set(windows)]:
                if len(self._rows) + len(missing) > len(self._ids):
                    del self._rows[window]
            free = set(range(len(self._ids))) - set(self._rows.values())
            positions = [self._positions(window) for window in missing]
            found = np.split(order(np.concatenate(positions), *self._of)[1], np.cumsum([len(p) for p in positions]))
            for window, ids in zip(missing, found, strict=False):
                row = self._rows[window] = free.pop()
                self._ids[row, : len(ids)] = ids
        return [self._rows[window] for window in windows]

    def _positions(self, window: int) -> np.ndarray:
        """Return the positions of a window, int64 [samples of the window]."""
        samples, lanes = self._of[0], self._lanes
        turn, lane = divmod(window, lanes)
        epoch, number = divmod(turn, self._windows)
        end = samples // lanes + (lane < samples % lanes) if number == self._windows - 1 else (number + 1) * self._span
        return epoch * samples + np.arange(number * self._span, end, dtype=np.int64) * lanes + lane


# -------------------------------------------------------------------------------------- blocks and windows


def _divide(positions: np.ndarray, samples: int) -> tuple[np.ndarray, np.ndarray]:
    """positions: int64 [n] -> (epochs, places within the epoch), int64 [n] each."""
    if samples < 1:
        raise DataError(f"samples={samples}: must be at least 1; build the dataset first")
    positions = np.asarray(positions, dtype=np.int64)
    if positions.size and int(positions.min()) < 0:
        raise DataError(f"position {int(positions.min())} is below 0; positions count from 0")
    epochs, places = np.divmod(positions, np.int64(samples))
    return epochs, places


def _shuffle_windows(
    rows: np.ndarray, lane: np.ndarray, keys: np.ndarray, samples: int, lanes: int, full: int, geometry: Geometry
) -> np.ndarray:
    """rows: int64 [n], indices within a lane -> int64 [n], permuted within their windows.

    The last window of a lane also holds the blocks that do not fill another window, and the short block.
    """
    span = geometry.window * geometry.block
    windows = max(1, full // geometry.window)
    number = np.minimum(rows // span, windows - 1)
    length = samples // lanes + (lane < samples % lanes)
    sizes = np.where(number == windows - 1, length - number * span, span)
    inner = _permute(rows - number * span, sizes, _key(_key(_key(keys, _WINDOWS), lane), number))
    return number * span + inner


def _short_block(rows: np.ndarray, lane: np.ndarray, samples: int, lanes: int, whole: int) -> np.ndarray:
    """Return the index of samples after the first `whole` of a lane: all short blocks follow the full blocks."""
    each, longer = samples // lanes - whole, samples % lanes
    return lanes * whole + lane * each + np.minimum(lane, longer) + (rows - whole)


# --------------------------------------------------------------------------------------------- permutation


def _permute(values: np.ndarray, sizes: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """values, sizes: int64 [n], keys: uint64 [n] -> int64 [n]: for each key and size a bijection of [0, size).

    A Feistel network permutes the next power of two; values outside [0, size) are permuted again (cycle walking).
    """
    bits = np.maximum(_MIN_BITS, np.frexp((sizes - 1).astype(np.float64))[1]).astype(np.uint64)
    found = _feistel(values.astype(np.uint64), keys, bits)
    limits = sizes.astype(np.uint64)
    outside = np.flatnonzero(found >= limits)
    while outside.size:
        found[outside] = _feistel(found[outside], keys[outside], bits[outside])
        outside = outside[found[outside] >= limits[outside]]
    return found.astype(np.int64)


def _feistel(values: np.ndarray, keys: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """Permute values of `bits` bits by an unbalanced Feistel network: all uint64 [n] -> uint64 [n]."""
    high_bits = bits >> _ONE
    low_bits = bits - high_bits
    low_mask, high_mask = (_ONE << low_bits) - _ONE, (_ONE << high_bits) - _ONE
    high, low = values >> low_bits, values & low_mask
    for number, round_keys in enumerate(keys + _ROUND_KEYS):
        if number % 2:
            high ^= _mix(low ^ round_keys) & high_mask
        else:
            low ^= _mix(high ^ round_keys) & low_mask
    return (high << low_bits) | low


def _key(keys: np.ndarray, number: np.ndarray | int) -> np.ndarray:
    """Derive keys: keys uint64 [n], one number for all or one each -> uint64 [n]."""
    return _mix(_mix(keys + _GOLDEN) ^ np.asarray(number).astype(np.uint64))


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014): uint64 [n] -> uint64 [n], a bijection that mixes every bit."""
    x = x ^ (x >> _S30)
    x *= _M1
    x ^= x >> _S27
    x *= _M2
    x ^= x >> _S31
    return x
