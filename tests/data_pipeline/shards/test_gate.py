"""What a dataset's files say is checked as they are read: nothing is written or read outside, whatever they say."""

import copy
import json
import struct
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_pipeline.errors import DataError
from data_pipeline.ingest.cache import RawCache
from data_pipeline.ingest.report import write_report
from data_pipeline.shards.codes import encode_shard, meta_name, open_codes, parse_meta
from data_pipeline.shards.manifest import (
    BLOCK,
    Index,
    Manifest,
    Shard,
    open_dataset,
    pack_index,
    parse_manifest,
    read_rows,
    read_shard_stats,
    read_totals,
    unpack_index,
)
from data_pipeline.shards.samples import Unreadable, read_sample
from data_pipeline.shards.verify import index, verify
from data_pipeline.storage import open_storage
from data_pipeline.stream import cache
from data_pipeline.stream.reader import Stream
from tests.data_pipeline.shards.test_codes import Means

HOSTILE = ["../x", "..", ".", "", "/etc/passwd", "a/b", "a\\b", "..\\x", ".x.tar", "a\0b", "a\nb", "\x7f", "x" * 300]
HOSTILE += [
    "../out/x.tar",
    "/tmp/x.tar",
    "..\\x.tar",
    "a/../../x.tar",
    "x\0.tar",
    "a\n.tar",
    "x.tar\n",
    "x.tar/",
    ".tar",
]
HOSTILE += ["猫" * 100 + ".tar"]
SHA = "0123456789abcdef" * 4
ENTRY = {"name": "00000.tar", "n": 2, "bytes": 4096, "digest": SHA}
MANIFEST_TREE = {"version": 1, "samples": 2, "shards": [ENTRY]}
CODES_TREE = {
    "version": 1, "tokenizer": "0123456789ab", "dataset": SHA, "image_size": 16, "codes_per_image": 16, "crops": 1,
    "codebook_size": 256, "samples": 2, "codes_used": 3,
    "shards": [{"name": "00000.vq-0123456789ab.bin", "bytes": 64, "digest": SHA}],
}  # fmt: skip
STATS_TREE = {"name": "00000.tar", "in": 2, "out": 2, "rejected": {}, "bytes": 4096, "digest": SHA}
NOT_COUNTS = [-1, 1.5, True, "1", None, 2**63, 2**4000, [], {}]
NOT_DIGESTS = ["../../outside/planted", SHA[:-1], SHA + "0", SHA.upper(), SHA + "\n", "", "." * 64, 7, None, [SHA]]


def changed(tree, path, value):
    """A copy of the tree with another value at this path."""
    tree = copy.deepcopy(tree)
    inner = tree
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = value
    return tree


def is_inside(name):
    return name not in ("", ".", "..") and not any(letter in name for letter in "/\\\0\n")


WRONG = [
    *((MANIFEST_TREE, ("shards", 0, "name"), value) for value in [*HOSTILE, "x", "x.tgz", 1, None]),
    *((MANIFEST_TREE, ("shards", 0, "digest"), value) for value in NOT_DIGESTS),
    *((MANIFEST_TREE, ("shards", 0, field), value) for field in ("n", "bytes") for value in NOT_COUNTS),
    *((MANIFEST_TREE, ("samples",), value) for value in [*NOT_COUNTS, 3]),
    *((MANIFEST_TREE, ("shards",), value) for value in [None, {}, "x", [[]], [None], [{}], [ENTRY, ENTRY]]),
    (MANIFEST_TREE, ("shards", 0, "bytes"), 1023),  # two samples have two headers at least
    (MANIFEST_TREE, ("shards", 0, "more"), 1),
    *((CODES_TREE, ("shards", 0, "name"), value) for value in HOSTILE),
    *((CODES_TREE, ("shards", 0, "digest"), value) for value in NOT_DIGESTS),
    *((CODES_TREE, ("shards", 0, "bytes"), value) for value in NOT_COUNTS),
    *((CODES_TREE, (field,), value) for field in ("codes_per_image", "codebook_size") for value in [0, *NOT_COUNTS]),
    *((CODES_TREE, ("crops",), value) for value in [0, 2, *NOT_COUNTS]),
    *((CODES_TREE, ("tokenizer",), value) for value in ["../../../../", "0123456789AB", SHA, None]),
    *((CODES_TREE, ("dataset",), value) for value in NOT_DIGESTS),
    *((STATS_TREE, ("name",), value) for value in [*HOSTILE, "00001.tar"]),
    *((STATS_TREE, (field,), value) for field in ("in", "out", "bytes") for value in NOT_COUNTS),
    *((STATS_TREE, ("rejected",), value) for value in [None, [], {"reason": -1}, {"reason": "1"}]),
    *((STATS_TREE, ("digest",), value) for value in NOT_DIGESTS),
]


