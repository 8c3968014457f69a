"""Image codes as side-cars of the shards: the interface of an image tokenizer, and the storage of its codes.

This package knows tokenizers only through `ImageTokenizer`; the command line passes one in.
`NNNNN.vq-ID.bin` holds the codes of shard NNNNN: uint16 little endian [samples, crops, codes per image], nothing else,
so crop c of sample i begins at byte (i * crops + c) * 2 * codes_per_image. `codes.vq-ID.json`, written last, names the
tokenizer, the crops, the digests and the fingerprint of the dataset. When the dataset grows, existing codes stay, the
new shards get theirs, and the previous .json is kept as `codes.vq-ID-FINGERPRINT.json`.

One crop is the centre square. For ten, the image is scaled so that its centre square has CROP_RANGE times the
tokenizer's side; crops 0 to 4 are upper left, upper right, lower left, lower right and centre of that square, crop
5 + c is crop c mirrored (ten-crop as in LlamaGen, Sun et al. 2024, arXiv:2406.06525).
"""

import contextlib
import hashlib
import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NotRequired, Protocol

import cv2
import numpy as np
from pydantic import Field, with_config
from typing_extensions import TypedDict

from data_pipeline import gate
from data_pipeline.errors import ConfigError, DataError
from data_pipeline.images import MAX_PIXELS, Reject, decode_rgb, resize
from data_pipeline.shards.manifest import (
    Manifest,
    Shard,
    canonical_json,
    open_dataset,
    publish,
    read_index,
    read_manifest,
    read_version,
)
from data_pipeline.shards.samples import image_of
from data_pipeline.shards.tar import BLOCK, parse_files
from data_pipeline.storage import LocalStorage, Storage, open_storage
from data_pipeline.workers import Counter, ray_session, run_tasks

CHUNK = 64  # images per call of the tokenizer, counted from the start of a shard: bytes do not depend on the worker
CROPS = (1, 10)
CROP_RANGE = 1.1
CENTRE = 4  # index of the centre among ten crops
DECODE_S = 60.0  # processor time that an image may take

_ID = re.compile(r"[0-9a-f]{12}")


class ImageTokenizer(Protocol):
    """Maps pixels to codes and back. `id`: 12 hex digits of a hash of weights, config, preprocessing, dtype policy."""

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


def meta_name(tokenizer_id: str, fingerprint: str = "") -> str:
    """Return codes.vq-ID.json, or codes.vq-ID-FINGERPRINT.json for an older version of the dataset."""
    return f"codes.vq-{tokenizer_id}{'-' * bool(fingerprint)}{fingerprint[:12]}.json"


def codes_name(shard_name: str, tokenizer_id: str) -> str:
    """00000.tar -> 00000.vq-ID.bin"""
    return f"{shard_name.removesuffix('.tar')}.vq-{tokenizer_id}.bin"


def tokenizers_of(storage: Storage, manifest: Manifest | None = None) -> list[str]:
    """Return the ids of tokenizers whose codes are complete: for this version of the dataset, or for any."""
    names = (re.fullmatch(r"codes\.vq-([0-9a-f]{12})\.json", name) for name in storage.list())
    ids = [match.group(1) for match in names if match]
    return ids if manifest is None else [one for one in ids if find_meta(storage, manifest, one) is not None]


def find_meta(storage: Storage, manifest: Manifest, tokenizer_id: str) -> dict[str, Any] | None:
    """Return the metadata of a tokenizer's codes for this version of the dataset; None when there is none."""
    for name in (meta_name(tokenizer_id), meta_name(tokenizer_id, manifest.fingerprint)):
        meta = read_meta(storage, name)
        if meta is not None and meta["dataset"] == manifest.fingerprint:
            return meta
    return None


@with_config(gate.CLOSED)
class _Codes(TypedDict):
    """Entry of one shard's codes."""

    name: gate.FileName
    bytes: gate.Count
    digest: gate.Sha256


