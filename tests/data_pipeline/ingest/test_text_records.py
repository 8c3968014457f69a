"""Physical lines -> records of csv, tsv and jsonl, beside Python's csv module and a for-loop over characters."""

import csv
import io
import json

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.config import BuildConfig, TableSource
from data_pipeline.errors import ConfigError, DataError
from data_pipeline.ingest import tables
from data_pipeline.ingest.run import retry
from data_pipeline.ingest.sources import open_source
from data_pipeline.ingest.text_records import TextRecords
from data_pipeline.settings import check_settings
from data_pipeline.stream.reader import Stream

COLUMNS = ("key", "caption", "image")
FIELD = st.text(st.sampled_from('ab",\n\r\té 4'), max_size=6)
LINE_ENDS = ("\n", "\r\n")


def records_of(data, kind="csv", place=None, **more):
    source = TableSource(kind=kind, path="x", columns=None if kind == "jsonl" else COLUMNS, **more)
    return list(TextRecords(io.BytesIO(data), "x", source, place))


def reason_of(record):
    return record["\0reason"] if isinstance(record, dict) else None


# --------------------------------------------------------------------------------------------- the oracle


def split_by_hand(text):
    """The fields of one csv record by RFC 4180, character by character; None where a field stays open, "" where a
    closing quotation mark is followed by something else than a delimiter."""
    fields, at = [], 0
    while True:
        if text[at : at + 1] == '"':
            field, at = "", at + 1
            while text[at : at + 1] != '"' or text[at : at + 2] == '""':
                if at >= len(text):
                    return None
                field += text[at]
                at += 2 if text[at] == '"' else 1
            at += 1
        else:
            field = ""
            while at < len(text) and text[at] not in ",\n":
                field, at = field + text[at], at + 1
        fields.append(field)
        if at == len(text) or text[at] == "\n":
            return fields
        if text[at] != ",":
            return ""
        at += 1


def records_by_hand(lines):
    """[(number of its first line, fields or "unclosed_quote")]"""
    found, number = [], 0
    while number < len(lines):
        if not lines[number].strip("\n"):
            number += 1
            continue
        stop = number + 1
        while (fields := split_by_hand("".join(lines[number:stop]))) is None and stop < len(lines):
            stop += 1
        whole = bool(fields) and (stop == number + 1 or len(fields) == len(COLUMNS))
        found.append((number + 1, fields if whole else "unclosed_quote"))
        number = stop if whole else number + 1
    return found


@pytest.mark.slow
@settings(max_examples=600, deadline=None)
@given(st.lists(st.text(st.sampled_from('ab",4 '), max_size=9), max_size=9), st.booleans())
def test_every_physical_line_is_accounted_for_once_as_a_for_loop_does(lines, ended):
    lines = [line + "\n" for line in lines]
    if lines and not ended:
        lines[-1] = lines[-1][:-1]
    found = records_of("".join(lines).encode())
    expected = records_by_hand(lines)
    assert [(place.number, reason_of(record) or record) for place, record in found] == expected
    for place, _ in found:
        assert place.offset == len("".join(lines[: place.number - 1]))


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(FIELD, FIELD, FIELD), max_size=8), st.sampled_from(LINE_ENDS), st.booleans())
def test_what_the_csv_module_writes_is_what_it_reads(rows, end, all_quoted):
    if not all_quoted:  # the module writes a carriage return without quotation marks, and cannot read it back
        rows = [tuple(field.replace("\r", "") for field in row) for row in rows]
    file = io.StringIO(newline="")
    quoting = csv.QUOTE_ALL if all_quoted else csv.QUOTE_MINIMAL
    csv.writer(file, lineterminator=end, quoting=quoting).writerows(rows)
    found = [record for _, record in records_of(file.getvalue().encode())]
    assert found == list(csv.reader(io.StringIO(file.getvalue(), newline=""))) == [list(row) for row in rows]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.sampled_from([b'"', b",", b"a", b"\n", b"\r\n", b"\xe9", "é".encode(), b"4", b"\t", b"{}"])).map(
        b"".join
    ),
    st.sampled_from(["csv", "tsv", "jsonl"]),
    st.sampled_from([None, True, False]),
)
def test_reading_from_any_record_on_gives_the_rest_of_the_records(data, kind, quotes):
    everything = records_of(data, kind, quotes=quotes)
    for number, (place, _) in enumerate(everything):
        assert records_of(data, kind, place, quotes=quotes) == everything[number:]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters='\n\r\ufeff"')), max_size=6),
    st.sampled_from(["utf-8", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"]),
    st.sampled_from(["\n", "\r\n", "\r"]),
    st.sampled_from(["tsv", "csv"]),
)
def test_lines_of_every_marked_encoding_are_the_same(lines, codec, end, kind):
    text = end.join(["first", *lines, "last"]) + end
    found = [record for _, record in records_of(("\ufeff" + text).encode(codec), kind)]
    delimiter = "\t" if kind == "tsv" else ","
    assert found == [line.split(delimiter) for line in ["first", *lines, "last"] if line]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=6).map(lambda data: data.translate(None, b'\n\r"') or b"a"), min_size=1))
