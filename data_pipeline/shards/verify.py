"""Is a dataset what it says? And: making a dataset of tars that came from elsewhere."""

import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.build.sources import tar_paths
from data_pipeline.errors import DataError
from data_pipeline.shards.codes import meta_name, tokenizers_of
from data_pipeline.shards.manifest import (
    MANIFEST,
    STATS,
    Index,
    Manifest,
    Shard,
    pack_index,
    publish,
    read_index,
    read_manifest,
)
from data_pipeline.shards.tar import scan, scan_samples, split_name
from data_pipeline.storage import LocalStorage, Storage, open_storage


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


def index(tars: list[str]) -> dict[str, Any]:
    """Index tars made elsewhere: NAME.tar.idx beside each, one manifest.json in their folder; the tars stay.

    -> {dataset, fingerprint, samples, shards}. Raises DataError for tars of several folders, cut or damaged ones.
    """
    paths = sorted({path for pattern in tars for path in tar_paths(pattern)})
    folders = sorted({str(path.parent) for path in paths})
    if len(folders) != 1:
        raise DataError(f"{len(paths)} tars in the folders {folders}: a dataset is one folder; index each by itself")
    storage = open_storage(folders[0])
    manifest = Manifest(tuple(_index_one(storage, path) for path in paths))
    if not manifest.samples:
        raise DataError(f"{folders[0]}: {len(paths)} tars without a sample; nothing to index")
    publish(storage, MANIFEST, manifest.to_json())
    return {
        "dataset": folders[0],
        "fingerprint": manifest.fingerprint,
        "samples": manifest.samples,
        "shards": len(manifest.shards),
    }


def _index_one(storage: Storage, path: Path) -> Shard:
    offsets, xxh3 = scan_samples(path)
    size = path.stat().st_size
    publish(storage, f"{path.name}.idx", pack_index(Index(size, xxh3, np.array(offsets, np.uint32))))
    with path.open("rb") as file:
        return Shard(path.name, len(offsets) - 1, size, hashlib.file_digest(file, "sha256").hexdigest())


def _note(faults: list[str], check: Callable[..., None], *arguments: Any) -> None:
    try:
        check(*arguments)
    except DataError as error:
        faults.append(str(error))


def _check_shard(storage: Storage, shard: Shard) -> None:
    """Size, then digest, then every sample of the index where the headers say."""
    where = f"{storage.root}/{shard.name}"
    size, _ = storage.stat(shard.name)
    if size != shard.bytes:
        raise DataError(f"{where}: {size} bytes, the manifest says {shard.bytes}")
    if isinstance(storage, LocalStorage):
        with storage.path(shard.name).open("rb") as file:
            _check_bytes(file, shard, where)
            starts = _sample_starts(file, where)
    else:
        data = io.BytesIO(storage.get(shard.name))
        _check_bytes(data, shard, where)
        starts = _sample_starts(data, where)
    if read_index(storage, shard).offsets[:-1].tolist() != starts:
        raise DataError(f"{where}.idx: offsets differ from the headers of the tar")


def _check_bytes(file: Any, shard: Shard, where: str) -> None:
    digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != shard.digest:
        raise DataError(f"{where}: sha256 {digest[:12]}, the manifest says {shard.digest[:12]}")


def _sample_starts(file: Any, where: str) -> list[int]:
    starts, previous = [], None
    for member in scan(file, where):
        key = split_name(member.name)[0]
        if key != previous:
            starts.append(member.start // 512)
        previous = key
    return starts


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
