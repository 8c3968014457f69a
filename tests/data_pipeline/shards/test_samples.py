"""Samples of tars made elsewhere: a build, an index, `Stream`, a vocabulary and a report see the same ones."""

import io
import json
import re
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from webdataset import tariterators

from data_pipeline.errors import BadSample, DataError
from data_pipeline.images import decode_rgb
from data_pipeline.ingest.plan import FINAL_REASONS
from data_pipeline.ingest.report import write_report
from data_pipeline.ingest.sources import open_source
from data_pipeline.shards.codes import encode_rows
from data_pipeline.shards.manifest import MANIFEST, VERSION, Manifest, Shard, index_tar, open_dataset, publish_index
from data_pipeline.shards.samples import Unreadable, captions_of_json, label_of, parse_json
from data_pipeline.shards.tar import TarWriter, group_samples, is_litter, scan, split_names
from data_pipeline.shards.verify import index, verify
from data_pipeline.storage import open_storage
from data_pipeline.stream.reader import Stream, parse_sample
from data_pipeline.stream.sequential import read_tars
from data_pipeline.text.training import captions_of
from tests.data_pipeline.conftest import png

LINK = {"hard": tarfile.LNKTYPE, "symbolic": tarfile.SYMTYPE, "fifo": tarfile.FIFOTYPE, "device": tarfile.CHRTYPE}
CAT = ("a.txt", b"a cat")


