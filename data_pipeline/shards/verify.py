"""Verify a dataset against its manifest, and index tars made elsewhere as a dataset."""

import hashlib
import multiprocessing
import operator
import os
from collections import Counter as Tally
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline import gate
from data_pipeline.errors import DataError
from data_pipeline.patterns import expand_braces, is_remote
from data_pipeline.shards.codes import (
    ImageTokenizer,
    encode_rows,
    find_meta,
    meta_name,
    open_codes,
    read_meta,
    tokenizers_of,
)
from data_pipeline.shards.manifest import (
    MANIFEST,
    STATS,
    VERSION,
    Manifest,
    Shard,
    ShardStats,
    Totals,
    index_tar,
    older_manifest,
    older_versions,
    open_dataset,
    publish,
    publish_index,
    read_index,
    read_manifest,
    read_shard_stats,
    read_totals,
    read_version,
)
from data_pipeline.shards.samples import Account, Unreadable, read_alike, read_sample
from data_pipeline.shards.tar import NEWEST, NotAFile, parse_files, refuse_compressed
from data_pipeline.storage import Storage, open_storage


def verify(
    dataset: str | Path,
    tokenizer: ImageTokenizer | None = None,
    sample: int = 16,
    min_agreement: float = 0.95,
    seed: int = 0,
) -> dict[str, Any]:
    """Check size and digest of every shard, its index against its headers, the row counts, the codes, older versions.

    tokenizer: encodes `sample` images of every shard again, drawn by `seed` and the shard's number, and compares; a
    shard in which a share below `min_agreement` of the codes is the same is a fault.
    -> {dataset, fingerprint, samples, shards, codes: [tokenizer ids], versions: [older fingerprints]}, with a tokenizer
    also `agreement`. Raises DataError listing every fault, or when there are no codes of that tokenizer.
    """
    storage, manifest = open_dataset(dataset)
    again = None if tokenizer is None else Agreement(storage, manifest, tokenizer, sample, seed)
    faults: list[str] = []
    for number, shard in enumerate(manifest.shards):
        before = len(faults)
        _note(faults, _check_shard, storage, shard, manifest.version)
        if again is not None and len(faults) == before:
            _note(faults, again.check, number, min_agreement)
    if storage.exists(STATS):
        _note(faults, _check_accounting, storage, manifest)
    for tokenizer_id in tokenizers_of(storage):
        _note(faults, _check_codes, storage, manifest, tokenizer_id)
    for version in older_versions(storage):
        _note(faults, _check_version, storage, version)
    if faults:
        raise DataError(
            f"{storage.root}: {len(faults)} faults; download or build these files again\n  " + "\n  ".join(faults)
        )
    return {
        "dataset": storage.root,
        "fingerprint": manifest.fingerprint,
        "samples": manifest.samples,
        "shards": len(manifest.shards),
        "codes": tokenizers_of(storage, manifest),
        "versions": older_versions(storage),
        **({} if again is None else {"agreement": again.summary()}),
    }


class Agreement:
    """Share of codes that come out the same when a sample of each shard is encoded again."""

    def __init__(self, storage: Storage, manifest: Manifest, tokenizer: ImageTokenizer, sample: int, seed: int) -> None:
        self._codes = open_codes(storage, manifest, tokenizer.id)
        self._storage, self._manifest, self._tokenizer = storage, manifest, tokenizer
        self._sample, self._seed = sample, seed
        self.shares: dict[str, float] = {}
        self.samples = 0

    def check(self, number: int, least: float) -> None:
        """Check one shard. Raises DataError when a share below `least` agrees."""
        shard = self._manifest.shards[number]
        if not shard.n:
            return
        rows = sampled_rows(shard.n, self._sample, self._seed, number)
        again = encode_rows(self._storage, shard, rows, self._tokenizer, self._codes.crops)
        stored = self._codes.read_shard(number)[rows].reshape(again.shape)
        self.shares[shard.name] = share = float(np.mean(again == stored))
        self.samples += len(rows)
        if share < least:
            raise DataError(
                f"{self._storage.root}/{self._codes.files[number][0]}: {share:.4f} of the codes of {len(rows)} images "
                f"match tokenizer {self._tokenizer.id}, at least {least} must; they were encoded with "
                "other weights or hardware; remove this tokenizer's codes and encode again"
            )

    def summary(self) -> dict[str, Any]:
        """Return the mean over the shards, and the worst shard."""
        worst = min(self.shares, key=lambda name: self.shares[name], default="")
        mean = float(np.mean(list(self.shares.values()))) if self.shares else 1.0
        found = {"tokenizer": self._tokenizer.id, "samples": self.samples, "mean": mean}
        return {**found, "lowest": self.shares.get(worst, 1.0), "lowest_shard": worst}