def test_a_line_that_is_not_text_is_rejected_at_its_byte(lines):
    data = b"\n".join([b"plain", *lines])
    for place, record in records_of(data, "tsv"):
        line = data[place.offset :].split(b"\n")[0]
        try:
            assert record == line.decode().lstrip("\ufeff").split("\t")
        except UnicodeDecodeError as error:
            at = place.offset + error.start
            assert reason_of(record) == "wrong_encoding"
            assert record["\0unreadable"] == f"line {place.number}: byte 0x{data[at]:02x} at {at} is not UTF-8"


# ------------------------------------------------------------------------------------------------- builds


@pytest.fixture
def images(tmp_path, make_png):
    for number in range(9):
        (tmp_path / f"{number}.png").write_bytes(make_png(number))


def built(tmp_path, build_here, kind, data, **more):
    """-> (stats, {key: captions} of what is stored, {key: (reason, detail)} of what is rejected)."""
    (tmp_path / f"x.{kind}").write_bytes(data)
    source = {"kind": kind, "path": f"{tmp_path}/x.{kind}", **more}
    stats = build_here(source=source, output=f"{tmp_path}/out", shard_size=2)
    stream = Stream(tmp_path / "out", seed=0)
    samples = [stream.fetch(number) for number in range(stream.samples)]
    rejects = pq.read_table(tmp_path / "out/rejects.parquet").to_pylist()
    assert stats["in"] == stats["out"] + sum(stats["rejected"].values())
    return (
        stats,
        {sample.key: sample.texts for sample in samples},
        {row["key"]: (row["reason"], row["detail"]) for row in rejects},
    )


AWKWARD = {
    "a": ('4" nails', '4" nails'),
    "b": ('"5"" bolts"', '5" bolts'),
    "c": ('"never closed', None),
    "d": ('"two\nlines"', "two lines"),
    "e": ('"6" boards"', None),
    "f": ("fine", "fine"),
    "g": ('"never closed either', None),
}


def test_inches_and_open_quotation_marks_cost_their_own_lines_of_a_csv(tmp_path, build_here, images):
    rows = [f"{key},{written},{number}.png" for number, (key, (written, _)) in enumerate(AWKWARD.items())]
    data = "\n".join(["key,caption,image", *rows]).encode()
    stats, stored, rejected = built(tmp_path, build_here, "csv", data, key="key")
    assert stored == {key: (caption,) for key, (_, caption) in AWKWARD.items() if caption}
    assert (stats["in"], stats["rejected"]) == (7, {"unclosed_quote": 3})
    numbers = {key: detail.split(":")[0] for key, (_, detail) in rejected.items()}
    assert numbers == {"c": "line 4", "e": "line 7", "g": "line 9"}
    assert all("write a literal quotation mark twice" in detail for _, detail in rejected.values())


def test_a_quotation_mark_is_a_letter_in_a_tsv(tmp_path, build_here, images):
    captions = ['4" nails', '"never closed', 'says "no"', '"quoted"', '"']
    rows = [f"k{number}\t{caption}\t{number}.png" for number, caption in enumerate(captions)]
    data = "\n".join(["key\tcaption\timage", *rows]).encode()
    stats, stored, _ = built(tmp_path, build_here, "tsv", data, key="key")
    assert (stats["in"], stats["rejected"]) == (5, {})
    assert list(stored.values()) == [(caption,) for caption in captions]