@with_config(gate.OPEN)
class _CodesFile(TypedDict):
    """Contents of codes.vq-ID.json."""

    tokenizer: gate.TokenizerId
    dataset: NotRequired[gate.Sha256]  # like `crops`, absent from files older than growing datasets
    crops: NotRequired[int]
    codes_per_image: Annotated[int, Field(ge=1, le=2**20)]
    codebook_size: Annotated[int, Field(ge=1, le=2**16)]
    shards: list[_Codes]


def read_meta(storage: Storage, name: str) -> dict[str, Any] | None:
    """Read and check a codes.vq-ID.json; None when there is none. Raises DataError for another kind of file."""
    if not storage.exists(name):
        return None
    return parse_meta(storage.get(name), f"{storage.root}/{name}")


def parse_meta(data: bytes, where: str) -> dict[str, Any]:
    """Parse the bytes of a codes.vq-ID.json. Raises DataError when they are something else."""
    meta = gate.parse(_CodesFile, data, where, "remove the codes of this tokenizer and encode again")
    if meta.setdefault("crops", 1) not in CROPS:
        raise DataError(f"{where}: crops={meta['crops']}: must be 1 or 10; encode again")
    return {"dataset": "", **meta}


@dataclass
class CodesFile:
    """The codes of a dataset, read by shard and row."""

    storage: Storage
    files: list[tuple[str, int, str]]  # name, bytes, sha256 of each shard's codes
    codes_per_image: int
    codebook_size: int
    crops: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of a sample's codes: [codes per image], or [crops, codes per image] with several crops."""
        return (self.codes_per_image,) if self.crops == 1 else (self.crops, self.codes_per_image)

    def place(self, shard: int, row: int) -> tuple[str, int, int]:
        """Return object, first byte and end of the codes of a sample: uint16 little endian, `shape`."""
        stride = 2 * self.crops * self.codes_per_image
        return self.files[shard][0], row * stride, (row + 1) * stride

    def read_shard(self, shard: int) -> np.ndarray:
        """Read the codes of a shard -> uint16 [samples of the shard, *shape]."""
        return np.frombuffer(self.storage.get(self.files[shard][0]), "<u2").reshape(-1, *self.shape)


def read_codes(dataset: str | Path, tokenizer_id: str) -> np.ndarray:
    """Read all codes of a dataset in order of sample id -> uint16 [samples, codes_per_image].

    With several crops: [samples, crops, codes_per_image].
    """
    storage, manifest = open_dataset(dataset)
    codes = open_codes(storage, manifest, tokenizer_id)
    return np.concatenate([codes.read_shard(shard) for shard in range(len(manifest.shards))])


def open_codes(storage: Storage, manifest: Manifest, tokenizer_id: str) -> CodesFile:
    """Open a tokenizer's codes. Raises DataError naming both ids if they are missing or of other data or tokenizers."""
    meta = find_meta(storage, manifest, tokenizer_id)
    if meta is None:
        other = read_meta(storage, meta_name(tokenizer_id))
        if other is not None:
            raise DataError(
                f"{storage.root}/{meta_name(tokenizer_id)}: codes of dataset {other['dataset'][:12]}, this dataset is "
                f"{manifest.fingerprint[:12]}; run `tessera data encode` on it"
            )
        there = tokenizers_of(storage)
        raise DataError(
            f"{storage.root}: no codes of tokenizer {tokenizer_id}; available are {', '.join(there) or 'none'}; "
            f"run `tessera data encode {storage.root} --image-tokenizer DIR` with the tokenizer {tokenizer_id}"
        )
    codes = CodesFile(storage, _files(meta), meta["codes_per_image"], meta["codebook_size"], meta["crops"])
    names = [codes_name(shard.name, tokenizer_id) for shard in manifest.shards]
    if meta["tokenizer"] != tokenizer_id or [name for name, *_ in codes.files] != names:
        raise DataError(
            f"{storage.root}/{meta_name(tokenizer_id)}: must list one NAME.vq-{tokenizer_id}.bin for each "
            f"of {len(names)} shards; remove the codes of this tokenizer and encode again"
        )
    for number, ((name, size, _), entry) in enumerate(zip(codes.files, manifest.shards, strict=True)):
        wanted = codes.place(number, entry.n)[1]
        found = storage.stat(name)[0] if isinstance(storage, LocalStorage) else size  # a GET checks remote ones
        if not found == size == wanted:
            raise DataError(f"{storage.root}/{name}: {found} bytes instead of {wanted}; delete it and encode again")
    return codes