def read_tree(tree, kind, folder):
    """The file of this kind with these contents, as the program reads it."""
    data = json.dumps(tree).encode()
    if kind is MANIFEST_TREE:
        return parse_manifest(data, "here")
    if kind is CODES_TREE:
        return parse_meta(data, "here")
    (folder / "00000_stats.json").write_bytes(data)
    return read_shard_stats(open_storage(folder), "00000.tar")


@pytest.mark.parametrize("kind", [MANIFEST_TREE, CODES_TREE, STATS_TREE], ids=["manifest", "codes", "stats"])
def test_a_name_digest_size_or_count_that_is_none_is_refused_where_it_is_read(kind, tmp_path):
    read_tree(kind, kind, tmp_path)
    for tree, path, value in WRONG:
        if tree is kind:
            with pytest.raises(DataError, match="here|_stats.json"):
                read_tree(changed(tree, path, value), kind, tmp_path)
                pytest.fail(f"{path} = {value!r} was taken")


@pytest.mark.parametrize(
    "data",
    [b"", b"[", b"null", b"[1]", b'{"version": 1}', b"[" * 10**6, b'{"a":' * 10**5, b"\xff\xfe", b"NaN", b'"\\ud800"'],
)
def test_what_is_no_such_file_is_refused_in_a_line(data, tmp_path):
    (tmp_path / "stats.json").write_bytes(data)
    for read in (parse_manifest, parse_meta, unpack_index, lambda *_: read_totals(open_storage(tmp_path))):
        with pytest.raises(DataError) as raised:
            read(data, "here")
        assert len(str(raised.value)) < 400 and "\n" not in str(raised.value)


# ------------------------------------------------------------------------------------------------ fuzzing

VALUES = st.one_of(
    st.sampled_from([*HOSTILE, *NOT_COUNTS, *NOT_DIGESTS]),
    st.text(max_size=80),
    st.integers(),
    st.floats(),
    st.recursive(st.none() | st.text(max_size=9), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)),
)
PATHS = {
    "manifest": [("version",), ("samples",), ("shards",), ("shards", 0), *(("shards", 0, name) for name in ENTRY)],
    "codes": [*((name,) for name in CODES_TREE), *(("shards", 0, name) for name in ("name", "bytes", "digest"))],
}


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(st.data())
def test_of_any_manifest_only_names_that_stay_inside_come_through(data):
    tree = changed(MANIFEST_TREE, data.draw(st.sampled_from(PATHS["manifest"])), data.draw(VALUES))
    try:
        manifest = parse_manifest(json.dumps(tree).encode(), "here")
    except DataError:
        return
    for shard in manifest.shards:
        assert is_inside(shard.name) and shard.name.endswith(".tar") and len(bytes.fromhex(shard.digest)) == 32
        assert 0 <= shard.n * BLOCK <= shard.bytes <= 2**48
    assert parse_manifest(manifest.to_json(), "again") == manifest


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(st.data())
def test_of_any_side_car_header_only_names_that_stay_inside_come_through(data):
    tree = changed(CODES_TREE, data.draw(st.sampled_from(PATHS["codes"])), data.draw(VALUES))
    try:
        meta = parse_meta(json.dumps(tree).encode(), "here")
    except DataError:
        return
    for entry in meta["shards"]:
        assert is_inside(entry["name"]) and len(bytes.fromhex(entry["digest"])) == 32
    assert is_inside(meta_name(meta["tokenizer"], meta["dataset"])) and meta["crops"] in (1, 10)


@settings(max_examples=300, deadline=1000)
@given(st.binary(max_size=200), st.integers(0, 200), st.binary(max_size=12))
@example(b"", 32, struct.pack("<Q", 2**61))
@example(b"", 40, struct.pack("<II", 9, 5))
def test_any_index_is_one_of_samples_in_a_row_or_refused_in_bounded_time(whole, at, patch):
    packed = pack_index(Index(5 * BLOCK, 7, np.array([0, 2, 5], np.uint32), np.array([1, 2], np.uint32)))
    for data in (whole, b"TESSIDX\0" + whole, packed[:at] + patch + packed[at + len(patch) :], packed[:at]):
        try:
            found = unpack_index(data, "here")
        except DataError:
            continue
        assert (np.diff(found.offsets.astype(np.int64)) > 0).all()
        assert int(found.offsets[-1]) * BLOCK <= found.tar_bytes and len(found.offsets) == found.samples + 1
        assert found.sums is None or len(found.sums) == found.samples


def test_a_manifest_of_twenty_thousand_shards_is_read_in_seconds():
    manifest = Manifest(tuple(Shard(f"{number:05d}.tar", 10, 10 * BLOCK, SHA) for number in range(20_000)))
    data, start = manifest.to_json(), time.process_time()
    assert parse_manifest(data, "here") == manifest and time.process_time() - start < 10


# ------------------------------------------------------------------------------- nothing is written outside