def test_a_tsv_with_quoted_column_names_is_told_how_to_read_it(tmp_path, build_here, images):
    with pytest.raises(ConfigError, match=r"source.image='image': not a column.*source.quotes=true"):
        built(tmp_path, build_here, "tsv", b'"image"\t"caption"\n"0.png"\t"a cat"\n')
    stats, stored, _ = built(tmp_path, build_here, "tsv", b'"image"\t"caption"\n"0.png"\t"a cat"\n', quotes=True)
    assert (stats["rejected"], list(stored.values())) == ({}, [("a cat",)])


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
def test_latin_1_rows_are_rejected_at_their_byte_or_read_as_what_the_encoding_says(
    kind, tmp_path, build_here, images, make_config
):
    rows = [("0.png", "a cat"), ("1.png", "un café"), ("2.png", "a dog")]
    if kind == "jsonl":
        lines = [json.dumps({"image": image, "caption": text}, ensure_ascii=False) for image, text in rows]
    else:
        lines = [("," if kind == "csv" else "\t").join(row) for row in [("image", "caption"), *rows]]
    data = "\n".join(lines).encode("latin-1")
    stats, stored, rejected = built(tmp_path, build_here, kind, data)
    assert (stats["in"], stats["rejected"]) == (3, {"wrong_encoding": 1})
    number = 2 if kind == "jsonl" else 3
    expected = f"line {number}: byte 0xe9 at {data.index(0xE9)} is not UTF-8"
    assert rejected == {"000000001": ("wrong_encoding", expected)}
    source = make_config(
        source={"kind": kind, "path": f"{tmp_path}/x.{kind}", "encoding": "latin-1"}, output="unused"
    ).source
    assert [row.captions for row in open_source(source).rows(0, 3)] == [("a cat",), ("un café",), ("a dog",)]


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "json"])
@pytest.mark.parametrize("codec", ["utf-8", "utf-16-le", "utf-16-be"])
def test_tables_with_a_byte_order_mark_are_told_by_it(kind, codec, tmp_path, build_here, images):
    rows = [{"key": f"k{n}", "image": f"{n}.png", "caption": f"ein Bär {n} ਊ"} for n in range(5)]
    if kind in ("json", "jsonl"):
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        text = f"[{','.join(lines)}]" if kind == "json" else "\r\n".join(lines)
    else:
        delimiter = "," if kind == "csv" else "\t"
        text = "".join(delimiter.join(row) + "\r\n" for row in [rows[0].keys(), *(row.values() for row in rows)])
    stats, stored, _ = built(tmp_path, build_here, kind, ("\ufeff" + text).encode(codec), key="key")
    assert (stats["in"], stats["rejected"]) == (5, {})
    assert stored == {row["key"]: (row["caption"],) for row in rows}


def test_column_names_that_cannot_be_read_are_refused_with_the_remedy(tmp_path, build_here, images):
    with pytest.raises(DataError, match="x.csv: cannot read the header line.*0xe9 at 7 is not UTF-8.*source.encoding"):
        built(tmp_path, build_here, "csv", "image,légende\n0.png,a\n".encode("latin-1"))


@pytest.mark.parametrize("encoding", ["rot13", "nonsense", "unicode_escape"])
def test_an_encoding_that_is_none_of_text_files_is_refused(encoding, make_config):
    with pytest.raises(ConfigError, match="not a text encoding"):
        make_config(source={"kind": "csv", "path": "x.csv", "encoding": encoding}, output="unused")


def test_captions_beside_images_are_read_as_the_encoding_says(tmp_path, build_here, make_png):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/a.png").write_bytes(make_png())
    (tmp_path / "raw/a.txt").write_bytes("un café".encode("latin-1"))
    with pytest.raises(DataError, match="unreadable_caption 1"):
        build_here(source={"kind": "folder", "path": f"{tmp_path}/raw"}, output=f"{tmp_path}/first")
    stats = build_here(
        source={"kind": "folder", "path": f"{tmp_path}/raw", "encoding": "latin-1"}, output=f"{tmp_path}/second"
    )
    assert (stats["out"], Stream(tmp_path / "second", seed=0).fetch(0).texts) == (1, ("un café",))


# ------------------------------------------------------------------------ datasets that were built before


def old_pin(path):
    """The pin as it was written before sources had a parse rule."""
    tree = json.loads(path.read_text())
    assert tree["source"].pop("parse_rule") == 1 and tree["source"].pop("encoding") is None
    path.write_text(json.dumps(tree))


