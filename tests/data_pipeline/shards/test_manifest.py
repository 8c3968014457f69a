"""The bytes of a manifest are its canonical JSON, whose hash names the dataset."""

import hashlib
import io
import itertools
import json
import re
import struct
from dataclasses import asdict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import Conflict, DataError
from data_pipeline.shards.manifest import (
    VERSION,
    Index,
    Manifest,
    Shard,
    canonical_json,
    index_tar,
    older_manifest,
    older_versions,
    open_dataset,
    pack_index,
    parse_manifest,
    publish,
    publish_index,
    read_index,
    read_manifest,
    read_rows,
    read_shard_stats,
    read_totals,
    side_name,
    unpack_index,
)
from data_pipeline.shards.tar import NEWEST, TarWriter, header
from data_pipeline.storage import open_storage

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
SHARDS = st.builds(Shard, TEXT, st.integers(0, 2**40), st.integers(0, 2**60), st.text("0123456789abcdef"))


@settings(deadline=None)
@given(st.lists(SHARDS, max_size=5))
def test_the_bytes_are_canonical_json(shards: list[Shard]) -> None:
    manifest = Manifest(tuple(shards))
    tree = {"version": 1, "samples": sum(shard.n for shard in shards), "shards": [asdict(shard) for shard in shards]}
    assert manifest.to_json() == canonical_json(tree)


@pytest.mark.parametrize("sums", [None, [7, 2**32 - 1]])
def test_an_index_is_read_back_as_it_was_written_up_to_the_last_block_of_its_tar(sums):
    kept = None if sums is None else np.array(sums, np.uint32)
    index = Index(5 * 512, 2**64 - 1, np.array([0, 2, 5], np.uint32), kept)
    data = pack_index(index)
    found = unpack_index(data, "x")
    assert (found.tar_bytes, found.xxh3, found.offsets.tolist()) == (5 * 512, 2**64 - 1, [0, 2, 5])
    assert (None if found.sums is None else found.sums.tolist()) == sums
    for wrong in (data[:-4], data + bytes(4), data[:-1], data[:39], b"x" + data[1:]):
        with pytest.raises(DataError, match="damaged|not an index"):
            unpack_index(wrong, "x")
    for offsets in ([0, 2, 6], [0, 2, 2], [3, 2, 5]):
        with pytest.raises(DataError, match="are not in order"):
            unpack_index(pack_index(Index(5 * 512, 0, np.array(offsets, np.uint32), index.sums)), "x")


# ---------------------------------------------------------------------------------------------- manifests

SHA = "0123456789abcdef" * 4
OTHER = "f" * 64
ONE, TWO = Shard("0.tar", 2, 1024, SHA), Shard("1.tar", 3, 9999, OTHER)


def parsed(tree):
    return parse_manifest(json.dumps(tree).encode(), "here")


def tree_of(*shards, version=1, **more):
    return {"version": version, "samples": sum(shard.n for shard in shards), "shards": [*map(asdict, shards)], **more}


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("shards", [(), (ONE,), (ONE, TWO)])
def test_a_manifest_is_read_back_and_named_by_its_canonical_json(version, shards):
    text = json.dumps(tree_of(*shards, version=version), sort_keys=True, indent=1, ensure_ascii=False) + "\n"
    manifest = parsed(tree_of(*shards, version=version, more="keys"))
    assert manifest == Manifest(shards, version) and manifest.samples == sum(shard.n for shard in shards)
    assert manifest.to_json() == text.encode() == canonical_json(json.loads(text))
    assert manifest.fingerprint == hashlib.sha256(text.encode()).hexdigest()