def sampled_rows(count: int, wanted: int, seed: int, shard: int) -> list[int]:
    """Draw `wanted` different rows of a shard's `count` (all if it has no more), by seed and shard; sorted."""
    drawn = np.random.default_rng((seed, shard)).permutation(count)[:wanted]
    return sorted(drawn.tolist())


def index(tars: list[str], workers: int | None = None) -> dict[str, Any]:
    """Index tars made elsewhere: an .idx beside each, one manifest.json in their folder; the tars are not changed.

    tars: files or folders, local or s3://, with {00000..00099} and `::`. workers: processes, by default one per CPU.
    Samples are counted by whether they can be read: samples = readable + the sum of rejected. Rejected ones keep their
    ids, and raise BadSample when they are read. A folder that was indexed before keeps its manifest version; others get
    the lowest version whose rules read all their samples as the newest rules do, 1 for those of a build.
    -> {dataset, fingerprint, samples, shards, readable, rejected: {reason: count}}. Raises DataError for tars in
    several folders, for tars that are cut off, damaged or compressed, and for tars without any readable sample.
    """
    storage, names = _tars(tars)
    before = read_manifest(storage).version if storage.exists(MANIFEST) else None
    version = before or NEWEST
    tasks = [(storage.root, name, version) for name in names]
    workers = min(workers or os.cpu_count() or 1, len(tasks))
    if workers > 1:
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            indexed = list(pool.map(_index_one, *zip(*tasks, strict=True)))
    else:
        indexed = [_index_one(*task) for task in tasks]
    version = before or max(needed for *_, needed in indexed)
    manifest = Manifest(tuple(shard for shard, *_ in indexed), version)
    rejected = sum((found for _, found, _ in indexed), Tally[str]())
    _check_readable(storage, names, manifest, rejected)
    publish(storage, MANIFEST, manifest.to_json())
    storage.clean()
    return {
        "dataset": storage.root,
        "fingerprint": manifest.fingerprint,
        "samples": manifest.samples,
        "shards": len(manifest.shards),
        "readable": manifest.samples - rejected.total(),
        "rejected": dict(sorted(rejected.items())),
    }


def _check_readable(storage: Storage, names: list[str], manifest: Manifest, rejected: Tally[str]) -> None:
    """Raise DataError when no sample is usable, or when images and texts are stored apart, under equal names.

    Images without captions count as usable: models of images alone need none.
    """
    if not manifest.samples:
        raise DataError(f"{storage.root}: {len(names)} tars without a sample; nothing to index")
    apart = 2 * rejected["files_apart"] >= manifest.samples
    if apart or (rejected.total() == manifest.samples and "empty_caption" not in rejected):
        raise DataError(
            f"{storage.root}: none of {manifest.samples} samples can be read, {dict(sorted(rejected.items()))}; the "
            "image, .txt and .json of a sample must be adjacent in the tar, under one name: use tar --sort=name"
        )


def _tars(patterns: list[str]) -> tuple[Storage, list[str]]:
    """Return the one folder of these tars, and their names in it, sorted. Raises DataError for several folders."""
    found: set[tuple[str, str]] = set()
    for pattern in patterns:
        for path in (name for part in pattern.split("::") for name in expand_braces(part)):
            folder, _, name = path.rpartition("/") if path.endswith(".tar") else (path, "", "")
            names = [name] if name else _tars_of(path)
            found |= {(folder.rstrip("/") or ".", name) for name in names if not name.startswith(".")}
    folders = sorted({folder for folder, _ in found})
    if len(folders) != 1:
        raise DataError(
            f"{patterns}: {len(found)} tars in the folders {folders}: index the tars of one folder at a time"
        )
    return open_storage(folders[0]), sorted(name for _, name in found)


def _tars_of(folder: str) -> list[str]:
    """Return the names of the tars in a folder. Raises DataError for compressed ones."""
    if not is_remote(folder) and not Path(folder).is_dir():
        refuse_compressed([Path(folder).name], folder)
        raise DataError(
            f"{folder}: neither a folder nor a .tar; use a folder of tars, or tars such as {{00000..00099}}.tar"
        )
    names = open_storage(folder).list()
    refuse_compressed(names, folder)
    return [name for name in names if name.endswith(".tar")]