def _files(meta: dict[str, Any]) -> list[tuple[str, int, str]]:
    return [(entry["name"], entry["bytes"], entry["digest"]) for entry in meta["shards"]]


# --------------------------------------------------------------------------------------------- encoding


def encode_dataset(
    dataset: str | Path,
    factory: TokenizerFactory,
    directory: str | Path,
    workers: int = 1,
    progress: bool = True,
    ray_address: str | None = None,
    crops: int = 1,
    gpus: int = 0,
) -> dict[str, Any]:
    """Add the codes of the tokenizer `factory(directory)` to a dataset, with Ray -> the contents of its .json file.

    Shards that have codes are skipped, so another run completes an interrupted one, or a dataset that grew.
    crops: 1 or 10 per image. gpus: per worker.
    Raises DataError when the dataset is missing, an image does not decode, or codes with other crops exist.
    """
    if crops not in CROPS:
        raise ConfigError(f"crops={crops}: use 1 or 10")
    storage, manifest = open_dataset(dataset)
    tokenizer = factory(str(directory))
    _check_tokenizer(tokenizer)
    _check_crops(storage, tokenizer.id, crops)
    meta = find_meta(storage, manifest, tokenizer.id)
    if meta is None:
        root = str(storage.root)  # absolute: workers on a cluster start in other folders
        root = root if "://" in root else str(Path(root).absolute())
        job = Job(root, factory, str(Path(directory).absolute()), tokenizer.id, crops)
        _encode_shards(job, manifest, workers, progress, ray_address, gpus)
        meta = _meta(storage, manifest, tokenizer, crops)
        _publish_meta(storage, manifest, meta)
    open_codes(storage, manifest, tokenizer.id)
    return meta


def encode_shard(dataset: str, shard: int, tokenizer: ImageTokenizer, crops: int = 1) -> int:
    """Encode and publish the codes of one shard -> its number of samples."""
    storage = open_storage(dataset)
    entry = read_manifest(storage).shards[shard]
    codes = encode_rows(storage, entry, range(entry.n), tokenizer, crops)
    publish(storage, codes_name(entry.name, tokenizer.id), codes.astype("<u2").tobytes())
    return entry.n


