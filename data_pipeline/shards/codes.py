"""Image codes beside the shards: what an image tokenizer is, and how its codes are stored.

This package knows tokenizers only through `ImageTokenizer`; the command line hands one over from outside.
`NNNNN.vq-ID.bin` holds the codes of shard NNNNN: uint16 little endian [samples, codes per image], nothing else, so
that sample i lies at i * 2 * codes_per_image. `codes.vq-ID.json`, written last, names the tokenizer and the digests.
"""

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np

from data_pipeline.build.images import Reject, decode_rgb, resize
from data_pipeline.errors import DataError
from data_pipeline.shards.manifest import Manifest, canonical_json, publish, read_index, read_manifest
from data_pipeline.shards.tar import BLOCK, parse_files, split_name
from data_pipeline.storage import LocalStorage, Storage, open_storage
from data_pipeline.workers import Counter, ray_session, run_tasks

CHUNK = 64  # images a call of the tokenizer, counted from the start of a shard: bytes do not depend on who encodes

_ID = re.compile(r"[0-9a-f]{12}")


class ImageTokenizer(Protocol):
    """Pixels <-> codes. `id`: 12 hex digits over weights, config, preprocessing and dtype policy."""

    @property
    def id(self) -> str: ...

    @property
    def image_size(self) -> int: ...

    @property
    def codes_per_image(self) -> int: ...

    @property
    def codebook_size(self) -> int: ...

    def encode(self, images: np.ndarray) -> np.ndarray:
        """images: uint8 [B, H, W, 3] -> uint16 [B, codes_per_image]"""
        ...

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """codes: uint16 [B, codes_per_image] -> uint8 [B, H, W, 3]"""
        ...


TokenizerFactory = Callable[[str], ImageTokenizer]

# ---------------------------------------------------------------------------------------------- reading


def meta_name(tokenizer_id: str) -> str:
    """codes.vq-ID.json"""
    return f"codes.vq-{tokenizer_id}.json"


def codes_name(shard_name: str, tokenizer_id: str) -> str:
    """00000.tar -> 00000.vq-ID.bin"""
    return f"{shard_name.removesuffix('.tar')}.vq-{tokenizer_id}.bin"


def tokenizers_of(storage: Storage) -> list[str]:
    """Ids of the tokenizers whose codes are complete."""
    names = (re.fullmatch(r"codes\.vq-([0-9a-f]{12})\.json", name) for name in storage.list())
    return [match.group(1) for match in names if match]


@dataclass
class CodesFile:
    """The codes of a dataset, read by shard and row."""

    storage: Storage
    files: list[tuple[str, int, str]]  # name, bytes, sha256 of each shard's codes
    codes_per_image: int
    codebook_size: int

    def place(self, shard: int, row: int) -> tuple[str, int, int]:
        """-> object, first byte and end of the codes of a sample: uint16 little endian [codes_per_image]"""
        stride = 2 * self.codes_per_image
        return self.files[shard][0], row * stride, (row + 1) * stride

    def read_shard(self, shard: int) -> np.ndarray:
        """-> uint16 [samples of the shard, codes_per_image]"""
        return np.frombuffer(self.storage.get(self.files[shard][0]), "<u2").reshape(-1, self.codes_per_image)


def read_codes(dataset: str | Path, tokenizer_id: str) -> np.ndarray:
    """All codes of a dataset in the order of its sample ids -> uint16 [samples, codes_per_image]."""
    storage = open_storage(dataset)
    manifest = read_manifest(storage)
    codes = open_codes(storage, manifest, tokenizer_id)
    return np.concatenate([codes.read_shard(shard) for shard in range(len(manifest.shards))])


