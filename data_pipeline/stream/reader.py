"""Positions -> samples, straight from the tars: one ranged read a sample, no state but the position."""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from data_pipeline.errors import BadSample, DataError
from data_pipeline.remote import CONNECTIONS, RemoteStorage
from data_pipeline.schema import Sample
from data_pipeline.shards.codes import CodesFile, open_codes
from data_pipeline.shards.manifest import Index, open_dataset, read_index
from data_pipeline.shards.samples import Account, Contents, Unreadable, read_sample
from data_pipeline.shards.tar import BLOCK, NEWEST, checksum, parse_files
from data_pipeline.storage import LocalStorage
from data_pipeline.stream.cache import BlockCache, ByteRange
from data_pipeline.stream.order import DEFAULT, ORDER, ORDER_VERSION, Geometry, Windows, lanes_of, order, share
from data_pipeline.stream.state import check_state

STATE_VERSION = 1

_INDICES = 4096  # of shards, kept in memory: more than the blocks that the order has open at once
_OPENED_AT_ONCE = 2 * CONNECTIONS  # shards: another thread waits for no more
_PORTION = 1024  # positions that are looked ahead at once, at least


class Stream:
    """A dataset as an endless sequence of samples, the same for every world size: `read` is a function of positions.

    dataset: DATASET@FINGERPRINT is the version with that fingerprint of a dataset that grew since.
    codes: id of the image tokenizer whose codes come along with the samples. geometry: how far samples are shuffled.
    Raises DataError for a dataset that is missing, empty or damaged, and for codes that are not there.
    """

    def __init__(self, dataset: str | Path, seed: int, codes: str | None = None, geometry: Geometry = DEFAULT) -> None:
        self.dataset = str(dataset)
        self.seed = seed
        self.codes = codes
        self.geometry = geometry
        _keep_freed_memory()
        self._storage, self._manifest = open_dataset(dataset)
        self.samples: int = self._manifest.samples
        self.fingerprint: str = self._manifest.fingerprint
        if not self.samples:
            raise DataError(f"{dataset}: 0 samples; build it from a source that has some")
        self._order = Windows(self.samples, seed, geometry)
        counts = [shard.n for shard in self._manifest.shards]
        self._ends = np.cumsum(counts, dtype=np.int64)
        self._starts = self._ends - counts
        self._indices: dict[int, tuple[str, Index]] = {}
        self._codes: CodesFile | None = None if codes is None else open_codes(self._storage, self._manifest, codes)
        self._cache = None if isinstance(self._storage, LocalStorage) else self._open_cache()
        self._last: int | None = None
        self._ahead = 0

    def read(self, start: int, stop: int) -> list[Sample]:
        """The samples of positions [start, stop), in that order."""
        return self.take(np.arange(start, stop, dtype=np.int64))

    def take(self, positions: np.ndarray) -> list[Sample]:
        """The samples of any positions, int64 [n], in the order given."""
        if self._cache is not None and len(positions):
            self._look_ahead(self._cache, positions)
        epochs, ids = self._order.order(positions)
        return self._load(ids, epochs.tolist(), positions.tolist())

    def fetch(self, sample_id: int) -> Sample:
        """One sample by its id, 0 <= sample_id < samples."""
        if not 0 <= sample_id < self.samples:
            raise DataError(f"sample id {sample_id}: {self.dataset} has ids 0 to {self.samples - 1}")
        return self._load(np.array([sample_id]), [0], [-1])[0]

    def readable(self, rejected: Counter[str]) -> Iterator[Sample]:
        """Samples with captions in the order of their ids; the others are counted in `rejected`, by reason."""
        for start, stop in zip(self._starts.tolist(), self._ends.tolist(), strict=True):
            account = Account()
            for sample_id in range(start, stop):
                [(place, data, codes)] = self._read_places(np.array([sample_id]))
                try:
                    contents = read_contents(data, place.where, self._manifest.version)
                except BadSample as fault:
                    account.add(fault.key, fault.reason)
                    continue
                account.add(contents.key, "" if contents.captions else "empty_caption")
                if contents.captions:
                    yield Sample(sample_id, 0, -1, *_with_own_key(contents), codes)
            rejected.update(account.rejected)

    def read_codes(self, start: int, stop: int) -> np.ndarray:
        """The codes of positions [start, stop) alone, without touching a tar -> uint16 [n, codes per image]
        or, where there are several crops, [n, crops, codes per image].

        Raises DataError where the stream was opened without codes.
        """
        if self._codes is None:
            raise DataError(f"{self.dataset}: opened without codes; name the tokenizer, Stream(..., codes=ID)")
        _, ids = self._order.order(np.arange(start, stop, dtype=np.int64))
        shards = np.searchsorted(self._ends, ids, side="right")
        rows = (ids - self._starts[shards]).tolist()
        ranges = [self._codes.place(*place) for place in zip(shards.tolist(), rows, strict=True)]
        return np.frombuffer(b"".join(self._read_ranges(ranges)), "<u2").reshape(-1, *self._codes.shape)

    def locate(self, position: int) -> tuple[int, int, range]:
        """-> epoch and id of the sample at a position, and the ids of its dataset."""
        epochs, ids = order(np.array([position]), self.samples, self.seed, self.geometry)
        return int(epochs[0]), int(ids[0]), range(self.samples)

    def batches(self, start: int, size: int, shard: tuple[int, int] = (0, 1)) -> Iterator[list[Sample]]:
        """Endless global batches of `size` positions from `start`; of each, the share of rank `shard[0]`, by lanes.

        Raises DataError when `size` is not divisible by the world size `shard[1]`.
        """
        while True:
            positions = np.arange(start, start + size, dtype=np.int64)
            yield self.take(share(positions, self.lanes(positions), shard))
            start += size

    def lanes(self, positions: np.ndarray) -> np.ndarray:
        """The lane of the order that reads each position: int64 [n] -> int64 [n]."""
        return lanes_of(positions, self.samples, self.geometry)

    # ------------------------------------------------------------------------------------------- state

    def state(self, position: int) -> dict[str, Any]:
        """What must agree for the stream to go on at `position`, as JSON of less than 1 KB."""
        return {
            "version": STATE_VERSION,
            "order": ORDER,
            "order_version": ORDER_VERSION,
            **dataclasses.asdict(self.geometry),
            "dataset": self.fingerprint,
            "samples": self.samples,
            "seed": self.seed,
            "codes": self.codes,
            "position": position,
        }

    def check(self, state: dict[str, Any]) -> None:
        """Raises DataError with a line for each field in which `state` differs from this stream, the position aside."""
        check_state(state, self.state(0), self.dataset)

    # ----------------------------------------------------------------------------------------- reading

    def _load(self, ids: np.ndarray, epochs: list[int], positions: list[int]) -> list[Sample]:
        version = self._manifest.version
        return [
            Sample(sample_id, epoch, position, *parse_sample(data, place.where, version), codes)
            for sample_id, epoch, position, (place, data, codes) in zip(
                ids.tolist(), epochs, positions, self._read_places(ids), strict=True
            )
        ]

    def _read_places(self, ids: np.ndarray) -> Iterator[tuple["SamplePlace", bytes, Any]]:
        """Place, bytes and codes of the samples with these ids, int64 [n]."""
        places = self._places(ids)
        codes = [None] * len(places) if self._codes is None else self._read_codes(self._codes, places)
        return zip(places, self._read_tars(places), codes, strict=True)

    def _places(self, ids: np.ndarray) -> list["SamplePlace"]:
        """Where the samples with these ids lie, int64 [n]."""
        numbers = np.searchsorted(self._ends, ids, side="right")
        indices = self._indices_of(np.unique(numbers).tolist())
        places = []
        for shard, row in zip(numbers.tolist(), (ids - self._starts[numbers]).tolist(), strict=True):
            name, index = indices[shard]
            start, stop = index.offsets[row : row + 2].tolist()
            expected = None if index.sums is None else int(index.sums[row])
            places.append(SamplePlace(shard, row, self.dataset, (name, start * BLOCK, stop * BLOCK), expected))
        return places

    def _indices_of(self, shards: list[int]) -> dict[int, tuple[str, Index]]:
        """Name and index of each shard; those used last are kept."""
        known = self._indices
        found = {shard: known[shard] for shard in shards if shard in known}
        missing = [shard for shard in shards if shard not in found]
        for at in range(0, len(missing), _OPENED_AT_ONCE):
            found |= self._open_all(missing[at : at + _OPENED_AT_ONCE])
        if len(self._indices) > _INDICES:
            self._indices = dict(found)
        return found

    def _open_all(self, shards: list[int]) -> dict[int, tuple[str, Index]]:
        """Remote ones at once, and each by one thread only: who reads and who reads ahead need the same."""
        if self._cache is None:
            opened = {shard: self._open(shard) for shard in shards}
            self._indices = {**self._indices, **opened}
            return opened
        with self._cache.opening(), ThreadPoolExecutor(CONNECTIONS) as pool:
            known = self._indices
            late = [shard for shard in shards if shard not in known]
            opened = dict(zip(late, pool.map(self._open, late), strict=True))
            self._indices = {**self._indices, **opened}
            return {shard: known.get(shard) or opened[shard] for shard in shards}

    def _open(self, number: int) -> tuple[str, Index]:
        """Name and index of a shard whose tar has the size that the manifest says; of remote ones a GET tells it."""
        shard = self._manifest.shards[number]
        if self._cache is None:
            size, _ = self._storage.stat(shard.name)
            if size != shard.bytes:
                raise DataError(
                    f"{self.dataset}/{shard.name}: {size} bytes, the manifest says {shard.bytes}; the file was cut off "
                    "or replaced, run `tessera data verify` and fetch it again"
                )
        return shard.name, read_index(self._storage, shard)

    def _read_tars(self, places: list["SamplePlace"]) -> Iterator[bytes]:
        """The bytes of each sample, checked."""
        for place, data in zip(places, self._read_ranges([place.range for place in places]), strict=True):
            if place.fits(data):
                yield data
            else:
                yield place.refuse() if self._cache is None else self._again(self._cache, place)

    def _read_ranges(self, ranges: list[ByteRange]) -> Iterable[bytes]:
        """One at a time from a local disk, all at once over a network."""
        if self._cache is not None:
            return self._cache.get_ranges(ranges)
        return (self._storage.get_range(*wanted) for wanted in ranges)

    def _read_codes(self, codes: CodesFile, places: list["SamplePlace"]) -> list[Any]:
        """-> uint16 [codes per image] of each sample, or [crops, codes per image]."""
        ranges = [codes.place(place.shard, place.row) for place in places]
        return [np.frombuffer(data, "<u2").reshape(codes.shape) for data in self._read_ranges(ranges)]

    # ---------------------------------------------------------------------------------------- remote data

    def _open_cache(self) -> BlockCache:
        assert isinstance(self._storage, RemoteStorage)
        cache = BlockCache(self._storage)
        for shard in self._manifest.shards:
            cache.add(shard.name, shard.bytes, shard.digest)
        for name, size, digest in () if self._codes is None else self._codes.files:
            cache.add(name, size, digest)
        return cache

    def _again(self, cache: BlockCache, place: "SamplePlace") -> bytes:
        """What came over a network and did not fit is asked for once more."""
        cache.drop(place.range)
        [data] = cache.get_ranges([place.range])
        return data if place.fits(data) else place.refuse()

    def _look_ahead(self, cache: BlockCache, positions: np.ndarray) -> None:
        """Who reads on finds what comes next on the lanes that it reads: a quarter window at a time, one ahead."""
        last, self._last = self._last, int(positions.max())
        if last is None or int(positions.min()) <= last:
            return
        geometry = self.geometry
        room = cache.limit * self.samples // (8 * sum(shard.bytes for shard in self._manifest.shards))
        window = geometry.lanes_for(self.samples) * geometry.block * geometry.window
        portion = min(max(_PORTION, window // 4), max(1, room))
        current = int(positions.min()) // portion
        if not current <= self._ahead <= current + 2:
            self._ahead = current
        lanes = np.unique(self.lanes(positions))
        while self._ahead <= current + 1:
            first = max(self._ahead * portion, int(positions.min()))
            coming = np.arange(first, (self._ahead + 1) * portion, dtype=np.int64)
            cache.prefetch(partial(self._ranges_at, coming[np.isin(self.lanes(coming), lanes)]))
            self._ahead += 1

    def _ranges_at(self, positions: np.ndarray) -> list[ByteRange]:
        _, ids = order(positions, self.samples, self.seed, self.geometry)
        return [place.range for place in self._places(ids)]


def _keep_freed_memory() -> None:
    """Lets glibc keep up to 32 MB that were freed: else each batch gives its pages back and faults on them anew.

    The trim threshold becomes twice the largest mapped block freed so far, whose pages need not be touched; faults took
    half of the time of reading 30 KB samples. Elsewhere it does nothing.
    """
    bytes(16 << 20)


class SamplePlace(NamedTuple):
    """Where a sample lies. expected: the sum that its index has of its bytes; None in indices before version 2."""

    shard: int
    row: int
    dataset: str
    range: ByteRange
    expected: int | None

    @property
    def where(self) -> str:
        """For people."""
        return f"{self.dataset}/{self.range[0]} sample {self.row}"

    def fits(self, data: bytes) -> bool:
        """Are these the bytes that were indexed?"""
        return self.expected is None or checksum(data) == self.expected

    def refuse(self) -> NoReturn:
        """Raises DataError: they are not."""
        _, start, stop = self.range
        raise DataError(
            f"{self.where}, bytes {start}..{stop}, is not what its index was made of: a flipped bit, another tar or "
            "another index; `tessera data verify` tells which, fetch or build that file again"
        )


def parse_sample(data: bytes, where: str, version: int = NEWEST) -> tuple[str, bytes, tuple[str, ...], dict[str, Any]]:
    """The tar members of one sample -> (key, image, captions, meta).

    version: of the manifest of its dataset. Raises BadSample with the reason of `read_sample` where it cannot be used.
    """
    return _with_own_key(read_contents(data, where, version))


def read_contents(data: bytes, where: str, version: int = NEWEST) -> Contents:
    """The same by the base name of its files, whatever key its .json gives. Raises BadSample."""
    try:
        return read_sample(parse_files(data, where), version)
    except Unreadable as fault:
        raise BadSample(
            f"{where} ({fault.key!r}): {fault.reason}, {fault.detail}; mend the tar and build or index it again",
            fault.key,
            fault.reason,
        ) from None


def _with_own_key(contents: Contents) -> Contents:
    """With the `key` of its .json, where it has one."""
    named = contents.meta.pop("key", None)
    return contents if named is None else contents._replace(key=str(named))