def encode_rows(
    storage: Storage, shard: Shard, rows: Sequence[int], tokenizer: ImageTokenizer, crops: int = 1
) -> np.ndarray:
    """Encode some rows of a shard -> uint16 [rows, crops, codes per image]."""
    cv2.setNumThreads(1)
    offsets = read_index(storage, shard).offsets.tolist()
    size, at_once = tokenizer.image_size, max(1, CHUNK // crops)
    parts = [np.empty((0, crops, tokenizer.codes_per_image), np.uint16)]
    for first in range(0, len(rows), at_once):
        some = rows[first : first + at_once]
        images = [_crops(storage, shard.name, (offsets[i], offsets[i + 1]), size, crops) for i in some]
        codes = np.asarray(tokenizer.encode(np.concatenate(images)))
        _check_codes(codes, crops * len(images), tokenizer)
        parts.append(codes.reshape(len(images), crops, -1))
    return np.concatenate(parts)


def crops_of(image: np.ndarray, size: int, crops: int) -> np.ndarray:
    """Crop uint8 [H, W, 3] -> uint8 [crops, size, size, 3], as the module docstring describes."""
    if crops == 1:
        return resize(image, "center_crop", size)[None]
    side = round(CROP_RANGE * size)
    square = resize(image, "center_crop", side)
    far, middle = side - size, (side - size) // 2
    corners = [(0, 0), (0, far), (far, 0), (far, far), (middle, middle)]
    plain = np.stack([square[top : top + size, left : left + size] for top, left in corners])
    return np.concatenate([plain, plain[:, :, ::-1]])


@dataclass(frozen=True)
class Job:
    """Arguments of every encoder."""

    dataset: str
    factory: TokenizerFactory
    directory: str
    tokenizer_id: str
    crops: int


def _encode_shards(
    job: Job, manifest: Manifest, workers: int, progress: bool, ray_address: str | None, gpus: int
) -> None:
    there = set(open_storage(job.dataset).list())
    missing = [i for i, shard in enumerate(manifest.shards) if codes_name(shard.name, job.tokenizer_id) not in there]
    before = manifest.samples - sum(manifest.shards[i].n for i in missing)
    with Counter("encode", manifest.samples, progress, before) as counter:
        if not missing:
            return
        with ray_session(workers, ray_address, gpus * workers):
            pool = _Actors(job, min(workers, len(missing)), gpus)
            for _, samples in run_tasks(pool.submit, missing, workers, gpus=gpus, examine=partial(blame_image, job)):
                counter.add(samples)


class _Encoder:
    """Ray actor that loads the tokenizer once and encodes shard after shard."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._tokenizer: ImageTokenizer | None = None

    def encode(self, shard: int) -> int:
        if self._tokenizer is None:  # not in the constructor: Ray reports what is raised there as a lost actor
            self._tokenizer = self._load()
        return encode_shard(self._job.dataset, shard, self._tokenizer, self._job.crops)

    def _load(self) -> ImageTokenizer:
        tokenizer = self._job.factory(self._job.directory)
        if tokenizer.id != self._job.tokenizer_id:
            raise DataError(
                f"{self._job.directory}: tokenizer {tokenizer.id} on this node, {self._job.tokenizer_id} on the "
                "driver's node; the folder must be the same on every node"
            )
        return tokenizer


class _Actors:
    """Encoders used round-robin; Ray restarts a lost one."""

    def __init__(self, job: Job, count: int, gpus: int) -> None:
        import ray

        actor = ray.remote(_Encoder).options(num_cpus=1, num_gpus=gpus, max_restarts=3, max_task_retries=3)
        self._actors: list[Any] = [actor.remote(job) for _ in range(count)]

    def submit(self, shard: int) -> Any:
        """Encode one shard on the next actor -> Ray reference."""
        self._actors.append(self._actors.pop(0))
        return self._actors[-1].encode.remote(shard)


def _check_codes(codes: np.ndarray, images: int, tokenizer: ImageTokenizer) -> None:
    shape, most = (images, tokenizer.codes_per_image), tokenizer.codebook_size - 1
    if codes.shape != shape or codes.dtype != np.uint16 or codes.max(initial=0) > most:
        raise DataError(
            f"tokenizer {tokenizer.id} gave {codes.dtype} {codes.shape} up to {codes.max(initial=0)} for {images} "
            f"images; expected uint16 {shape} up to {most}, export it again"
        )


def _check_crops(storage: Storage, tokenizer_id: str, crops: int) -> None:
    meta = read_meta(storage, meta_name(tokenizer_id))
    if meta is not None and meta["crops"] != crops:
        raise DataError(
            f"{storage.root}/{meta_name(tokenizer_id)}: has {meta['crops']} crops per image, requested {crops}; "
            f"encode with --crops {meta['crops']}, or remove these codes (*.vq-{tokenizer_id}*) first"
        )


def _check_tokenizer(tokenizer: ImageTokenizer) -> None:
    if not _ID.fullmatch(tokenizer.id) or not 1 <= tokenizer.codebook_size <= 65536:
        raise DataError(
            f"tokenizer id={tokenizer.id!r} with {tokenizer.codebook_size} codes: an id is 12 hex digits, codes at "
            "most 65536; export the tokenizer again"
        )


def blame_image(job: Job, shard: int) -> None:
    """Raise DataError naming a lethal image of this shard (it ends the process that decodes it), if there is one."""
    from data_pipeline.config import ImageRules  # imported late: readers of codes decode nothing
    from data_pipeline.sandbox import LETHAL, SandboxDecoder

    storage = open_storage(job.dataset)
    entry = read_manifest(storage).shards[shard]
    offsets = read_index(storage, entry).offsets.tolist()
    with contextlib.closing(SandboxDecoder(ImageRules(max_pixels=MAX_PIXELS), stored=False, cpu_s=DECODE_S)) as decoder:
        for blocks in itertools.pairwise(offsets):
            where, contents = _image(storage, entry.name, blocks)
            try:
                decoder.look(contents)
            except Reject as reject:
                if reject.reason in LETHAL:
                    raise DataError(f"{where}: crashes the decoder ({reject}); remove it") from None


def _crops(storage: Storage, name: str, blocks: tuple[int, int], size: int, crops: int) -> np.ndarray:
    """Return the crops of the image of the sample in these blocks of a tar, uint8 [crops, size, size, 3]."""
    where, contents = _image(storage, name, blocks)
    try:
        return crops_of(decode_rgb(contents), size, crops)
    except Reject as reject:
        raise DataError(f"{where}: cannot be decoded ({reject}); see `tessera data verify`") from None


def _image(storage: Storage, name: str, blocks: tuple[int, int]) -> tuple[str, bytes]:
    """Return the name, for messages, and the contents of the image of the sample in these blocks of a tar."""
    where = f"{storage.root}/{name}"
    data = storage.get_range(name, blocks[0] * BLOCK, blocks[1] * BLOCK)
    found = image_of(parse_files(data, where))
    if found is None:
        raise DataError(f"{where}: a sample without an image at block {blocks[0]}; only image datasets have codes")
    return f"{where} {found[0]}", found[1]


def _meta(storage: Storage, manifest: Manifest, tokenizer: ImageTokenizer, crops: int) -> dict[str, Any]:
    used = np.zeros(tokenizer.codebook_size, bool)
    shards = []
    for shard in manifest.shards:
        name = codes_name(shard.name, tokenizer.id)
        data = storage.get(name)
        wanted = 2 * crops * tokenizer.codes_per_image * shard.n
        if len(data) != wanted:
            raise DataError(f"{storage.root}/{name}: {len(data)} bytes instead of {wanted}; delete it and encode again")
        used[np.frombuffer(data, "<u2")] = True
        shards.append({"name": name, "bytes": len(data), "digest": hashlib.sha256(data).hexdigest()})
    return {
        "version": 1,
        "tokenizer": tokenizer.id,
        "dataset": manifest.fingerprint,
        "image_size": tokenizer.image_size,
        "codes_per_image": tokenizer.codes_per_image,
        "codebook_size": tokenizer.codebook_size,
        "crops": crops,
        "samples": manifest.samples,
        "codes_used": int(used.sum()),
        "shards": shards,
    }


def _publish_meta(storage: Storage, manifest: Manifest, meta: dict[str, Any]) -> None:
    """Write codes.vq-ID.json for the newest version, and keep the previous one under its version's name."""
    newest, data = meta_name(meta["tokenizer"]), canonical_json(meta)
    before = read_meta(storage, newest)
    if read_manifest(storage).fingerprint != manifest.fingerprint:
        publish(storage, meta_name(meta["tokenizer"], manifest.fingerprint), data)
    elif before is None:
        publish(storage, newest, data)
    elif before["dataset"] != manifest.fingerprint:
        read_version(storage, before["dataset"])  # raises if they are codes of another dataset
        publish(storage, meta_name(meta["tokenizer"], before["dataset"]), storage.get(newest))
        storage.replace(newest, data)
