import csv
import gzip
import io
import json
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.build.sources import SOURCES, expand_braces, open_source
from data_pipeline.errors import ConfigError, DataError
from data_pipeline.schema import Drop, Pair

ROWS = [
    {"name": "k0", "file": "0.png", "en": "zero", "zh": "零", "score": "1"},
    {"name": "k1", "file": "1.png", "en": 'one, "quoted"', "zh": "一", "score": "2"},
    {"name": "k2", "file": "gone.png", "en": "two", "zh": "二", "score": "3"},
    {"name": "k3", "file": "", "en": "three", "zh": "三", "score": "4"},
]


def write_table(path, kind, rows):
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0], delimiter="\t" if kind == "tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)


def tar_of(path, files):
    with tarfile.open(path, "w") as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.fixture
def table(tmp_path, make_png, make_config):
    """table(kind, in_tar) -> an open source over ROWS."""

    def make(kind, in_tar=False, rows=ROWS, **changes):
        files = [(f"{number}.png", make_png(number)) for number in range(2)]
        tar_of(tmp_path / "images.tar", files)
        for name, data in files:
            (tmp_path / name).write_bytes(data)
        write_table(tmp_path / f"rows.{kind}", kind, rows)
        mapping = {"key": "name", "image": "file", "captions": ["en", "zh"], "images": "images.tar" if in_tar else "."}
        source = {
            "kind": kind.removesuffix(".gz"),
            "path": str(tmp_path),
            "table": f"rows.{kind}",
            **mapping,
            **changes,
        }
        return open_source(make_config(source=source, output="unused").source)

    return make


def test_every_kind_of_source_is_in_the_table():
    assert sorted(SOURCES) == ["csv", "folder", "jsonl", "parquet", "scenes", "tars", "tsv"]


@pytest.mark.parametrize("in_tar", [False, True])
@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "jsonl.gz", "parquet"])
def test_a_table_yields_every_row_as_a_pair_or_a_drop(table, make_png, kind, in_tar):
    source = table(kind, in_tar)
    assert source.count() == 4 and list(source.keys()) == ["k0", "k1", "k2", "k3"]
    first, second, gone, empty = source.rows(0, 4)
    assert first == Pair("k0", make_png(0), ("zero", "零"), {"score": "1"})
    assert second.captions == ('one, "quoted"', "一")
    assert isinstance(gone, Drop) and (gone.key, gone.reason) == ("k2", "unreadable_file")
    assert isinstance(empty, Drop) and (empty.key, empty.reason) == ("k3", "no_image")


@pytest.mark.parametrize("kind", ["csv", "jsonl.gz", "parquet"])
def test_a_range_of_rows_is_that_part_of_all_rows(table, kind):
    source = table(kind)
    everything = list(source.rows(0, 4))
    for start in range(4):
        for stop in range(start, 5):
            assert list(source.rows(start, stop)) == everything[start:stop]


def test_captions_may_be_lists_and_images_inline(table, make_png):
    rows = [{"name": "a", "file": make_png(), "en": ["one", "two"], "zh": ["三"]}]
    (pair,) = table("parquet", rows=rows).rows(0, 1)
    assert (pair.image, pair.captions) == (make_png(), ("one", "two", "三"))


def test_a_row_without_a_key_column_is_named_by_its_number(table):
    source = table("csv", key=None)
    assert source.keys() is None
    assert [row.key for row in source.rows(1, 3)] == ["000000001", "000000002"]


def test_unreadable_lines_are_counted_not_lost(tmp_path, make_config):
    (tmp_path / "x.jsonl").write_text(
        '{"image": "a.png", "caption": "x"}\nnot json\n[1]\n{"image": "a", "caption": 5}\n'
    )
    config = make_config(source={"kind": "jsonl", "path": str(tmp_path / "x.jsonl")}, output="unused")
    reasons = [row.reason for row in open_source(config.source).rows(0, 4)]
    assert reasons == ["unreadable_file", "unreadable_row", "unreadable_row", "unreadable_caption"]


def test_a_file_name_cannot_leave_the_folder_of_images(table):
    rows = [{**ROWS[0], "file": "../../../etc/passwd"}]
    (drop,) = table("csv", rows=rows).rows(0, 1)
    assert drop.reason == "unreadable_file" and "outside" in drop.detail


def test_a_folder_pairs_images_with_the_captions_beside_them(folder, make_config):
    source = open_source(make_config(source={"kind": "folder", "path": str(folder)}, output="unused").source)
    rows = list(source.rows(0, source.count()))
    assert [row.key for row in rows] == ["a/0", "a/1", "b/0", "b/1", "b/2", "c"] == list(source.keys())
    assert rows[0].captions == ("picture 0",)
    assert (rows[1].captions, rows[1].meta) == (("picture 1", "图片"), {"score": 1})


def test_tars_are_a_source_with_their_name_in_the_key(tmp_path, make_png, make_config):
    for number in range(2):
        parts = [("x.png", make_png(number)), ("x.json", b'{"caption": "c", "w": 1}'), ("y.txt", b"alone")]
        tar_of(tmp_path / f"{number:02d}.tar", parts)
    path = f"{tmp_path}/{{00..01}}.tar"
    rows = list(open_source(make_config(source={"kind": "tars", "path": path}, output="u").source).rows(0, 4))
    assert [row.key for row in rows] == ["00/x", "00/y", "01/x", "01/y"]
    assert (rows[2].image, rows[2].captions, rows[2].meta) == (make_png(1), ("c",), {"w": 1})
    assert (rows[1].reason, rows[3].reason) == ("no_image", "no_image")


def test_braces_expand_with_the_width_of_their_first_number():
    assert expand_braces("a-{08..10}-{1..2}") == ["a-08-1", "a-08-2", "a-09-1", "a-09-2", "a-10-1", "a-10-2"]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize(("field", "value"), [("key", "nam"), ("image", "picture"), ("captions", ["en", "fr"])])
def test_a_column_that_is_not_there_is_refused_naming_those_that_are(table, kind, field, value):
    with pytest.raises(ConfigError, match=f"source.{field}.*name, file, en, zh, score"):
        table(kind, **{field: value}).count()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"kind": "folder", "path": "/nowhere"}, "/nowhere: not there"),
        ({"kind": "csv", "path": "/nowhere.csv"}, "/nowhere.csv: not there"),
        ({"kind": "tars", "path": "/nowhere/{0..1}.tar"}, "/nowhere/0.tar: not there"),
        ({"kind": "folder", "path": "EMPTY"}, "no images"),
        ({"kind": "tars", "path": "EMPTY"}, "no samples"),
        ({"kind": "csv", "path": "EMPTY"}, "a folder; name the csv file"),
        ({"kind": "jsonl", "path": "BLANK"}, "no rows"),
        ({"kind": "parquet", "path": "BLANK"}, "not a parquet file"),
    ],
)
def test_a_missing_or_empty_source_is_refused(tmp_path, make_config, source, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank").touch()
    paths = {"EMPTY": str(tmp_path / "empty"), "BLANK": str(tmp_path / "blank")}
    config = make_config(source={**source, "path": paths.get(source["path"], source["path"])}, output="unused")
    with pytest.raises((DataError, ConfigError), match=message):
        open_source(config.source).count()