def tar_of(entries, form=tarfile.PAX_FORMAT):
    """entries: (name, bytes), or (name, kind of link, target) -> the bytes of a tar."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as tar:
        for name, *rest in entries:
            info = tarfile.TarInfo(name)
            if isinstance(rest[0], bytes):
                info.size = len(rest[0])
                tar.addfile(info, io.BytesIO(rest[0]))
            else:
                info.type, info.linkname = LINK[rest[0]], rest[1]
                tar.addfile(info)
    return file.getvalue()


def in_one_line(text):
    """As the rules of a build clean a caption."""
    return " ".join(text.split())


@pytest.fixture
def everywhere(tmp_path, build_here):
    """everywhere(entries) -> (in, rejected, captions by key) as the build has them, after all others were the same."""

    def look(entries):
        tars = tmp_path / "tars"
        tars.mkdir()
        (tars / "00.tar").write_bytes(tar_of(entries))
        try:
            stats = build_here(source={"kind": "tars", "path": str(tars)}, output=str(tmp_path / "built"))
        except DataError as error:
            assert "rows were rejected" in str(error)
            stats = json.loads((tmp_path / "built/00000_stats.json").read_bytes())
        rows = pq.read_table(tmp_path / "built/00000.parquet").to_pylist()
        built = {row["key"].removeprefix("00/"): tuple(row["captions"]) for row in rows if row["status"] == "ok"}
        assert stats["in"] == stats["out"] + sum(stats["rejected"].values()) == len(rows)
        if not built:
            with pytest.raises(
                DataError, match=f"none of {len(rows)} samples can be read.*{next(iter(stats['rejected']))}"
            ):
                index([str(tars)], workers=1)
            return stats["in"], stats["rejected"], built
        told = index([str(tars)], workers=1)
        assert (told["samples"], told["readable"], told["rejected"]) == (stats["in"], len(built), stats["rejected"])
        rejected = Counter()
        streamed = {one.key: tuple(map(in_one_line, one.texts)) for one in Stream(tars, seed=0).readable(rejected)}
        assert (streamed, dict(rejected)) == (built, stats["rejected"])
        rejected = Counter()
        trained = map(in_one_line, captions_of(tars, 1000, rejected))
        assert list(trained) == [text for texts in built.values() for text in texts]
        assert dict(rejected) == stats["rejected"]
        page = Path(write_report(tars)).read_text(encoding="utf-8")
        assert f"{stats['in']} in = {len(built)} out + {sum(stats['rejected'].values())} rejected" in page
        assert all(re.search(rf">{reason}<.*?>{count}<", page) for reason, count in stats["rejected"].items())
        assert verify(tars)["samples"] == stats["in"]
        return stats["in"], stats["rejected"], built

    return look


# --------------------------------------------------------------------------------------------- captions


SHAPES = [
    ({"json": {"captions": "a red circle"}}, ["a red circle"]),
    ({"json": {"captions": ["one", "two"]}}, ["one", "two"]),
    ({"json": {"captions": ["one", None]}}, ["one"]),
    ({"json": {"caption": ["one", "two"]}}, ["one", "two"]),
    ({"json": {"caption": "one", "captions": None}}, ["one"]),
    ({"json": {"caption": "", "captions": [], "text": "seven"}}, ["seven"]),
    ({"json": {"text": "seven"}}, ["seven"]),
    ({"json": {"text": ["seven", "eight"]}}, ["seven", "eight"]),
    ({"json": ["one", "two"]}, ["one", "two"]),
    ({"json": "one"}, ["one"]),
    ({"json": {"caption": None}, "txt": b"of the txt"}, ["of the txt"]),
    ({"json": None, "txt": b"of the txt"}, ["of the txt"]),
    ({"json": {"url": "u"}, "txt": b"of the txt"}, ["of the txt"]),
    ({"json": {"caption": "two\nlines"}, "txt": b"two\nlines"}, ["two lines"]),
    ({"txt": b"one\ntwo\r\nthree\n\nfour\nfive"}, ["one", "two", "three", "four", "five"]),
    ({"txt": "\ufeffone".encode()}, ["one"]),
    ({"txt": "一只猫".encode("utf-16")}, ["一只猫"]),
    ({"json": {"caption": 5}}, "unreadable_caption"),
    ({"json": {"captions": {"en": "one"}}}, "unreadable_caption"),
    ({"json": {"captions": [1, 2]}}, "unreadable_caption"),
    ({"json": {"text": True}}, "unreadable_caption"),
    ({"json": 5}, "unreadable_caption"),
    ({"json": {"caption": None}}, "empty_caption"),
    ({"json": {"captions": []}}, "empty_caption"),
    ({"json": {}}, "empty_caption"),
    ({}, "empty_caption"),
    ({"txt": b" \n "}, "empty_caption"),
    ({"txt": b"caf\xe9"}, "unreadable_caption"),
    ({"json": b"{"}, "unreadable_caption"),
    ({"json": b"[" * 5000 + b"]" * 5000}, "unreadable_caption"),
]


@pytest.mark.slow
def test_captions_of_every_shape_are_read_alike_everywhere(everywhere, tmp_path, build_here):
    entries, expected, rejected = [], {}, Counter()
    for number, (files, captions) in enumerate(SHAPES):
        entries.append((f"{number:02d}.png", png(number)))
        for name, part in files.items():
            entries.append((f"{number:02d}.{name}", part if isinstance(part, bytes) else json.dumps(part).encode()))
        if isinstance(captions, str):
            rejected[captions] += 1
        else:
            expected[f"{number:02d}"] = tuple(captions)
    assert everywhere(entries) == (len(SHAPES), rejected, expected)
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, part in entries:
        (folder / name).write_bytes(part)
    stats = build_here(source={"kind": "folder", "path": str(folder)}, output=str(tmp_path / "of-folder"))
    rows = pq.read_table(tmp_path / "of-folder/00000.parquet").to_pylist()
    assert stats["rejected"] == rejected
    assert {row["key"]: tuple(row["captions"]) for row in rows if row["status"] == "ok"} == expected


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["captions", "caption", "text", "key", "url"]), inner, max_size=3),
    ),
    max_leaves=8,
)


@pytest.mark.slow
@settings(max_examples=200, deadline=None, derandomize=True)
@given(JSON, st.one_of(st.none(), st.binary(max_size=12), st.text(max_size=12).map(str.encode)))
def test_whatever_json_and_text_hold_captions_are_text_that_is_not_blank_or_a_reason_is_named(tree, text):
    files = [("k.png", b"image"), ("k.json", json.dumps(tree).encode())] + ([] if text is None else [("k.txt", text)])
    try:
        key, image, captions, _, meta = parse_sample(tar_of(files)[: -(-len(tar_of(files)) // 512) * 512], "x")
    except BadSample as fault:
        assert fault.reason == "unreadable_caption" and fault.key == "k" and "k" in str(fault)
        return
    assert image == b"image" and all(isinstance(text, str) and text.strip() for text in captions)
    assert isinstance(key, str) and not {"captions", "caption", "text"} & meta.keys() or captions
    "".join(captions).encode()


def test_halves_of_surrogate_pairs_do_not_reach_a_tokenizer():
    assert captions_of_json(parse_json(rb'{"caption": "a \ud83d cat"}'))[0] == ("a ? cat",)
    assert captions_of_json(parse_json(rb'{"caption": "a \ud83d\ude00 cat"}'))[0] == ("a \U0001f600 cat",)


@pytest.mark.parametrize(
    "contents", [b'{"n": 123456789012345678901234567890}', b'{"n": NaN, "m": 1}', b"\xef\xbb\xbf[1]"]
)
def test_json_is_read_as_the_standard_library_reads_it(contents):
    assert repr(parse_json(contents)) == repr(json.loads(contents.decode("utf-8-sig")))


@pytest.mark.parametrize("brackets", [b"[]", b'{"a":}'])
def test_json_nested_more_than_a_hundred_levels_is_refused_whatever_the_depth(brackets):
    opening, closing = brackets[:-1], brackets[-1:]
    for depth in (101, 1000, 100_000):
        with pytest.raises(ValueError, match="nested"):
            parse_json(opening * depth + b"1" + closing * depth)
    parse_json(opening * 100 + b"1" + closing * 100)


@pytest.mark.parametrize("text", [b"[" * 10**5, b'{"a":' * 10**5, b"[1]", b"\xff", b""])
def test_json_of_a_sample_that_is_none_makes_a_bad_sample(text):
    file = io.BytesIO()
    TarWriter(file).add("0", [("png", b"image"), ("json", text)])
    with pytest.raises(BadSample, match="here .'0'.: unreadable_caption"):
        parse_sample(file.getvalue(), "here")


# --------------------------------------------------------------------------------- members and their names


def test_links_and_devices_within_a_tar_are_counted(everywhere):
    entries = [("a.png", png(1)), CAT]
    for kind in LINK:
        entries += [(f"{kind}.png", kind, "a.png"), (f"{kind}.txt", b"b")]
    found = everywhere([*entries, ("c.png", png(3)), ("c.txt", b"c")])
    assert found == (len(LINK) + 2, {"linked_file": len(LINK)}, {"a": ("a cat",), "c": ("c",)})


@pytest.mark.slow
def test_a_link_to_a_caption_is_counted_and_one_to_what_is_not_read_changes_nothing(everywhere):
    entries = [("a.png", png(1)), CAT, ("b.png", png(2)), ("b.txt", "symbolic", "a.txt"), ("latest", "symbolic", "b")]
    entries += [("c.png", png(3)), ("c.cls", "hard", "a.txt"), ("c.txt", b"c")]
    assert everywhere(entries) == (4, {"linked_file": 1, "no_image": 1}, {"a": ("a cat",), "c": ("c",)})


@pytest.mark.slow
def test_a_member_that_occurs_twice_pairs_nothing(everywhere):
    twice = [("b.png", png(2)), ("b.txt", b"b")]
    entries = [("a.png", png(1)), CAT, ("c.png", png(4)), ("c.txt", b"c")]
    for second in ([("b.png", png(3))], [("b.txt", b"b2")], [("b.PNG", png(3)), ("b.txt", b"b2")]):
        again = [(f"{len(entries)}{name}", data) for name, data in (*twice, *second)]
        with pytest.raises(ValueError, match="duplicate file name"):
            list(tariterators.group_by_keys({"fname": name, "data": data, "__url__": ""} for name, data in again))
        entries += again
    assert everywhere(entries) == (5, {"duplicate_file": 3}, {"a": ("a cat",), "c": ("c",)})


@pytest.mark.slow
def test_what_archivers_leave_between_the_files_of_a_sample_is_not_part_of_it(everywhere):
    litter = ["._{}", "__MACOSX/d/._{}", ".DS_Store", "__meta__/x.json", "d/.{}.swp", "Thumbs.db", "__MACOSX/{}"]
    entries = []
    for number, left in enumerate(litter):
        for name, data in ((f"{number}.png", png(number)), (f"{number}.txt", b"t")):
            entries += [(left.format(name), b"Mac OS X"), (name, data)]
    expected = {str(number): ("t",) for number in range(len(litter))}
    assert everywhere([*entries, ("._z.png", b"")]) == (len(litter), {}, expected)


def test_images_first_and_texts_later_are_told_as_files_apart(everywhere):
    entries = [*((f"{key}.png", png(n)) for n, key in enumerate("ab")), *((f"{key}.txt", b"t") for key in "ab")]
    assert everywhere(entries) == (4, {"empty_caption": 2, "files_apart": 2}, {})


def test_files_that_are_apart_are_told_by_their_names_not_by_a_key_in_the_json(tmp_path):
    named = json.dumps({"key": "other", "caption": "a cat"}).encode()
    entries = [("a.png", png(1)), ("a.json", named), ("b.png", png(2)), ("b.txt", b"b"), ("a.txt", b"a")]
    (tmp_path / "00.tar").write_bytes(tar_of(entries))
    told = index([str(tmp_path)], workers=1)
    rejected = Counter()
    assert [sample.key for sample in Stream(tmp_path, seed=0).readable(rejected)] == ["other", "b"]
    assert told["rejected"] == rejected == {"files_apart": 1}


@pytest.mark.slow
def test_one_sample_whose_files_are_apart_does_not_cost_the_others(everywhere):
    entries = [("a.png", png(1)), CAT, ("b.png", png(2)), ("c.png", png(3)), ("c.txt", b"c"), ("b.txt", b"b")]
    assert everywhere(entries) == (4, {"empty_caption": 1, "files_apart": 1}, {"a": ("a cat",), "c": ("c",)})


def test_files_that_are_apart_are_not_tried_again_and_say_how_to_pack_them(tmp_path, build_here):
    (tmp_path / "00.tar").write_bytes(tar_of([("a.png", png(1)), ("b.png", png(2)), ("b.txt", b"b"), CAT]))
    tree = {"source": {"kind": "tars", "path": f"{tmp_path}/00.tar"}, "output": str(tmp_path / "out")}
    assert build_here(**tree)["rejected"] == {"empty_caption": 1, "files_apart": 1}
    rejects = pq.read_table(tmp_path / "out/rejects.parquet").to_pylist()
    [apart] = [row for row in rejects if row["reason"] == "files_apart"]
    assert "tar --sort=name" in apart["detail"] and "files_apart" in FINAL_REASONS


def test_numbers_between_dots_belong_to_the_key_and_other_names_follow_webdataset(everywhere):
    names = ["22.05.png", "22.05.txt", "22.06.png", "22.06.txt", "d/1.5.png", "d/1.5.txt", "d/2.5.png", "d/2.5.txt"]
    names += ["x.05-01.png", "x.05-01.txt", "x.05-02.PNG", "x.05-02.txt", "a.png", "a.seg.png", "a.1.png", "a.txt"]
    names += ["./v1.2/b.png", "./v1.2/b.txt"]
    entries = [(name, png(n) if name.lower().endswith("png") else b"t") for n, name in enumerate(names)]
    keys = ["22.05", "22.06", "d/1.5", "d/2.5", "x.05-01", "x.05-02", "a", "./v1.2/b"]
    assert everywhere(entries) == (len(keys), {}, dict.fromkeys(keys, ("t",)))


@pytest.mark.slow
def test_a_sample_without_an_image_by_webdatasets_names_is_one_rejection(everywhere):
    entries = [("a.png", png(1)), CAT, ("b.left.png", png(2)), ("b.right.png", png(3))]
    assert everywhere(entries) == (2, {"no_image": 1}, {"a": ("a cat",)})


# --------------------------------------------------------------------- samples without an image, and labels


def test_texts_without_images_are_samples_of_a_new_index_and_pairs_of_no_build(tmp_path, build_here):
    tars = tmp_path / "tars"
    tars.mkdir()
    entries = [("a.png", png(1)), CAT, ("b.txt", b"a dog"), ("c.json", b'{"captions": ["one", "two"], "url": "u"}')]
    (tars / "00.tar").write_bytes(tar_of([*entries, ("d.json", b'{"url": "u"}'), ("e.txt", b"caf\xe9")]))
    told = index([str(tars)], workers=1)
    assert told["rejected"] == {"no_image": 1, "unreadable_caption": 1} and told["readable"] == 3
    _, manifest = open_dataset(tars)
    assert manifest.version == 3 and verify(tars)["fingerprint"] == manifest.fingerprint
    rejected = Counter()
    found = {one.key: (one.image, one.texts, one.meta) for one in Stream(tars, seed=0).readable(rejected)}
    assert found == {
        "a": (png(1), ("a cat",), {}),
        "b": (None, ("a dog",), {}),
        "c": (None, ("one", "two"), {"url": "u"}),
    }
    assert rejected == told["rejected"]
    assert list(captions_of(tars, 10)) == ["a cat", "a dog", "one", "two"]
    page = Path(write_report(tars)).read_text(encoding="utf-8")
    assert "5 in = 3 out + 2 rejected" in page and "a dog" in page
    stats = build_here(source={"kind": "tars", "path": str(tars)}, output=str(tmp_path / "built"))
    assert stats["rejected"] == {"no_image": 3, "unreadable_caption": 1}


@pytest.mark.parametrize("version", [1, 2])
def test_texts_without_images_stay_rejected_in_datasets_that_were_indexed_before(version):
    for files in ([("b.txt", b"a dog")], [("b.txt", b"caf\xe9")], [("b.json", b"[")] if version == 2 else []):
        if files:
            with pytest.raises(BadSample) as raised:
                parse_sample(tar_of(files), "x", version)
            assert raised.value.reason == "no_image"


@pytest.mark.parametrize("order", ["images first", "texts first"])
def test_images_and_texts_stored_apart_are_refused_in_either_order(order, tmp_path):
    images = [(f"{n}.png", png(n)) for n in range(3)]
    texts = [(f"{n}.txt", b"a cat") for n in range(3)]
    (tmp_path / "0.tar").write_bytes(tar_of(images + texts if order == "images first" else texts + images))
    with pytest.raises(DataError, match="'files_apart': 3.*must be adjacent"):
        index([str(tmp_path)], workers=1)


LABELS = [
    (b"0", 0),
    (b"7\n", 7),
    (b" 999999999 ", 999_999_999),
    (b"007", 7),
    (b"", None),
    (b"-1", None),
    (b"1.0", None),
    (b"n01440764", None),
    (b"1 2", None),
    (b"\xd9\xa3", None),  # an Arabic digit
    (b"9" * 5000, None),
]


@pytest.mark.parametrize(("contents", "label"), LABELS)
@pytest.mark.parametrize("version", [1, 2, 3])
def test_a_label_is_the_number_in_cls_and_none_for_anything_else(contents, label, version):
    assert parse_sample(tar_of([("a.png", b"i"), ("a.cls", contents), CAT]), "x", version).label == label


def test_labelled_images_need_no_caption_and_keep_the_manifest_of_a_build(tmp_path):
    (tmp_path / "0.tar").write_bytes(tar_of([("a.png", png(1)), ("a.cls", b"3"), ("b.png", png(2)), ("b.cls", b"x")]))
    told = index([str(tmp_path)], workers=1)
    assert (told["readable"], told["rejected"]) == (1, {"empty_caption": 1})
    stream = Stream(tmp_path, seed=0)
    assert [(stream.fetch(n).label, stream.fetch(n).texts) for n in range(2)] == [(3, ()), (None, ())]
    assert open_dataset(tmp_path)[1].version == 1


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.binary(max_size=12))
def test_a_label_agrees_with_int_on_ascii_digits(contents):
    text = contents.strip(b" \t\n\r\x0b\x0c")
    expected = int(text) if text.isdigit() and len(text) < 10 else None
    assert label_of(contents) == expected


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_webdataset_sees_the_same_samples(tmp_path, form):
    names = ["a.jpg", "._a.jpg", "a.txt", "d/", "d/b.json", "d/b.seg.jpg", "d/b.JPG", "c.1.jpg", "c.txt"]
    files = [(name, name.encode()) for name in names if not name.endswith("/")]
    (tmp_path / "x.tar").write_bytes(tar_of(files, form))
    found = []
    for group in group_samples(scan(io.BytesIO((tmp_path / "x.tar").read_bytes()), "x")):
        named = split_names([member.name for member in group])
        found.append((named[0][0], [extension for _, extension in named]))
    peer = webdataset.WebDataset([str(tmp_path / "x.tar")], shardshuffle=False)
    assert found == [(one["__key__"], [name for name in one if not name.startswith("__")]) for one in peer]


NAMES = st.lists(st.text(alphabet="ab01._/-", min_size=1, max_size=9), min_size=1, max_size=6)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(NAMES)
def test_no_member_is_lost_or_counted_twice_whatever_the_names(names):
    data = tar_of([(name, name.encode()) for name in names])
    members = list(scan(io.BytesIO(data), "x"))
    grouped = [member for group in group_samples(members) for member in group]
    assert grouped == [member for member in members if not is_litter(member.name)]
    groups = [[member.name for member in group] for group in group_samples(members)]
    assert all(len({key for key, _ in split_names(group)}) == 1 for group in groups)
    found, _ = index_tar([data], "x", version=2)
    assert found.samples == len(groups)


def test_tars_read_in_sequence_count_what_cannot_be_read_or_raise(tmp_path):
    (tmp_path / "00.tar").write_bytes(
        tar_of([("a.png", png(1)), ("b.png", "hard", "a.png"), ("c.png", png(2)), ("d", b"")])
    )
    rejected = Counter()
    assert [sample.key for sample in read_tars(f"{tmp_path}/00.tar", rejected=rejected)] == ["a", "c"]
    assert rejected == {"linked_file": 1, "no_image": 1}
    with pytest.raises(BadSample, match="linked_file, png is a hard link to 'a.png'"):
        list(read_tars(f"{tmp_path}/00.tar"))


# ------------------------------------------------------------------------------------------ compressed tars


@pytest.mark.parametrize("name", ["00.tar.gz", "00.tgz", "00.tar.zst", "00.tar.bz2", "00.tbz2", "00.tar.xz", "00.txz"])
@pytest.mark.parametrize("beside", [False, True])
def test_compressed_tars_are_refused_with_what_to_do_and_never_passed_over(tmp_path, build_here, name, beside):
    (tmp_path / name).write_bytes(b"packed")
    if beside:
        (tmp_path / "01.tar").write_bytes(tar_of([("a.png", png(1)), CAT]))
    for pattern in (str(tmp_path), f"{tmp_path}/{name}"):
        with pytest.raises(DataError, match=rf"1 compressed files, such as {re.escape(name)}.*decompress"):
            build_here(source={"kind": "tars", "path": pattern}, output=str(tmp_path / "out"))
        with pytest.raises(DataError, match=rf"1 compressed files, such as {re.escape(name)}.*decompress"):
            index([pattern], workers=1)


@pytest.mark.parametrize("name", ["00.zst", "00.bz2", "00.gz", "00.zip"])
def test_a_folder_of_other_compressed_files_says_that_they_are(tmp_path, build_here, name):
    (tmp_path / name).write_bytes(b"packed")
    with pytest.raises(DataError, match="compressed files"):
        build_here(source={"kind": "tars", "path": str(tmp_path)}, output=str(tmp_path / "out"))
    with pytest.raises(DataError, match="compressed files"):
        index([str(tmp_path)], workers=1)
    (tmp_path / "01.tar").write_bytes(tar_of([("a.png", png(1)), CAT]))
    assert index([str(tmp_path)], workers=1)["samples"] == 1


@pytest.mark.parametrize("pack", ["gzip", "bz2", "lzma"])
def test_a_tar_that_is_compressed_under_a_plain_name_is_told_as_that(tmp_path, build_here, pack):
    (tmp_path / "00.tar").write_bytes(__import__(pack).compress(tar_of([("a.png", png(1)), CAT])))
    for read in (
        lambda: build_here(source={"kind": "tars", "path": str(tmp_path)}, output=str(tmp_path / "out")),
        lambda: index([str(tmp_path)], workers=1),
        lambda: list(read_tars(f"{tmp_path}/00.tar")),
    ):
        with pytest.raises(DataError, match="it is compressed"):
            read()


def test_a_table_whose_images_lie_in_a_compressed_tar_says_so(tmp_path, make_config):
    (tmp_path / "x.csv").write_text("image,caption\na.png,c\n")
    (tmp_path / "images.tar.gz").write_bytes(b"packed")
    source = {"kind": "csv", "path": f"{tmp_path}/x.csv", "images": "images.tar.gz"}
    with pytest.raises(DataError, match="compressed files, such as images.tar.gz"):
        list(open_source(make_config(source=source, output="unused").source).rows(0, 1))


# ------------------------------------------------------------------------------------- datasets of before


def indexed_by_version_1(folder):
    """What `tessera data index` left before: version 1 of the manifest and of the grouping."""
    storage, shards = open_storage(folder), []
    for path in sorted(folder.glob("*.tar")):
        found, digest = index_tar([path.read_bytes()], path.name)
        publish_index(storage, path.name, found)
        shards.append(Shard(path.name, found.samples, found.tar_bytes, digest))
    (folder / MANIFEST).write_bytes(Manifest(tuple(shards)).to_json())


def test_a_dataset_that_was_indexed_before_stays_what_it_was(tmp_path):
    entries = [("a.png", png(1)), ("a.txt", b"one\ntwo"), ("._b.png", b"Mac"), ("b.png", png(2)), ("b.txt", b"b")]
    entries += [("c.png", "hard", "a.png"), ("c.txt", b"c")]
    (tmp_path / "00.tar").write_bytes(tar_of(entries))
    indexed_by_version_1(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*[rxn]")}
    told = index([str(tmp_path)], workers=1)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*[rxn]")} == before and len(before) == 3
    _, manifest = open_dataset(tmp_path)
    assert (manifest.version, manifest.samples, told["fingerprint"]) == (VERSION, 4, manifest.fingerprint)
    assert verify(tmp_path)["fingerprint"] == manifest.fingerprint
    rejected = Counter()
    assert [sample.texts for sample in Stream(tmp_path, seed=0).readable(rejected)] == [("one\ntwo",), ("b",)]
    assert rejected == {"no_image": 2} == told["rejected"]


def test_the_tars_of_a_build_are_the_same_samples_by_both_versions(scenes):
    for path in sorted(scenes.glob("*.tar")):
        first, _ = index_tar([path.read_bytes()], "x", version=1)
        second, _ = index_tar([path.read_bytes()], "x", version=2)
        assert first.offsets.tolist() == second.offsets.tolist() and first.sums.tolist() == second.sums.tolist()


OF_JSON = b'{"caption": "of json", "url": "u"}'
VERSION_1 = [
    # files, captions; of the image b"first" unless there is none
    ([("jpg", b"first"), ("png", b"second")], ()),
    ([("png", b"first"), ("png", b"second"), ("txt", b"one"), ("TXT", b"two")], ("two",)),
    ([("png", b"first"), ("json", b'{"captions": ["one"]}'), ("json", b'{"captions": ["two"]}')], ("two",)),
    ([("png", b"first"), ("json", OF_JSON), ("txt", b"two\nlines")], ("two\nlines",)),
    ([("png", b"first"), ("json", OF_JSON)], ("of json",)),
    ([("png", b"first"), ("json", b'{"captions": ["list"]}'), ("txt", b"t")], ("list",)),
    ([("png", b"first"), ("json", b'{"captions": [], "caption": "c"}'), ("txt", b"t")], ()),
    ([("png", b"first"), ("json", b'{"text": "seven"}')], ()),
    ([("png", b"first"), ("txt", b" ")], (" ",)),
    ([("png", b"first"), ("txt", "\ufeffone".encode())], ("\ufeffone",)),
    ([("png", b"first"), ("json", '{"caption": "of json"}'.encode("utf-16"))], ("of json",)),
    ([("05.png", b"first"), ("txt", b"t")], "no_image"),
    ([("05.png", b"first")], "no_image"),
    ([("ico", b"first"), ("txt", b"t")], "no_image"),
    ([("png", b"first"), ("txt", "one".encode("utf-16"))], "unreadable_caption"),
    ([("png", b"first"), ("json", b"["), ("json", b"{}")], "unreadable_caption"),
    ([("png", b"first"), ("json", b'["one"]')], "unreadable_caption"),
    ([("png", b"first"), ("json", b"[" * 10**5)], "unreadable_caption"),
    ([("png", b"first"), ("json", b'{"caption": 5}')], ()),
    ([("png", b"first"), ("json", b'{"captions": ["one", null]}')], ("one",)),
    ([("png", b"first"), ("json", b'{"captions": 5}')], "unreadable_caption"),
]


@pytest.mark.parametrize(("files", "expected"), VERSION_1)
def test_a_sample_of_version_1_is_read_as_it_was(files, expected):
    data = tar_of([(f"a.{extension}", contents) for extension, contents in files])
    if isinstance(expected, str):
        with pytest.raises(BadSample) as raised:
            parse_sample(data, "x", version=1)
        assert (raised.value.reason, raised.value.key) == (expected, "a")
    else:
        assert parse_sample(data, "x", version=1)[:3] == ("a", b"first", expected)


def test_attributes_and_links_of_version_1_are_those_that_it_had():
    files = [("a.png", b"first"), ("a.json", b'{"caption": "c", "key": "k", "url": "u"}'), ("a.txt", "hard", "b.txt")]
    assert parse_sample(tar_of(files), "x", version=1) == ("k", b"first", ("c",), None, {"caption": "c", "url": "u"})


# ------------------------------------------------------------------------------------------------- codes


def test_codes_are_those_of_the_image_whatever_stands_before_it(tmp_path):
    class Mean:
        id, image_size, codes_per_image, codebook_size = "0" * 12, 16, 1, 256

        def encode(self, images):
            return images.mean(axis=(1, 2, 3)).astype(np.uint16)[:, None]

    entries = [("a.cls", b"7"), ("._a.png", b"Mac"), ("a.png", png(1)), CAT]
    (tmp_path / "00.tar").write_bytes(tar_of(entries))
    index([str(tmp_path)], workers=1)
    storage, manifest = open_dataset(tmp_path)
    assert encode_rows(storage, manifest.shards[0], [0], Mean())[0, 0, 0] == int(decode_rgb(png(1)).mean())


def test_a_reason_is_a_word_and_a_detail_is_for_people():
    fault = Unreadable("k", "no_image", "why")
    assert (fault.key, fault.reason, str(fault)) == ("k", "no_image", "why")


IMAGE, JSON = ("a.jpg", b"image"), ("a.json", b'{"captions": ["a cat"]}')


@pytest.mark.parametrize(
    ("files", "version"),
    [
        ([IMAGE, JSON], 1),
        ([IMAGE, CAT], 1),
        ([IMAGE, ("b.jpg", b"image")], 1),
        ([IMAGE, ("a.txt", b"a cat\na dog")], 2),  # one caption by version 1
        ([IMAGE, ("a.json", b'{"text": "a cat"}')], 2),
        ([("._a.jpg", b"mac"), IMAGE, JSON], 2),
        ([IMAGE, JSON, ("__MACOSX/a.jpg", b"mac")], 2),
        ([IMAGE, JSON, ("a.png", "hard", "a.jpg"), ("z.jpg", b"image")], 2),
        ([("b.txt", "symbolic", "a.txt"), IMAGE, JSON], 2),
        ([IMAGE, ("a.jpg", b"again"), JSON, ("z.jpg", b"image")], 2),
        ([("22.05.jpg", b"image"), ("22.06.jpg", b"image")], 2),
        ([IMAGE, ("a.cls", b"7")], 1),
        ([IMAGE, JSON, ("b.json", b"{}")], 1),
        ([IMAGE, JSON, ("b.txt", b"a dog")], 3),
        ([("b.txt", b"a dog")], 3),
    ],
)
def test_tars_that_both_versions_read_alike_get_the_manifest_that_they_had(files, version, tmp_path):
    (tmp_path / "0.tar").write_bytes(tar_of(files))
    told = index([str(tmp_path)], workers=1)
    _, manifest = open_dataset(tmp_path)
    assert (manifest.version, manifest.fingerprint) == (version, told["fingerprint"])
