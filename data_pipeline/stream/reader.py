"""Read samples by position directly from the tars: one ranged read per sample, no state but the position."""

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

_INDICES = 4096  # shard indices kept in memory: more than the blocks that the order has open at once
_OPENED_AT_ONCE = 2 * CONNECTIONS  # shards; another thread waits for at most this many
_PORTION = 1024  # least number of positions to read ahead at once


class Stream:
    """A dataset as an endless sequence of samples, the same for every world size: `read` is a function of positions.

    dataset: DATASET, or DATASET@FINGERPRINT for an older version of a dataset that grew.
    codes: id of the image tokenizer whose codes are read with the samples. geometry: how far samples are shuffled.
    Raises DataError for a dataset that is missing, empty or damaged, and for missing codes.
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
            raise DataError(f"{dataset}: 0 samples; build it from a source with samples")
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
        """Return the samples of positions [start, stop), in that order."""
        return self.take(np.arange(start, stop, dtype=np.int64))

    def take(self, positions: np.ndarray) -> list[Sample]:
        """Return the samples of any positions, int64 [n], in the given order."""
        if self._cache is not None and len(positions):
            self._look_ahead(self._cache, positions)
        epochs, ids = self._order.order(positions)
        return self._load(ids, epochs.tolist(), positions.tolist())

    def fetch(self, sample_id: int) -> Sample:
        """Return one sample by its id, 0 <= sample_id < samples."""
        if not 0 <= sample_id < self.samples:
            raise DataError(f"sample id {sample_id}: {self.dataset} has ids 0 to {self.samples - 1}")
        return self._load(np.array([sample_id]), [0], [-1])[0]

    def readable(self, rejected: Counter[str]) -> Iterator[Sample]:
        """Yield the samples with a text or a label in order of id; count the others in `rejected`, by reason."""
        for start, stop in zip(self._starts.tolist(), self._ends.tolist(), strict=True):
            account = Account()
            for sample_id in range(start, stop):
                [(place, data, codes)] = self._read_places(np.array([sample_id]))
                try:
                    contents = read_contents(data, place.where, self._manifest.version)
                except BadSample as fault:
                    account.reject(fault.key, fault.reason)
                    continue
                if account.add(contents):
                    yield sample_of(sample_id, _with_own_key(contents), codes=codes)
            rejected.update(account.rejected)

    def read_codes(self, start: int, stop: int) -> np.ndarray:
        """Return only the codes of positions [start, stop), without reading a tar -> uint16 [n, codes per image]
        or, with several crops, [n, crops, codes per image].

        Raises DataError when the stream was opened without codes.
        """
        if self._codes is None:
            raise DataError(f"{self.dataset}: opened without codes; use Stream(..., codes=TOKENIZER_ID)")
        _, ids = self._order.order(np.arange(start, stop, dtype=np.int64))
        shards = np.searchsorted(self._ends, ids, side="right")
        rows = (ids - self._starts[shards]).tolist()
        ranges = [self._codes.place(*place) for place in zip(shards.tolist(), rows, strict=True)]
        return np.frombuffer(b"".join(self._read_ranges(ranges)), "<u2").reshape(-1, *self._codes.shape)

    def locate(self, position: int) -> tuple[int, int, range]:
        """Return the epoch and id of the sample at a position, and the id range of its dataset."""
        epochs, ids = order(np.array([position]), self.samples, self.seed, self.geometry)
        return int(epochs[0]), int(ids[0]), range(self.samples)

    def batches(self, start: int, size: int, shard: tuple[int, int] = (0, 1)) -> Iterator[list[Sample]]:
        """Yield the share of rank `shard[0]`, by lanes, of endless global batches of `size` positions from `start`.

        Raises DataError when `size` is not divisible by the world size `shard[1]`.
        """
        while True:
            positions = np.arange(start, start + size, dtype=np.int64)
            yield self.take(share(positions, self.lanes(positions), shard))
            start += size

    def lanes(self, positions: np.ndarray) -> np.ndarray:
        """Return the lane of the order that reads each position: int64 [n] -> int64 [n]."""
        return lanes_of(positions, self.samples, self.geometry)

    # ------------------------------------------------------------------------------------------- state

    def state(self, position: int) -> dict[str, Any]:
        """Return what must match to resume the stream at `position`, as JSON of less than 1 KB."""
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
        """Raise DataError with a line for each field in which `state` differs from this stream, except the position."""
        check_state(state, self.state(0), self.dataset)

    # ----------------------------------------------------------------------------------------- reading

    def _load(self, ids: np.ndarray, epochs: list[int], positions: list[int]) -> list[Sample]:
        version = self._manifest.version
        return [
            sample_of(sample_id, parse_sample(data, place.where, version), epoch, position, codes)
            for sample_id, epoch, position, (place, data, codes) in zip(
                ids.tolist(), epochs, positions, self._read_places(ids), strict=True
            )
        ]

    def _read_places(self, ids: np.ndarray) -> Iterator[tuple["SamplePlace", bytes, Any]]:
        """Yield place, bytes and codes of the samples with these ids, int64 [n]."""
        places = self._places(ids)
        codes = [None] * len(places) if self._codes is None else self._read_codes(self._codes, places)
        return zip(places, self._read_tars(places), codes, strict=True)

    def _places(self, ids: np.ndarray) -> list["SamplePlace"]:
        """Return the places of the samples with these ids, int64 [n]."""
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
        """Return the name and index of each shard; those used last are kept."""
        known = self._indices
        found = {shard: known[shard] for shard in shards if shard in known}
        missing = [shard for shard in shards if shard not in found]
        for at in range(0, len(missing), _OPENED_AT_ONCE):
            found |= self._open_all(missing[at : at + _OPENED_AT_ONCE])
        if len(self._indices) > _INDICES:
            self._indices = dict(found)
        return found

    def _open_all(self, shards: list[int]) -> dict[int, tuple[str, Index]]:
        """Open remote shards concurrently, each by one thread only: reading and read-ahead need the same ones."""
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
        """Return the name and index of a shard, after checking the size of a local tar; a GET checks a remote one."""
        shard = self._manifest.shards[number]
        if self._cache is None:
            size, _ = self._storage.stat(shard.name)
            if size != shard.bytes:
                raise DataError(
                    f"{self.dataset}/{shard.name}: {size} bytes, the manifest has {shard.bytes}; it was truncated "
                    "or replaced, run `tessera data verify` and download it again"
                )
        return shard.name, read_index(self._storage, shard)

    def _read_tars(self, places: list["SamplePlace"]) -> Iterator[bytes]:
        """Yield the bytes of each sample, checked against its index."""
        for place, data in zip(places, self._read_ranges([place.range for place in places]), strict=True):
            if place.fits(data):
                yield data
            else:
                yield place.refuse() if self._cache is None else self._again(self._cache, place)

    def _read_ranges(self, ranges: list[ByteRange]) -> Iterable[bytes]:
        """Read ranges one at a time from a local disk, all at once over a network."""
        if self._cache is not None:
            return self._cache.get_ranges(ranges)
        return (self._storage.get_range(*wanted) for wanted in ranges)

    def _read_codes(self, codes: CodesFile, places: list["SamplePlace"]) -> list[Any]:
        """Return the codes of each sample, uint16 [codes per image] or [crops, codes per image]."""
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
        """Fetch a sample once more after its bytes from the network did not match its index."""
        cache.drop(place.range)
        [data] = cache.get_ranges([place.range])
        return data if place.fits(data) else place.refuse()

    def _look_ahead(self, cache: BlockCache, positions: np.ndarray) -> None:
        """Prefetch the lanes of a sequential reader: a quarter window at a time, one quarter ahead of it."""
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
    """Let glibc keep up to 32 MB of freed memory: otherwise each batch returns its pages and faults them in again.

    The trim threshold becomes twice the largest mapped block freed so far, whose pages need not be touched. Page faults
    took half of the time of reading 30 KB samples. Has no effect without glibc.
    """
    bytes(16 << 20)


class SamplePlace(NamedTuple):
    """Location of a sample. expected: checksum of its bytes in the index; None for indices before version 2."""

    shard: int
    row: int
    dataset: str
    range: ByteRange
    expected: int | None

    @property
    def where(self) -> str:
        """Description of the place for error messages."""
        return f"{self.dataset}/{self.range[0]} sample {self.row}"

    def fits(self, data: bytes) -> bool:
        """Return whether these are the bytes that were indexed."""
        return self.expected is None or checksum(data) == self.expected

    def refuse(self) -> NoReturn:
        """Raise DataError: the bytes are not those that were indexed."""
        _, start, stop = self.range
        raise DataError(
            f"{self.where}, bytes {start}..{stop}, does not match its index: a flipped bit, another tar or "
            "another index; find the file with `tessera data verify`, then download or build it again"
        )


def sample_of(
    sample_id: int, contents: Contents, epoch: int = 0, position: int = -1, codes: np.ndarray | None = None
) -> Sample:
    """Return the sample with these contents, as it was read for a position or, by default, fetched by its id."""
    key, image, texts, label, meta = contents
    return Sample(sample_id, epoch, position, key, image=image, texts=texts, label=label, codes=codes, meta=meta)


def parse_sample(data: bytes, where: str, version: int = NEWEST) -> Contents:
    """Parse the tar members of one sample; its key is the `key` of its .json, else the base name of its files.

    version: of its dataset's manifest. Raises BadSample, with the reason of `read_sample`, when it cannot be used.
    """
    return _with_own_key(read_contents(data, where, version))


def read_contents(data: bytes, where: str, version: int = NEWEST) -> Contents:
    """Parse a sample as `parse_sample` does, but with the base name of its files as key. Raises BadSample."""
    try:
        return read_sample(parse_files(data, where), version)
    except Unreadable as fault:
        raise BadSample(
            f"{where} ({fault.key!r}): {fault.reason}, {fault.detail}; correct the tar and build or index it again",
            fault.key,
            fault.reason,
        ) from None


def _with_own_key(contents: Contents) -> Contents:
    """Replace the key by the `key` of the .json, if it has one."""
    named = contents.meta.pop("key", None)
    return contents if named is None else contents._replace(key=str(named))
