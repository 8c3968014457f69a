"""Is a dataset what it says? And: making a dataset of tars that came from elsewhere."""

import hashlib
import json
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.build.sources import expand_braces
from data_pipeline.errors import DataError
from data_pipeline.shards.codes import meta_name, tokenizers_of
from data_pipeline.shards.manifest import (
    MANIFEST,
    STATS,
    Manifest,
    Shard,
    index_tar,
    publish,
    publish_index,
    read_index,
    read_manifest,
)
from data_pipeline.storage import Storage, open_storage


def verify(dataset: str | Path) -> dict[str, Any]:
    """Digests and sizes of every shard, its index against its headers, the accounting, the codes.

    -> {dataset, fingerprint, samples, shards, codes: [tokenizer ids]}. Raises DataError listing everything that is off.
    """
    storage = open_storage(dataset)
    manifest = read_manifest(storage)
    faults: list[str] = []
    for shard in manifest.shards:
        _note(faults, _check_shard, storage, shard)
    if storage.exists(STATS):
        _note(faults, _check_accounting, storage, manifest)
    codes = tokenizers_of(storage)
    for tokenizer_id in codes:
        _note(faults, _check_codes, storage, manifest, tokenizer_id)
    if faults:
        raise DataError(
            f"{storage.root}: {len(faults)} faults; fetch or build the named files again\n  " + "\n  ".join(faults)
        )
    return {
        "dataset": storage.root,
        "fingerprint": manifest.fingerprint,
        "samples": manifest.samples,
        "shards": len(manifest.shards),
        "codes": codes,
    }


def index(tars: list[str], workers: int | None = None) -> dict[str, Any]:
    """Index tars made elsewhere: an .idx beside each, one manifest.json in their folder; the tars stay as they are.

    tars: files or folders, local or s3://, with {00000..00099} and `::`. workers: processes, one a CPU unless told.
    -> {dataset, fingerprint, samples, shards}. Raises DataError for tars of several folders, cut or damaged ones.
    """
    storage, names = _tars(tars)
    tasks = [(storage.root, name) for name in names]
    workers = min(workers or os.cpu_count() or 1, len(tasks))
    if workers > 1:
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            shards = tuple(pool.map(_index_one, *zip(*tasks, strict=True)))
    else:
        shards = tuple(_index_one(*task) for task in tasks)
    manifest = Manifest(shards)
    if not manifest.samples:
        raise DataError(f"{storage.root}: {len(names)} tars without a sample; nothing to index")
    publish(storage, MANIFEST, manifest.to_json())
    storage.clean()
    return {
        "dataset": storage.root,
        "fingerprint": manifest.fingerprint,
        "samples": manifest.samples,
        "shards": len(manifest.shards),
    }


def _tars(patterns: list[str]) -> tuple[Storage, list[str]]:
    """-> the one folder of these tars, and their names in it, sorted."""
    found: set[tuple[str, str]] = set()
    for pattern in patterns:
        for path in (name for part in pattern.split("::") for name in expand_braces(part)):
            folder, _, name = path.rpartition("/") if path.endswith(".tar") else (path, "", "")
            names = [name] if name else [name for name in open_storage(folder).list() if name.endswith(".tar")]
            found |= {(folder.rstrip("/") or ".", name) for name in names}
    folders = sorted({folder for folder, _ in found})
    if len(folders) != 1:
        raise DataError(
            f"{patterns}: {len(found)} tars in the folders {folders}: index the tars of one folder at a time"
        )
    return open_storage(folders[0]), sorted(name for _, name in found)


def _index_one(folder: str, name: str) -> Shard:
    storage = open_storage(folder)
    found, digest = index_tar(storage.stream(name), f"{folder}/{name}")
    publish_index(storage, name, found)
    return Shard(name, found.samples, found.tar_bytes, digest)


def _note(faults: list[str], check: Callable[..., None], *arguments: Any) -> None:
    try:
        check(*arguments)
    except DataError as error:
        faults.append(str(error))


def _check_shard(storage: Storage, shard: Shard) -> None:
    """Size, digest, and every sample of the index where the headers say."""
    where = f"{storage.root}/{shard.name}"
    size, _ = storage.stat(shard.name)
    if size != shard.bytes:
        raise DataError(f"{where}: {size} bytes, the manifest says {shard.bytes}")
    stored = read_index(storage, shard)
    try:
        found, digest = index_tar(storage.stream(shard.name), where)
    except DataError as error:
        raise DataError(f"{error} (its sha256 is not the {shard.digest[:12]} of the manifest)") from None
    if digest != shard.digest:
        raise DataError(f"{where}: sha256 {digest[:12]}, the manifest says {shard.digest[:12]}")
    sums_differ = stored.sums is not None and stored.sums.tolist() != list(found.sums if found.sums is not None else ())
    if stored.xxh3 != found.xxh3 or not np.array_equal(stored.offsets, found.offsets) or sums_differ:
        raise DataError(f"{where}.idx: the index of another tar; remove it and run `tessera data index`")


def _check_accounting(storage: Storage, manifest: Manifest) -> None:
    """in = out + sum of rejected, for each shard and for all."""
    totals = json.loads(storage.get(STATS))
    each = [json.loads(storage.get(f"{shard.name.removesuffix('.tar')}_stats.json")) for shard in manifest.shards]
    for stats in [totals, *each]:
        if stats["in"] != stats["out"] + sum(stats["rejected"].values()):
            raise DataError(f"{storage.root} {stats.get('name', STATS)}: in {stats['in']} != out + rejected: {stats}")
    first = sum(stats["in"] for stats in each if "retried" not in stats)  # a row that was tried again counts once
    if totals["in"] != first or totals["out"] != manifest.samples:
        raise DataError(f"{storage.root}/{STATS}: {totals['in']} in, {totals['out']} out do not add up over the shards")
    for shard, stats in zip(manifest.shards, each, strict=True):
        if (stats["out"], stats["digest"]) != (shard.n, shard.digest):
            raise DataError(f"{storage.root}/{shard.name}: its statistics are another shard's")


def _check_codes(storage: Storage, manifest: Manifest, tokenizer_id: str) -> None:
    meta = json.loads(storage.get(meta_name(tokenizer_id)))
    if meta["dataset"] != manifest.fingerprint:
        raise DataError(f"{storage.root}/{meta_name(tokenizer_id)}: codes of another dataset")
    for shard, entry in zip(manifest.shards, meta["shards"], strict=True):
        data = storage.get(entry["name"])
        if len(data) != 2 * meta["codes_per_image"] * shard.n or hashlib.sha256(data).hexdigest() != entry["digest"]:
            raise DataError(f"{storage.root}/{entry['name']}: {len(data)} bytes, not those that were encoded")
        if len(data) and int(np.frombuffer(data, "<u2").max()) >= meta["codebook_size"]:
            raise DataError(f"{storage.root}/{entry['name']}: a code beyond the codebook of {meta['codebook_size']}")