@pytest.fixture
def two_samples(build_here, tmp_path):
    root = tmp_path / "inside/set"
    build_here(source={"kind": "scenes", "count": 2, "image_size": 16}, output=str(root))
    (tmp_path / "inside/out").mkdir()
    return root


def rewrite(root, path, value):
    tree = json.loads((root / "manifest.json").read_text())
    (root / "manifest.json").write_text(json.dumps(changed(tree, path, value)))


def files(folder):
    return {path for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["../out/x.tar", "out/x.tar", "..\\x.tar", "/tmp/tessera-planted/x.tar"])
def test_codes_are_not_written_where_a_manifest_points(name, two_samples, tmp_path):
    (tmp_path / "inside/out/x.tar").write_bytes((two_samples / "00000.tar").read_bytes())
    (tmp_path / "inside/out/x.tar.idx").write_bytes((two_samples / "00000.tar.idx").read_bytes())
    rewrite(two_samples, ("shards", 0, "name"), name)
    before = files(tmp_path)
    with pytest.raises(DataError, match="shards.0.name"):
        encode_shard(str(two_samples), 0, Means())
    assert files(tmp_path) == before and not Path("/tmp/tessera-planted").exists()


@pytest.mark.parametrize("digest", ["../../outside/planted", "/" + "a" * 40, "..", "%2e%2e/x"])
def test_blocks_are_not_cached_where_a_manifest_points(digest, two_samples, serve, tmp_path, monkeypatch):
    monkeypatch.setenv(cache.FOLDER, str(tmp_path / "cache"))
    rewrite(two_samples, ("shards", 0, "digest"), digest)
    before = files(tmp_path)
    with pytest.raises(DataError, match="sha256 is 64 lower-case hex digits"):
        Stream(serve(two_samples), seed=0).read(0, 2)
    assert files(tmp_path) == before


def test_codes_of_other_names_than_their_shards_are_refused(two_samples):
    manifest = open_dataset(two_samples)[1]
    tree = {**CODES_TREE, "dataset": manifest.fingerprint}
    for shards in ([], [{"name": "00001.vq-0123456789ab.bin", "bytes": 64, "digest": SHA}], tree["shards"] * 2):
        (two_samples / meta_name("0123456789ab")).write_text(json.dumps({**tree, "shards": shards}))
        with pytest.raises(DataError, match="must list one NAME"):
            open_codes(open_storage(two_samples), manifest, "0123456789ab")


def test_damaged_files_beside_the_shards_are_told_by_name(two_samples):
    (two_samples / "00000_stats.json").write_text("[]")
    (two_samples / meta_name("0123456789ab")).write_text('{"dataset": "../../x"}')
    with pytest.raises(DataError, match=r"(?s)_stats.json.*codes.vq-0123456789ab.json"):
        verify(two_samples)
    (two_samples / "00000.parquet").write_bytes(b"<html>")
    with pytest.raises(DataError, match="00000.parquet: not a valid table"):
        write_report(two_samples, two_samples.parent / "report.html")


def test_a_table_with_a_digest_that_is_none_is_refused(tmp_path):
    storage = open_storage(tmp_path)
    for value in ("../../../etc/passwd", SHA[:-1], SHA + "\n"):
        pq.write_table(pa.table({"row": [0, 1], "sha256": [None, value]}), tmp_path / "00000_fetch.parquet")
        with pytest.raises(DataError, match="column sha256 has invalid digests"):
            read_rows(storage, "00000_fetch.parquet")
    with pytest.raises(DataError, match="has no column|not a valid table"):
        read_rows(storage, "00000_fetch.parquet", ["row", "url"])


@pytest.mark.parametrize("digest", ["../secret", "/dev/zero", "", SHA[:-1], SHA.upper()])
def test_the_cache_of_fetched_bytes_takes_digests_only(digest, tmp_path):
    (tmp_path / "secret").write_text("x")
    with pytest.raises(DataError, match="64 lower-case hex digits"):
        RawCache(str(tmp_path / "cache")).get(digest)


def test_index_names_a_tar_that_no_manifest_could_list_and_leaves_hidden_files_alone(two_samples, tmp_path):
    tar = (two_samples / "00000.tar").read_bytes()
    (tmp_path / "tars").mkdir()
    for name in ("a.tar", "._a.tar"):
        (tmp_path / "tars" / name).write_bytes(tar)
    assert index([str(tmp_path / "tars")], workers=1)["shards"] == 1
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd/a\nb.tar").write_bytes(tar)
    with pytest.raises(DataError, match="rename the tar"):
        index([str(tmp_path / "odd")], workers=1)


@pytest.mark.parametrize("text", [b"[" * 10**5, b'{"a":' * 10**5, b"[1]", b"\xff", b""])
def test_json_of_a_sample_that_is_none_makes_an_unreadable_sample(text):
    with pytest.raises(Unreadable, match="."):
        read_sample([("0.png", b"image"), ("0.json", text)])