def test_canonical_json_keeps_letters_and_sorts_keys():
    assert canonical_json({"b": "é", "a": [1]}) == '{\n "a": [\n  1\n ],\n "b": "é"\n}\n'.encode()


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (tree_of(ONE, version=0), "here: version 0, supported are 1 to 3; use the tessera that built it"),
        (tree_of(ONE, version=4), "here: version 4, supported are 1 to 3; use the tessera that built it"),
        (tree_of(ONE, samples=3), "here: samples=3, but its shards have 2; damaged"),
        (tree_of(ONE, samples=1), "here: samples=1, but its shards have 2; damaged"),
        (tree_of(TWO, Shard("2.tar", 2, 1023, SHA)), "here: 2.tar has n=2 samples in bytes=1023; damaged"),
        (tree_of(ONE, TWO, ONE), "here: two shards have one name; build it again"),
        (tree_of(ONE, TWO, Shard("0.tar", 1, 512, OTHER)), "here: two shards have one name"),
        ({**tree_of(ONE), "shards": [{**asdict(ONE), "n": -1}]}, "here: shards.0.n=-1: .*; not a manifest; build"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused_with_the_reason(tree, message):
    with pytest.raises(DataError, match=f"^{message}"):
        parsed(tree)


def test_a_sample_may_fill_one_block():
    assert parsed(tree_of(Shard("0.tar", 2, 1024, SHA), Shard("1.tar", 0, 0, SHA))).samples == 2


# ---------------------------------------------------------------------------------------- versions by name


@pytest.fixture
def grown(tmp_path):
    """A folder with three manifests -> (folder, first, second, newest)."""
    folder = tmp_path / "set"
    folder.mkdir()
    versions = Manifest((ONE,)), Manifest((ONE, TWO)), Manifest((ONE, TWO, Shard("2.tar", 1, 512, SHA)), 2)
    for kept in versions[:2]:
        (folder / f"manifest-{kept.fingerprint[:12]}.json").write_bytes(kept.to_json())
    (folder / "manifest.json").write_bytes(versions[2].to_json())
    for name in (
        "manifest-0123.json",
        "manifest-0123456789ab.json.tmp",
        "x-manifest-0123456789ab.json",
        "manifestXjson",
    ):
        (folder / name).write_text("{}")
    return folder, *versions


@pytest.mark.parametrize("digits", [12, 13, 40, 64])
def test_every_version_of_a_dataset_is_opened_by_the_beginning_of_its_fingerprint(grown, digits):
    folder, *versions = grown
    for manifest in versions:
        storage, found = open_dataset(f"{folder}@{manifest.fingerprint[:digits]}")
        assert (found, str(storage.root)) == (manifest, str(folder))
    assert open_dataset(folder)[1] == open_dataset(str(folder))[1] == versions[2]
    assert sorted(older_versions(open_storage(folder))) == sorted(one.fingerprint[:12] for one in versions[:2])
    assert older_manifest(versions[0].fingerprint) == f"manifest-{versions[0].fingerprint[:12]}.json"


def test_a_version_that_is_not_kept_is_refused_with_those_that_are(grown):
    folder, first, second, newest = grown
    for wanted in ("0" * 12, first.fingerprint[:12] + "0" * 52):
        assert wanted not in (one.fingerprint for one in grown[1:])
        with pytest.raises(
            DataError, match=f"set: no version {wanted}; available are {newest.fingerprint[:12]}, "
        ) as raised:
            open_dataset(f"{folder}@{wanted}")
        listed = str(raised.value).partition("available are ")[2].split(", ")
        assert sorted(listed[1:]) == sorted(one.fingerprint[:12] for one in (first, second))
    (folder / older_manifest(first.fingerprint)).write_bytes(second.to_json())  # another manifest under its name
    with pytest.raises(DataError, match=f"no version {first.fingerprint[:12]}"):
        open_dataset(f"{folder}@{first.fingerprint[:12]}")


def test_an_address_ends_with_a_fingerprint_of_twelve_digits_or_is_a_folder(grown, tmp_path):
    folder, first, *_, newest = grown
    for end in ("0" * 11, "0" * 65, "0123456789AB", "0123456789ag", "0123456789ab/"):
        with pytest.raises(
            DataError, match=r"no manifest\.json: not a finished dataset; run `tessera data build` to the end"
        ):
            open_dataset(f"{folder}@{end}")
    named = tmp_path / f"set@{first.fingerprint[:12]}"
    named.mkdir()
    (named / "manifest.json").write_bytes(newest.to_json())
    assert open_dataset(named)[1] == open_dataset(str(named))[1] == newest
    storage, found = open_dataset(f"{named}@{newest.fingerprint[:12]}")
    assert (str(storage.root), found) == (str(named), newest)


def test_a_manifest_is_read_under_any_name_and_missed_by_that_name(grown):
    storage, second = open_storage(grown[0]), grown[2]
    assert read_manifest(storage) == grown[3]
    assert read_manifest(storage, older_manifest(second.fingerprint)) == second
    with pytest.raises(DataError, match=r"set: no other\.json: not a finished dataset; .* or `tessera data index`"):
        read_manifest(storage, "other.json")
    with pytest.raises(DataError, match=r"set/manifest-0123\.json: version: .*; not a manifest"):
        read_manifest(storage, "manifest-0123.json")


# ------------------------------------------------------------------------------------------- accounts, tables

STATS_TREE = {"name": "0.tar", "in": 3, "out": 2, "rejected": {"why": 1}, "bytes": 1024, "digest": SHA}


@pytest.mark.parametrize("more", [{}, {"retried": {"why": 2}}])
def test_the_account_of_a_shard_is_read_from_beside_it(tmp_path, more):
    storage = open_storage(tmp_path)
    assert [side_name(name, "_stats.json") for name in ("0.tar", "a.tar.tar")] == ["0_stats.json", "a.tar_stats.json"]
    (tmp_path / "0_stats.json").write_text(json.dumps(STATS_TREE | more))
    assert read_shard_stats(storage, "0.tar") == STATS_TREE | more
    (tmp_path / "1_stats.json").write_text(json.dumps(STATS_TREE))
    with pytest.raises(DataError, match="1_stats.json: name='0.tar' is another shard; build the dataset"):
        read_shard_stats(storage, "1.tar")
    (tmp_path / "1_stats.json").write_text(json.dumps({**STATS_TREE, "in": -1}))
    with pytest.raises(
        DataError, match=f"^{re.escape(str(tmp_path))}/1_stats.json: in=-1: .*; build the dataset again"
    ):
        read_shard_stats(storage, "1.tar")


def test_the_account_of_a_dataset_is_read(tmp_path):
    totals = {"in": 3, "out": 2, "rejected": {"why": 1}}
    (tmp_path / "stats.json").write_text(json.dumps(totals))
    assert read_totals(open_storage(tmp_path)) == totals
    (tmp_path / "stats.json").write_text(json.dumps(totals | {"out": 1.5}))
    with pytest.raises(
        DataError, match=f"^{re.escape(str(tmp_path))}/stats.json: out=1.5: .*; build the dataset again"
    ):
        read_totals(open_storage(tmp_path))


DIGESTS = {"sha256": 64, "phash": 16, "colours": 256}


@pytest.mark.parametrize("column", DIGESTS)
def test_digests_in_tables_have_their_length_and_letters(tmp_path, column):
    digits = "0123456789abcdef" * 16
    good = digits[: DIGESTS[column]]
    bad = [good[:-1], good + "0", "G" + good[1:], good.upper(), good + "\n", "x" + good, good + "x", "/", "0"]
    bad += [] if column == "sha256" else [""]
    for values in ([good, None], [None], [good, good], *([["", good]] if column == "sha256" else [])):
        pq.write_table(
            pa.table({"row": range(len(values)), column: pa.array(values, pa.string())}), tmp_path / "x.parquet"
        )
        assert read_rows(open_storage(tmp_path), "x.parquet")[column].to_pylist() == values
    for value in bad:
        pq.write_table(pa.table({"row": [0, 1, 2], column: [good, value, good]}), tmp_path / "x.parquet")
        with pytest.raises(DataError, match=f"x.parquet: column {column} has invalid digests; build the dataset"):
            read_rows(open_storage(tmp_path), "x.parquet")
        assert read_rows(open_storage(tmp_path), "x.parquet", ["row"]).column_names == ["row"]


def test_columns_of_a_table_are_those_that_are_asked_for(tmp_path):
    storage = open_storage(tmp_path)
    pq.write_table(pa.table({"a": [1], "b": [2], "c": [3]}), tmp_path / "x.parquet")
    names = {None: ["a", "b", "c"], ("a",): ["a"], ("c", "a"): ["a", "c"]}
    for columns, expected in names.items():
        assert sorted(read_rows(storage, "x.parquet", columns and list(columns)).column_names) == expected
    assert read_rows(storage, "x.parquet", ["a"], ["c", "d"]).to_pylist() == [{"a": 1, "c": 3}]
    assert read_rows(storage, "x.parquet", None, ["d"]).column_names == ["a", "b", "c"]
    with pytest.raises(DataError, match=r"x\.parquet: has no column d, e; build the dataset again"):
        read_rows(storage, "x.parquet", ["e", "a", "d"])


@pytest.mark.parametrize("data", [b"", b"PAR1", b"<html>", b"PAR1" + b"x" * 100 + b"PAR1"])
def test_what_is_no_table_is_refused_in_a_line(tmp_path, data):
    (tmp_path / "x.parquet").write_bytes(data)
    with pytest.raises(DataError, match=r"x\.parquet: not a valid table \(.*\); build the dataset") as raised:
        read_rows(open_storage(tmp_path), "x.parquet")
    assert len(str(raised.value)) < 300 + len(str(tmp_path))


def test_a_table_that_is_cut_off_behind_its_footer_is_refused(tmp_path):
    pq.write_table(
        pa.table({"a": ["x" * 1000] * 100}), tmp_path / "x.parquet", compression="none", use_dictionary=False
    )
    data = bytearray((tmp_path / "x.parquet").read_bytes())
    data[4:200] = bytes(196)  # the footer is whole, the first page is none
    (tmp_path / "x.parquet").write_bytes(data)
    with pytest.raises(DataError, match="not a valid table"):
        read_rows(open_storage(tmp_path), "x.parquet")


# ------------------------------------------------------------------------------------------------- indices


def tar_of(*samples):
    """-> the bytes of a tar, and where each sample begins and the last one ends."""
    file = io.BytesIO()
    writer = TarWriter(file)
    for number, sample in enumerate(samples):
        writer.add(f"{number}", [("txt", sample)])
    writer.close()
    return file.getvalue(), [offset * 512 for offset in writer.offsets]


@pytest.mark.parametrize("piece", [1, 512, 10_000])
@pytest.mark.parametrize("behind", [b"", b"x" * 700])
def test_an_index_says_where_samples_lie_and_digests_every_byte(piece, behind):
    data, begins = tar_of(b"abc", b"x" * 700, b"")
    data, seen = data + behind, []
    pieces = [data[at : at + piece] for at in range(0, len(data), piece)]
    found, digest = index_tar(pieces, "x", look=seen.append)
    samples = [data[start:end] for start, end in itertools.pairwise(begins)]
    assert seen == samples and found.samples == 3
    assert (found.tar_bytes, found.xxh3, digest) == (
        len(data), xxhash.xxh3_64_intdigest(data), hashlib.sha256(data).hexdigest(),
    )  # fmt: skip
    assert (found.offsets.dtype, found.offsets.tolist()) == (np.uint32, [begin // 512 for begin in begins])
    sums = [xxhash.xxh3_64_intdigest(sample) % 2**32 for sample in samples]
    assert (found.sums.dtype, found.sums.tolist()) == (np.uint32, sums)
    assert index_tar(pieces, "x")[1] == index_tar(pieces, "x", len(data), 2)[1] == digest


def test_an_index_is_made_by_the_rules_of_the_version_that_it_is_for():
    file = io.BytesIO()
    writer = TarWriter(file)
    writer.add("1.05", [("txt", b"a")])
    writer.add("1.06", [("txt", b"b")])
    writer.close()
    found = [index_tar([file.getvalue()], "x", None, *version)[0].samples for version in ((), (1,), (2,), (3,))]
    assert found == [1, 1, 2, 2] and (VERSION, NEWEST) == (1, 3)


def test_a_damaged_tar_is_named_and_a_member_beyond_its_size_is_not_waited_for():
    with pytest.raises(DataError, match="^here: ends at byte 0 without the closing blocks"):
        index_tar([], "here")

    def pieces():
        yield header("a.txt", 10**6)
        pytest.fail("read on")

    with pytest.raises(DataError, match="^here: 'a.txt' has 512 of 1000000 bytes"):
        index_tar(pieces(), "here", 1024)


def test_a_tar_without_samples_has_an_index_of_none():
    found, _ = index_tar([bytes(1024)], "x")
    assert (found.samples, found.offsets.tolist(), found.tar_bytes) == (0, [0], 1024)
    assert unpack_index(pack_index(found), "x").samples == 0


@pytest.mark.parametrize("sums", [None, [7, 2**32 - 1]])
def test_an_index_is_packed_as_its_format_says(sums):
    index = Index(
        5 * 512, 2**64 - 2, np.array([1, 2, 5], np.uint32), None if sums is None else np.array(sums, np.uint32)
    )
    words = [1, 2, 5, *(sums or [])]
    expected = b"TESSIDX\0" + struct.pack("<IIQQQ", 1 if sums is None else 2, 0, 5 * 512, 2**64 - 2, 2)
    assert pack_index(index) == expected + struct.pack(f"<{len(words)}I", *words)
    found = unpack_index(expected + struct.pack(f"<{len(words)}I", *words), "x")
    assert (found.tar_bytes, found.xxh3, found.offsets.tolist()) == (5 * 512, 2**64 - 2, [1, 2, 5])
    assert (None if found.sums is None else found.sums.tolist()) == sums


def packed(version, samples, words, tar_bytes=4096):
    return struct.pack("<8sIIQQQ", b"TESSIDX\0", version, 0, tar_bytes, 0, samples) + struct.pack(
        f"<{len(words)}I", *words
    )


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not an index of shards; run `tessera data index` on its tar"),
        (b"TESSIDX\0" + bytes(31), "not an index of shards"),
        (b"TESSIDX\1" + bytes(40), "not an index of shards"),
        (b"x" * 60, "not an index of shards"),
        (packed(1, 2, [0, 1]), "version 1, 2 samples, 48 bytes; damaged, index it again"),
        (packed(1, 2, [0, 1, 2, 3]), "version 1, 2 samples, 56 bytes; damaged"),
        (packed(2, 2, [0, 1, 2, 3]), "version 2, 2 samples, 56 bytes; damaged"),
        (packed(2, 2, [0, 1, 2, 3, 4, 5]), "version 2, 2 samples, 64 bytes; damaged"),
        (packed(1, 2, [0, 1, 2]) + b"x", "version 1, 2 samples, 53 bytes; damaged"),
        (packed(0, 0, [0]), "version 0, 0 samples, 44 bytes; damaged"),
        (packed(0, 0, []), "version 0, 0 samples, 40 bytes; damaged"),
        (packed(3, 0, [0]), "version 3, 0 samples, 44 bytes; damaged"),
        (packed(3, 1, [0, 1, 2]), "version 3, 1 samples, 52 bytes; damaged"),
        (packed(1, 2, [0, 1, 1]), "its samples are not in order within 4096 bytes; damaged, index it again"),
        (packed(1, 2, [1, 1, 2]), "its samples are not in order"),
        (packed(1, 2, [0, 2, 1]), "its samples are not in order"),
        (packed(1, 2, [0, 1, 9]), "its samples are not in order within 4096 bytes"),
        (packed(1, 2, [0, 1, 8], 4095), "its samples are not in order within 4095 bytes"),
        (packed(1, 1, [0, 2**32 - 1]), "its samples are not in order"),
        (packed(1, 0, [9]), "its samples are not in order"),
    ],
)
def test_what_is_no_index_is_refused_with_the_reason(data, message):
    with pytest.raises(DataError, match=f"^here: {message}"):
        unpack_index(data, "here")


@pytest.mark.parametrize("words", [[0, 1, 8], [7, 8], [8], [0]])
def test_an_index_may_reach_the_last_block_of_its_tar(words):
    samples = len(words) - 1
    assert unpack_index(packed(1, samples, words), "x").offsets.tolist() == words
    found = unpack_index(packed(2, samples, [*words, *range(samples)]), "x")
    assert (found.offsets.tolist(), found.sums.tolist()) == (words, list(range(samples)))


def test_the_index_of_a_shard_is_written_under_a_name_that_is_free_or_ours(tmp_path):
    storage = open_storage(tmp_path)
    data, _ = tar_of(b"abc")
    index, digest = index_tar([data], "x")
    shard = Shard("0.tar", 1, len(data), digest)
    for _ in range(2):  # the second time it is there already
        publish_index(storage, "0.tar", index)
        assert (tmp_path / "0.tar.idx").read_bytes() == pack_index(index)
        assert read_index(storage, shard).offsets.tolist() == index.offsets.tolist()
    assert storage.list() == ["0.tar.idx"]
    other = Index(index.tar_bytes, 7, index.offsets, index.sums)
    with pytest.raises(Conflict, match="0.tar.idx: exists with other contents; nothing was overwritten"):
        publish_index(storage, "0.tar", other)
    assert (tmp_path / "0.tar.idx").read_bytes() == pack_index(index)


def test_an_index_stands_beside_another_programs_and_is_found_there(tmp_path):
    storage = open_storage(tmp_path)
    data, _ = tar_of(b"abc")
    index, digest = index_tar([data], "x")
    shard = Shard("0.tar", 1, len(data), digest)
    (tmp_path / "0.tar.idx").write_bytes(b"of Energon")
    with pytest.raises(DataError, match=r"0\.tar\.idx: not an index of shards"):
        read_index(storage, shard)
    for _ in range(2):
        publish_index(storage, "0.tar", index)
        assert (tmp_path / "0.tar.idx").read_bytes() == b"of Energon"
        assert (tmp_path / "0.tar.tessera.idx").read_bytes() == pack_index(index)
        assert read_index(storage, shard).xxh3 == index.xxh3
    with pytest.raises(DataError, match=r"0\.tar\.tessera\.idx: 1 samples in 2048 bytes, the manifest has 2 in 2048;"):
        read_index(storage, Shard("0.tar", 2, len(data), digest))
    (tmp_path / "0.tar.idx").write_bytes(pack_index(Index(512, 0, np.array([0, 1], np.uint32))))
    with pytest.raises(DataError, match=r"0\.tar\.idx: 1 samples in 512 bytes, the manifest has 1 in 2048; the index"):
        read_index(storage, shard)  # ours counts under either name, the plain one first


def test_what_is_published_is_never_written_over(tmp_path):
    storage = open_storage(tmp_path)
    publish(storage, "x", b"one")
    publish(storage, "x", b"one")
    with pytest.raises(Conflict, match=f"^{re.escape(str(tmp_path))}/x: exists with other contents"):
        publish(storage, "x", b"two")
    assert (tmp_path / "x").read_bytes() == b"one"