def open_codes(storage: Storage, manifest: Manifest, tokenizer_id: str) -> CodesFile:
    """Raises DataError naming both ids where the codes are missing or another tokenizer's, or of another dataset."""
    if not storage.exists(meta_name(tokenizer_id)):
        there = tokenizers_of(storage)
        raise DataError(
            f"{storage.root}: no codes of tokenizer {tokenizer_id}; there are codes of {', '.join(there) or 'none'}; "
            f"run `tessera data encode {storage.root} --tokenizer DIR` with the tokenizer {tokenizer_id}"
        )
    meta = json.loads(storage.get(meta_name(tokenizer_id)))
    if meta["dataset"] != manifest.fingerprint:
        raise DataError(
            f"{storage.root}/{meta_name(tokenizer_id)}: codes of dataset {meta['dataset'][:12]}, this one is "
            f"{manifest.fingerprint[:12]}; run `tessera data encode` on this one"
        )
    files = [(entry["name"], entry["bytes"], entry["digest"]) for entry in meta["shards"]]
    for (name, size, _), entry in zip(files, manifest.shards, strict=True):
        wanted = 2 * meta["codes_per_image"] * entry.n
        found = storage.stat(name)[0] if isinstance(storage, LocalStorage) else size  # a GET tells it of remote ones
        if not found == size == wanted:
            raise DataError(f"{storage.root}/{name}: {found} bytes instead of {wanted}; delete it and encode again")
    return CodesFile(storage, files, meta["codes_per_image"], meta["codebook_size"])


# --------------------------------------------------------------------------------------------- encoding


def encode_dataset(
    dataset: str | Path,
    factory: TokenizerFactory,
    directory: str | Path,
    workers: int = 1,
    progress: bool = True,
    ray_address: str | None = None,
) -> dict[str, Any]:
    """Add the codes of the tokenizer `factory(directory)` to a dataset, with Ray -> the contents of its .json file.

    Shards that have codes already are left alone; running again finishes what was interrupted.
    Raises DataError where the dataset is missing or an image does not decode.
    """
    storage = open_storage(dataset)
    manifest = read_manifest(storage)
    tokenizer = factory(str(directory))
    _check_tokenizer(tokenizer)
    name = meta_name(tokenizer.id)
    if not storage.exists(name):
        source = (factory, str(Path(directory).absolute()))
        _encode_shards(storage, manifest, tokenizer.id, source, workers, progress, ray_address)
        publish(storage, name, canonical_json(_meta(storage, manifest, tokenizer)))
    meta: dict[str, Any] = json.loads(storage.get(name))
    open_codes(storage, manifest, tokenizer.id)
    return meta


def encode_shard(dataset: str, shard: int, tokenizer: ImageTokenizer) -> int:
    """Encode and publish the codes of one shard -> its number of samples."""
    cv2.setNumThreads(1)
    storage = open_storage(dataset)
    entry = read_manifest(storage).shards[shard]
    offsets = read_index(storage, entry).offsets.tolist()
    parts = [np.empty((0, tokenizer.codes_per_image), np.uint16)]
    for first in range(0, entry.n, CHUNK):
        rows = range(first, min(first + CHUNK, entry.n))
        images = [_pixels(storage, entry.name, offsets[i], offsets[i + 1], tokenizer.image_size) for i in rows]
        codes = np.asarray(tokenizer.encode(np.stack(images)))
        if codes.shape != (len(images), tokenizer.codes_per_image) or codes.dtype != np.uint16:
            raise DataError(
                f"tokenizer {tokenizer.id} gave {codes.dtype} {codes.shape} for {len(images)} images; it states "
                f"uint16 with {tokenizer.codes_per_image} codes an image, export it again"
            )
        parts.append(codes)
    publish(storage, codes_name(entry.name, tokenizer.id), np.concatenate(parts).astype("<u2").tobytes())
    return entry.n