@pytest.mark.parametrize("kind", ["csv", "tsv"])
def test_a_dataset_that_was_begun_before_keeps_its_parse_rule(kind, tmp_path, build_here, make_config, make_png):
    (tmp_path / "0.png").write_bytes(make_png())
    rows = ["image,caption", '0.png,"open', "1.png,b", '2.png,c" d', "3.png,e", ""]
    (tmp_path / f"x.{kind}").write_text("\n".join(rows).replace(",", "\t" if kind == "tsv" else ","))
    source = {"kind": kind, "path": f"{tmp_path}/x.{kind}"}
    tree = {"source": source, "output": f"{tmp_path}/out"}
    build_here(source={**source, "parse_rule": 1}, output=f"{tmp_path}/out")
    old_pin(tmp_path / "out/build.json")
    (tmp_path / "3.png").write_bytes(make_png(3))
    assert build_here(**tree)["rejected"] == {"unreadable_file": 1}  # the same command again changes nothing
    stats = retry(make_config(**tree), progress=False)
    assert (stats["in"], stats["out"], stats["rejected"]) == (2, 2, {})
    stream = Stream(tmp_path / "out", seed=0)
    assert [stream.fetch(number).key for number in range(2)] == ["000000000", "000000001"]
    assert stream.fetch(1).image == make_png(3)
    with (tmp_path / f"x.{kind}").open("a") as file:
        file.write("0.png,f\n".replace(",", "\t" if kind == "tsv" else ","))
    grown = build_here(**tree, grow=True)
    assert (grown["in"], grown["out"]) == (3, 3)


def test_a_dataset_of_today_states_its_parse_rule(tmp_path, build_here, images):
    built(tmp_path, build_here, "csv", b"image,caption\n0.png,a\n")
    assert json.loads((tmp_path / "out/build.json").read_text())["source"]["parse_rule"] == 2


def test_ranges_of_a_table_of_several_strides_are_those_parts_of_it(tmp_path, make_config, monkeypatch):
    monkeypatch.setattr(tables, "STRIDE", 4)
    written = [
        'http://h/{},"open',
        "http://h/{},plain",
        'http://h/{},"two\nlines"',
        'http://h/{},4" nails',
        "",
        "http://h/{},caf\udce9",
    ]
    text = "\n".join(written[number % len(written)].format(number) for number in range(60))
    (tmp_path / "x.csv").write_bytes(("image,caption\n" + text).encode("utf-8", "surrogateescape"))
    config: BuildConfig = make_config(source={"kind": "csv", "path": f"{tmp_path}/x.csv"}, output="unused")
    source = open_source(config.source)
    everything = list(source.rows(0, source.count()))
    assert len(everything) == 50
    for start in range(0, 50, 3):
        for stop in range(start, 51, 4):
            assert list(source.rows(start, stop)) == everything[start:stop]


# ------------------------------------------------------------------------------------- retry without keys


def check(**tree):
    return check_settings(BuildConfig, tree, "test")


CHANGES = {
    "a line deleted": lambda lines: lines[:1] + lines[2:],
    "a line inserted": lambda lines: [*lines[:1], lines[3], *lines[1:]],
    "lines swapped": lambda lines: [lines[0], lines[2], lines[1], *lines[3:]],
    "a line edited": lambda lines: [*lines[:3], lines[3].replace("2", "0"), *lines[4:]],
    "all but one": lambda lines: lines[:2],
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "json", "parquet"])
def test_retry_without_keys_refuses_a_source_that_is_another(kind, change, tmp_path, build_here, images):
    def write(lines):
        rows = [dict(zip(("image", "caption"), line.split(","), strict=True)) for line in lines[1:]]
        path = tmp_path / f"x.{kind}"
        if kind == "parquet":
            pq.write_table(tables.pyarrow.Table.from_pylist(rows), path)
        elif kind == "json":
            path.write_text(json.dumps(rows))
        elif kind == "jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            path.write_text("".join(line.replace(",", "\t" if kind == "tsv" else ",") + "\n" for line in lines))

    lines = ["image,caption", "0.png,c 0", "1.png,c 1", "gone.png,c 2", "3.png,c 3"]
    write(lines)
    tree = {"source": {"kind": kind, "path": f"{tmp_path}/x.{kind}"}, "output": f"{tmp_path}/out"}
    assert build_here(**tree)["rejected"] == {"unreadable_file": 1}
    write(CHANGES[change](lines))
    with pytest.raises(DataError, match=f"x.{kind}: .*out was built from other contents"):
        retry(check(**tree), progress=False)
    write(lines)
    (tmp_path / "gone.png").write_bytes((tmp_path / "2.png").read_bytes())
    assert retry(check(**tree), progress=False)["rejected"] == {}
    stream = Stream(tmp_path / "out", seed=0)
    assert [stream.fetch(number).texts for number in range(4)] == [("c 0",), ("c 1",), ("c 3",), ("c 2",)]


