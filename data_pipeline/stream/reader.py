"""Positions -> samples, straight from the tars: one ranged read a sample, no state but the position."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.errors import BadSample, DataError
from data_pipeline.schema import Sample
from data_pipeline.shards.codes import CodesFile, open_codes
from data_pipeline.shards.manifest import Manifest, Shard, read_index, read_manifest
from data_pipeline.shards.tar import BLOCK, parse_files, split_name
from data_pipeline.storage import open_storage
from data_pipeline.stream.order import DEFAULT, ORDER, ORDER_VERSION, Geometry, lanes_of, order, share
from data_pipeline.stream.state import check_state

STATE_VERSION = 1

_IMAGES = frozenset(("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif"))


class Stream:
    """A dataset as an endless sequence of samples, the same for every world size: `read` is a function of positions.

    codes: id of the image tokenizer whose codes come along with the samples. geometry: how far samples are shuffled.
    Raises DataError for a dataset that is missing, empty or damaged, and for codes that are not there.
    """

    def __init__(self, dataset: str | Path, seed: int, codes: str | None = None, geometry: Geometry = DEFAULT) -> None:
        self.dataset = str(dataset)
        self.seed = seed
        self.codes = codes
        self.geometry = geometry
        self._storage = open_storage(dataset)
        self._manifest: Manifest = read_manifest(self._storage)
        self.samples: int = self._manifest.samples
        self.fingerprint: str = self._manifest.fingerprint
        if not self.samples:
            raise DataError(f"{dataset}: 0 samples; build it from a source that has some")
        counts = [shard.n for shard in self._manifest.shards]
        self._ends = np.cumsum(counts, dtype=np.int64)
        self._offsets: dict[int, list[int]] = {}
        self._codes: CodesFile | None = None if codes is None else open_codes(self._storage, self._manifest, codes)

    def read(self, start: int, stop: int) -> list[Sample]:
        """The samples of positions [start, stop), in that order."""
        return self.take(np.arange(start, stop, dtype=np.int64))

    def take(self, positions: np.ndarray) -> list[Sample]:
        """The samples of any positions, int64 [n], in the order given."""
        epochs, ids = order(positions, self.samples, self.seed, self.geometry)
        return self._load(ids, epochs.tolist(), positions.tolist())

    def fetch(self, sample_id: int) -> Sample:
        """One sample by its id, 0 <= sample_id < samples."""
        if not 0 <= sample_id < self.samples:
            raise DataError(f"sample id {sample_id}: {self.dataset} has ids 0 to {self.samples - 1}")
        return self._load(np.array([sample_id]), [0], [-1])[0]

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
        shards = np.searchsorted(self._ends, ids, side="right")
        starts = np.concatenate([[0], self._ends])[shards]
        rows = (ids - starts).tolist()
        return [
            self._sample(*place) for place in zip(ids.tolist(), epochs, positions, shards.tolist(), rows, strict=True)
        ]

    def _sample(self, sample_id: int, epoch: int, position: int, shard: int, row: int) -> Sample:
        offsets = self._offsets.get(shard)
        if offsets is None:
            offsets = self._offsets[shard] = self._open(self._manifest.shards[shard])
        name = self._manifest.shards[shard].name
        data = self._storage.get_range(name, offsets[row] * BLOCK, offsets[row + 1] * BLOCK)
        codes = None if self._codes is None else self._codes.read(shard, row)
        key, image, captions, meta = parse_sample(data, f"{self.dataset}/{name} sample {row}")
        return Sample(sample_id, epoch, position, key, image, captions, meta, codes)

    def _open(self, shard: Shard) -> list[int]:
        """The offsets of a shard, once its tar has the size that the manifest says."""
        size, _ = self._storage.stat(shard.name)
        if size != shard.bytes:
            raise DataError(
                f"{self.dataset}/{shard.name}: {size} bytes, the manifest says {shard.bytes}; the file was cut off or "
                "replaced, run `tessera data verify` and fetch it again"
            )
        return read_index(self._storage, shard).offsets.tolist()


def parse_sample(data: bytes, where: str) -> tuple[str, bytes, tuple[str, ...], dict[str, Any]]:
    """The tar members of one sample -> (key, image, captions, meta).

    Raises BadSample where there is no image, or text that is not UTF-8 or JSON.
    """
    image: bytes | None = None
    text: bytes | None = None
    tree: dict[str, Any] = {}
    key = ""
    for name, contents in parse_files(data, where):
        key, extension = split_name(name)
        if extension == "json":
            tree = parse_json(contents, f"{where} ({name!r})")
        elif extension == "txt":
            text = contents
        elif image is None and extension in _IMAGES:
            image = contents
    if image is None:
        raise BadSample(f"{where} ({key!r}): no image among its files; only tars of image-text samples can be read")
    captions = tree.pop("captions", None)
    if captions is None:
        alone = [tree["caption"]] if tree.get("caption") else []
        captions = alone if text is None else [parse_text(text, f"{where} ({key!r})")]
    return str(tree.pop("key", key)), image, tuple(captions), tree


def parse_text(contents: bytes, where: str) -> str:
    """The text in a .txt file; raises BadSample where it is not UTF-8."""
    try:
        return contents.decode()
    except UnicodeDecodeError as error:
        raise BadSample(f"{where}: text that is not UTF-8 ({error}); build the dataset again") from None


def parse_json(contents: bytes, where: str) -> dict[str, Any]:
    """The object in a .json file; raises BadSample where it is something else."""
    try:
        tree = json.loads(contents)
    except ValueError as error:
        raise BadSample(f"{where}: not JSON ({error}); build the dataset again") from None
    if not isinstance(tree, dict):
        raise BadSample(f"{where}: holds {type(tree).__name__}, not an object; build the dataset again")
    return tree