def _encode_shards(
    storage: Storage,
    manifest: Manifest,
    tokenizer_id: str,
    source: tuple[TokenizerFactory, str],
    workers: int,
    progress: bool,
    ray_address: str | None,
) -> None:
    there = set(storage.list())
    missing = [i for i, shard in enumerate(manifest.shards) if codes_name(shard.name, tokenizer_id) not in there]
    with Counter("encode", manifest.samples, progress) as counter:
        counter.add(manifest.samples - sum(manifest.shards[i].n for i in missing))
        if not missing:
            return
        with ray_session(workers, ray_address):
            pool = _Actors(str(storage.root), source, tokenizer_id, min(workers, len(missing)))
            for _, samples in run_tasks(pool.submit, missing, workers):
                counter.add(samples)


class _Encoder:
    """Lives in a Ray actor: loads the tokenizer once, encodes shard after shard."""

    def __init__(self, dataset: str, source: tuple[TokenizerFactory, str], tokenizer_id: str) -> None:
        self._dataset, self._source, self._id = dataset, source, tokenizer_id
        self._tokenizer: ImageTokenizer | None = None

    def encode(self, shard: int) -> int:
        if self._tokenizer is None:  # not in the constructor: Ray reports what is raised there as a lost actor
            self._tokenizer = self._load()
        return encode_shard(self._dataset, shard, self._tokenizer)

    def _load(self) -> ImageTokenizer:
        factory, directory = self._source
        tokenizer = factory(directory)
        if tokenizer.id != self._id:
            raise DataError(
                f"{directory}: tokenizer {tokenizer.id} on this node, {self._id} where the command runs; "
                "the folder must be the same on every node"
            )
        return tokenizer


class _Actors:
    """Encoders taken in turn; Ray starts a lost one again."""

    def __init__(self, dataset: str, source: tuple[TokenizerFactory, str], tokenizer_id: str, count: int) -> None:
        import ray

        actor = ray.remote(_Encoder).options(num_cpus=1, max_restarts=3, max_task_retries=3)
        self._actors: list[Any] = [actor.remote(dataset, source, tokenizer_id) for _ in range(count)]

    def submit(self, shard: int) -> Any:
        """Encode one shard on the actor whose turn it is -> Ray reference."""
        self._actors.append(self._actors.pop(0))
        return self._actors[-1].encode.remote(shard)


def _check_tokenizer(tokenizer: ImageTokenizer) -> None:
    if not _ID.fullmatch(tokenizer.id) or not 1 <= tokenizer.codebook_size <= 65536:
        raise DataError(
            f"tokenizer id={tokenizer.id!r} with {tokenizer.codebook_size} codes: an id is 12 hex digits, codes are at "
            "most 65536; export the tokenizer again"
        )


def _pixels(storage: Storage, name: str, start: int, stop: int, size: int) -> np.ndarray:
    """The image of one sample -> uint8 [size, size, 3], centre crop where it is not square."""
    where = f"{storage.root}/{name}"
    data = storage.get_range(name, start * BLOCK, stop * BLOCK)
    for member, contents in parse_files(data, where):
        if split_name(member)[1] not in ("txt", "json"):
            try:
                return resize(decode_rgb(contents), "center_crop", size)
            except Reject as reject:
                raise DataError(f"{where} {member}: does not decode ({reject}); see `tessera data verify`") from None
    raise DataError(f"{where}: a sample without an image at block {start}; only image datasets have codes")


def _meta(storage: Storage, manifest: Manifest, tokenizer: ImageTokenizer) -> dict[str, Any]:
    names = [codes_name(shard.name, tokenizer.id) for shard in manifest.shards]
    contents = [storage.get(name) for name in names]
    return {
        "version": 1,
        "tokenizer": tokenizer.id,
        "dataset": manifest.fingerprint,
        "image_size": tokenizer.image_size,
        "codes_per_image": tokenizer.codes_per_image,
        "codebook_size": tokenizer.codebook_size,
        "samples": manifest.samples,
        "codes_used": len(np.unique(np.frombuffer(b"".join(contents), "<u2"))),
        "shards": [
            {"name": name, "bytes": len(data), "digest": hashlib.sha256(data).hexdigest()}
            for name, data in zip(names, contents, strict=True)
        ],
    }