def _index_one(folder: str, name: str, version: int) -> tuple[Shard, Tally[str], int]:
    """Index one tar -> (shard, rejected samples by reason, lowest version that reads it as the newest does)."""
    gate.check(gate.TarName, name, folder, "rename the tar")
    storage = open_storage(folder)
    size, _ = storage.stat(name)
    account, where = Account(), f"{folder}/{name}"
    keys: list[str | None] = []  # by version 1, which takes neighbours with one key for one sample
    without_image = False

    def look(sample: bytes) -> None:
        nonlocal without_image
        files: list[tuple[str, bytes | NotAFile]] = []
        try:
            files = parse_files(sample, where)
            read = read_sample(files, version)
            account.add(read)
            without_image |= read.image is None
        except Unreadable as fault:
            account.reject(fault.key, fault.reason)
        keys.append(read_alike(files))

    found, digest = index_tar(storage.stream(name), where, size, version, look)
    publish_index(storage, name, found)
    alike = not found.offsets[0] and None not in keys and all(map(operator.ne, keys, keys[1:]))
    needed = NEWEST if without_image else VERSION if alike else 2
    return Shard(name, found.samples, found.tar_bytes, digest), account.rejected, needed


def _note(faults: list[str], check: Callable[..., None], *arguments: Any) -> None:
    try:
        check(*arguments)
    except DataError as error:
        faults.append(str(error))


def _check_shard(storage: Storage, shard: Shard, version: int) -> None:
    """Check a shard's size and digest, and its index against the headers of the tar."""
    where = f"{storage.root}/{shard.name}"
    size, _ = storage.stat(shard.name)
    if size != shard.bytes:
        raise DataError(f"{where}: {size} bytes, the manifest has {shard.bytes}")
    stored = read_index(storage, shard)
    try:
        found, digest = index_tar(storage.stream(shard.name), where, size, version)
    except DataError as error:
        raise DataError(f"{error} (its sha256 is not the {shard.digest[:12]} of the manifest)") from None
    if digest != shard.digest:
        raise DataError(f"{where}: sha256 {digest[:12]}, the manifest has {shard.digest[:12]}")
    sums_differ = stored.sums is not None and stored.sums.tolist() != list(found.sums if found.sums is not None else ())
    if stored.xxh3 != found.xxh3 or not np.array_equal(stored.offsets, found.offsets) or sums_differ:
        raise DataError(f"{where}.idx: index of another tar; remove it and run `tessera data index`")


def _check_accounting(storage: Storage, manifest: Manifest) -> None:
    """Check in = out + sum of rejected, for each shard and in total."""
    each = [read_shard_stats(storage, shard.name) for shard in manifest.shards]
    if read_manifest(storage).fingerprint == manifest.fingerprint:  # the totals are of the newest version
        _check_totals(storage, manifest, each)
    for stats in each:
        _check_sum(storage, stats)
    for shard, stats in zip(manifest.shards, each, strict=True):
        if (stats["out"], stats["digest"]) != (shard.n, shard.digest):
            raise DataError(f"{storage.root}/{shard.name}: its statistics belong to another shard")


def _check_totals(storage: Storage, manifest: Manifest, each: list[ShardStats]) -> None:
    totals = read_totals(storage)
    _check_sum(storage, totals)
    first = sum(stats["in"] for stats in each if "retried" not in stats)  # a retried row counts once
    if totals["in"] != first or totals["out"] != manifest.samples:
        raise DataError(f"{storage.root}/{STATS}: {totals['in']} in, {totals['out']} out do not add up over the shards")


def _check_sum(storage: Storage, stats: ShardStats | Totals) -> None:
    if stats["in"] != stats["out"] + sum(stats["rejected"].values()):
        raise DataError(f"{storage.root} {stats.get('name', STATS)}: in {stats['in']} != out + rejected: {stats}")


def _check_version(storage: Storage, fingerprint: str) -> None:
    """Check that the shards of an older version are the first of the newest, so its samples are still there."""
    older, newest = read_version(storage, fingerprint), read_manifest(storage)
    if older.shards != newest.shards[: len(older.shards)]:
        raise DataError(f"{storage.root}/{older_manifest(fingerprint)}: not the first shards of {MANIFEST}")


def _check_codes(storage: Storage, manifest: Manifest, tokenizer_id: str) -> None:
    """Check the codes of this version or, if it has none yet, of the version that they were made for."""
    meta = find_meta(storage, manifest, tokenizer_id)
    if meta is None:
        older = read_meta(storage, meta_name(tokenizer_id))
        try:
            manifest = read_version(storage, (older and older["dataset"]) or "none")
        except DataError:
            raise DataError(f"{storage.root}/{meta_name(tokenizer_id)}: codes of another dataset") from None
    codes = open_codes(storage, manifest, tokenizer_id)
    for name, size, digest in codes.files:
        data = storage.get(name)
        if len(data) != size or hashlib.sha256(data).hexdigest() != digest:
            raise DataError(f"{storage.root}/{name}: {len(data)} bytes differ from the encoded ones")
        if len(data) and int(np.frombuffer(data, "<u2").max()) >= codes.codebook_size:
            raise DataError(f"{storage.root}/{name}: a code exceeds the codebook size {codes.codebook_size}")