def test_retry_without_keys_refuses_a_source_of_fewer_files(tmp_path, build_here, images):
    for name, image in (("a", "0.png"), ("b", "gone.png")):
        (tmp_path / f"{name}.csv").write_text(f"image,caption\n{image},c\n")
    source = {"kind": "csv", "path": f"{tmp_path}/a.csv::{tmp_path}/b.csv"}
    build_here(source=source, output=f"{tmp_path}/out")
    with pytest.raises(DataError, match="1 files, .*out was built from 2"):
        retry(check(source={**source, "path": f"{tmp_path}/a.csv"}, output=f"{tmp_path}/out"), progress=False)


def test_retry_by_keys_finds_the_row_after_a_line_was_deleted(tmp_path, build_here, images):
    rows = ["k0,0.png,c 0", "k1,1.png,c 1", "k2,gone.png,c 2", "k3,3.png,c 3"]
    (tmp_path / "x.csv").write_text("\n".join(["id,image,caption", *rows]))
    tree = {"source": {"kind": "csv", "path": f"{tmp_path}/x.csv", "key": "id"}, "output": f"{tmp_path}/out"}
    build_here(**tree)
    (tmp_path / "x.csv").write_text("\n".join(["id,image,caption", *rows[1:]]))
    (tmp_path / "gone.png").write_bytes((tmp_path / "2.png").read_bytes())
    assert retry(check(**tree), progress=False)["rejected"] == {}
    assert (Stream(tmp_path / "out", seed=0).fetch(3).key, Stream(tmp_path / "out", seed=0).fetch(3).texts) == (
        "k2",
        ("c 2",),
    )


READ_OTHERWISE = [{"quotes": False}, {"columns": ["image", "caption"]}, {"parse_rule": 1}]


@pytest.mark.parametrize("change", READ_OTHERWISE)
def test_retry_without_keys_refuses_to_read_the_same_file_otherwise(change, tmp_path, build_here, images):
    (tmp_path / "x.csv").write_text('image,caption\n0.png,"two\nlines"\n1.png,c 1\ngone.png,c 2\n3.png,c 3\n')
    tree = {"source": {"kind": "csv", "path": f"{tmp_path}/x.csv"}, "output": f"{tmp_path}/out"}
    build_here(**tree)
    with pytest.raises(DataError, match=f"rows are identified by source.{next(iter(change))}="):
        retry(check(**{**tree, "source": {**tree["source"], **change}}), progress=False)


def test_retry_reads_rejected_rows_with_the_encoding_that_is_said_then(tmp_path, build_here, images):
    (tmp_path / "x.csv").write_bytes("image,caption\n0.png,un café\n1.png,c 1\n".encode("latin-1"))
    tree = {"source": {"kind": "csv", "path": f"{tmp_path}/x.csv"}, "output": f"{tmp_path}/out"}
    assert build_here(**tree)["rejected"] == {"wrong_encoding": 1}
    assert (
        retry(check(**{**tree, "source": {**tree["source"], "encoding": "cp1252"}}), progress=False)["rejected"] == {}
    )
    sample = Stream(tmp_path / "out", seed=0).fetch(1)
    assert (sample.key, sample.texts) == ("000000000", ("un café",))


@pytest.mark.parametrize("added, fits", [("2.png,c\n", False), ("\n2.png,c\n", True), ("\r\n2.png,c\n", True)])
def test_growth_without_keys_goes_on_in_a_new_line_alone(added, fits, tmp_path, build_here, images):
    (tmp_path / "x.csv").write_text("image,caption\n0.png,a\n1.png,b")
    tree = {"source": {"kind": "csv", "path": f"{tmp_path}/x.csv"}, "output": f"{tmp_path}/out"}
    build_here(**tree)
    with (tmp_path / "x.csv").open("a", newline="") as file:
        file.write(f"{added}3.png,d\n")
    if fits:
        assert build_here(**tree, grow=True)["out"] == 4
    else:
        with pytest.raises(DataError, match="was built from"):
            build_here(**tree, grow=True)


def test_a_column_name_that_occurs_twice_is_refused(tmp_path, build_here, images):
    with pytest.raises(ConfigError, match="source.captions='caption': .*x.csv has several columns of this name"):
        built(tmp_path, build_here, "csv", b"image,caption,caption\n0.png,a,b\n")


@pytest.mark.parametrize("keys", [("id", None), (None, "id"), ("id", "image")])
def test_retry_and_growth_refuse_another_key_column(keys, tmp_path, build_here, images):
    (tmp_path / "x.csv").write_text("id,image,caption\nk0,0.png,a\nk1,gone.png,b\n")
    was, now = ({"kind": "csv", "path": f"{tmp_path}/x.csv", "key": key} for key in keys)
    build_here(source=was, output=f"{tmp_path}/out")
    with pytest.raises(DataError, match="rows are identified by source.key="):
        retry(check(source=now, output=f"{tmp_path}/out"), progress=False)
    with pytest.raises(DataError, match="rows are identified by source.key="):
        build_here(source=now, output=f"{tmp_path}/out", grow=True)


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
def test_a_row_of_wrong_bytes_keeps_its_key_and_is_found_by_it(kind, tmp_path, build_here, images):
    rows = [{"key": "k0", "image": "0.png", "caption": "a"}, {"key": "k1", "image": "1.png", "caption": "un café"}]
    if kind == "jsonl":
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    else:
        lines = [("," if kind == "csv" else "\t").join(row) for row in [rows[0].keys(), *(r.values() for r in rows)]]
    _, _, rejected = built(tmp_path, build_here, kind, "\n".join(lines).encode("latin-1"), key="key")
    assert [(key, reason) for key, (reason, _) in rejected.items()] == [("k1", "wrong_encoding")]
    source = {"kind": kind, "path": f"{tmp_path}/x.{kind}", "key": "key", "encoding": "latin-1"}
    tree = {"source": source, "output": f"{tmp_path}/out", "shard_size": 2}
    assert retry(check(**tree), progress=False)["rejected"] == {}
    assert Stream(tmp_path / "out", seed=0).fetch(1).texts == ("un café",)


def test_a_key_of_wrong_bytes_is_none(tmp_path, build_here, images):
    data = "key,image,caption\nk0,0.png,a\nké,1.png,b\n".encode("latin-1")
    _, _, rejected = built(tmp_path, build_here, "csv", data, key="key")
    assert list(rejected) == ["row 000000001"]


def test_a_quotation_mark_that_was_mended_is_found_by_its_key(tmp_path, build_here, images):
    _, _, rejected = built(tmp_path, build_here, "csv", b'key,caption,image\nk0,a,0.png\nk1,"open,1.png\n', key="key")
    assert [(key, reason) for key, (reason, _) in rejected.items()] == [("k1", "unclosed_quote")]
    (tmp_path / "x.csv").write_text('key,caption,image\nk0,a,0.png\nk1,"""open",1.png\n')
    source = {"kind": "csv", "path": f"{tmp_path}/x.csv", "key": "key"}
    tree = {"source": source, "output": f"{tmp_path}/out", "shard_size": 2}
    assert retry(check(**tree), progress=False)["rejected"] == {}


@pytest.mark.parametrize("kind", ["json", "coco"])
def test_of_a_whole_json_file_the_rows_of_wrong_bytes_alone_are_rejected(kind, tmp_path, build_here, images):
    captions = ["a cat", "un café", "\\udcff a dog"]
    if kind == "json":
        tree = [{"id": n, "image": f"{n}.png", "caption": text} for n, text in enumerate(captions)]
    else:
        annotations = [{"id": n, "image_id": n, "caption": text} for n, text in enumerate(captions)]
        tree = {"images": [{"id": n, "file_name": f"{n}.png"} for n in range(3)], "annotations": annotations}
    data = json.dumps(tree, ensure_ascii=False).replace("\\\\", "\\").encode("latin-1")
    (tmp_path / "x.json").write_bytes(data)
    source = {"kind": kind, "path": f"{tmp_path}/x.json", **({"key": "id"} if kind == "json" else {"images": "."})}
    tree = {"source": source, "output": f"{tmp_path}/out"}
    stats = build_here(**tree)
    assert (stats["in"], stats["out"], stats["rejected"]) == (3, 2, {"wrong_encoding": 1})
    (row,) = pq.read_table(tmp_path / "out/rejects.parquet").to_pylist()
    assert (row["key"], row["detail"]) == ("1", f"byte 0xe9 at {data.index(0xE9)} is not UTF-8")
    assert retry(check(**{**tree, "source": {**source, "encoding": "latin-1"}}), progress=False)["rejected"] == {}
    assert Stream(tmp_path / "out", seed=0).fetch(2).texts == ("un café",)
