import base64
import csv
import gc
import gzip
import io
import itertools
import json
import lzma
import random
import tarfile

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from urllib3 import HTTPResponse

from data_pipeline.errors import ConfigError, DataError
from data_pipeline.ingest import sources, tables
from data_pipeline.ingest.sources import SOURCES, open_source
from data_pipeline.patterns import expand_braces
from data_pipeline.remote import HttpStorage
from data_pipeline.schema import Drop, Link, Pair
from data_pipeline.storage import open_storage

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
    elif kind.endswith(".gz"):
        write_table(path, kind.removesuffix(".gz"), rows)
        path.write_bytes(gzip.compress(path.read_bytes()))
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
    assert sorted(SOURCES) == [
        *("cc3m", "coco", "csv", "folder", "json", "jsonl", "muge", "parquet", "scenes", "tars", "tsv")
    ]


@pytest.mark.parametrize("in_tar", [False, True])
@pytest.mark.parametrize("kind", ["csv", "csv.gz", "tsv", "tsv.gz", "jsonl", "jsonl.gz", "parquet"])
def test_a_table_yields_every_row_as_a_pair_or_a_drop(table, make_png, kind, in_tar):
    source = table(kind, in_tar, **({"quotes": True} if "tsv" in kind else {}))
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


@pytest.mark.slow
@pytest.mark.parametrize("group", [1, 7, 300, 1000])
def test_any_sequence_of_ranges_of_a_parquet_is_those_parts_of_it(tmp_path, make_config, group):
    rows = [{"image": f"http://h/{number}", "caption": f"c{number}"} for number in range(1000)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet", row_group_size=group)
    source = opened(make_config, kind="parquet", path=f"{tmp_path}/x.parquet")
    chance = random.Random(group)
    readers = []
    for _ in range(150):  # some are left in their middle, some go on side by side
        start = chance.randrange(1000)
        stop = min(1000, start + chance.choice([1, 30, 256, 600]))
        expected = iter([row["image"] for row in rows[start:stop]])
        readers.append((source.rows(start, stop), expected))
        for _ in range(chance.choice([1, 40, 1000])):
            found, wanted = chance.choice(readers)
            assert getattr(next(found, None), "url", None) == next(wanted, None)
        readers = readers[-3:]


def test_a_large_row_group_is_decoded_once_by_a_process_that_reads_one_range_after_another(
    tmp_path, make_config, monkeypatch
):
    rows = [{"image": f"http://h/{number}", "caption": "c"} for number in range(5000)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet", row_group_size=5000)
    decoded, original = [], tables._decoded

    def counted(*arguments):
        for first, batch in original(*arguments):
            decoded.append(first)
            yield first, batch

    source = opened(make_config, kind="parquet", path=f"{tmp_path}/x.parquet")
    monkeypatch.setattr(tables, "_decoded", counted)
    for start in range(0, 5000, 100):
        assert [row.url for row in source.rows(start, start + 100)] == [row["image"] for row in rows[start:][:100]]
    assert decoded == list(range(0, 5000, 256))
    assert not tables._PAUSED  # nothing is kept behind the end


def test_only_tables_whose_folder_says_a_wanted_column_are_read_whole(tmp_path, make_config, monkeypatch):
    row = {"image": ["i.png"], "caption": ["c"]}
    for name, table in (("id=7/a", row), ("z/b", {"id": ["k"], **row})):
        path = tmp_path / f"t/{name}.parquet"
        path.parent.mkdir(parents=True)
        pq.write_table(pa.table(table), path)
    asked = []
    original = tables.parquet_records
    monkeypatch.setattr(
        tables, "parquet_records", lambda part, *rest: (asked.append(rest[-1]), original(part, *rest))[1]
    )
    source = opened(make_config, kind="parquet", path=f"{tmp_path}/t::{tmp_path}/t/z", key="id")
    assert list(source.keys()) == ["7", "k"]
    assert asked == [None, ["id"]]


@pytest.mark.slow
def test_a_reader_of_parquet_is_freed_with_its_range(tmp_path, make_config):
    rows = [{"image": f"http://h/{number}", "caption": "c"} for number in range(1000)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet", row_group_size=100)
    source = opened(make_config, kind="parquet", path=f"{tmp_path}/x.parquet")
    gc.collect()
    gc.disable()
    try:
        for start in range(0, 1000, 100):
            assert len(list(source.rows(start, start + 100))) == 100
            assert next(iter(source.rows(start, start + 100))).captions == ("c",)
        assert not [thing for thing in gc.get_objects() if isinstance(thing, tables.ParquetReader)]
    finally:
        gc.enable()


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


def test_several_folders_are_read_one_after_another_with_their_names_in_the_keys(tmp_path, make_png, make_config):
    for number, name in enumerate(["in-08/x", "in-09/x", "in-09/deep/y", "more/x"]):
        path = tmp_path / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(make_png(number))
        path.with_suffix(".txt").write_text(f"{number}\nagain\n")
    source = opened(make_config, kind="folder", path=f"{tmp_path}/in-{{08..09}}::{tmp_path}/more")
    rows = list(source.rows(0, source.count()))
    assert [row.key for row in rows] == ["in-08/x", "in-09/deep/y", "in-09/x", "more/x"] == list(source.keys())
    assert [(row.image, row.captions) for row in rows] == [
        (make_png(number), (str(number), "again")) for number in (0, 2, 1, 3)
    ]
    for start, stop in itertools.combinations(range(5), 2):
        assert list(source.rows(start, stop)) == rows[start:stop]


def test_links_to_folders_are_followed_and_loops_end(folder, tmp_path, make_png, make_config):
    (tmp_path / "else/deep").mkdir(parents=True)
    (tmp_path / "else/deep/x.png").write_bytes(make_png(9))
    before = [row.key for row in opened(make_config, kind="folder", path=str(folder)).rows(0, 6)]
    (folder / "a/else").symlink_to(tmp_path / "else")
    (folder / "linked.png").symlink_to(tmp_path / "else/deep/x.png")
    (folder / ".hidden").mkdir()
    (folder / ".hidden/y.png").write_bytes(make_png(8))
    (tmp_path / "else/deep/up").symlink_to(tmp_path / "else")
    (folder / "b/round").symlink_to(folder)
    (folder / "dead.png").symlink_to(tmp_path / "gone.png")
    (folder / "self.png").symlink_to(folder / "self.png")
    source = opened(make_config, kind="folder", path=str(folder))
    rows = list(source.rows(0, source.count()))
    assert [row.key for row in rows] == [".hidden/y", "a/0", "a/1", "a/else/deep/x", *before[2:], "linked"]
    assert rows[3].image == rows[-1].image == make_png(9)


def test_a_folder_that_cannot_be_listed_is_refused(make_config):
    with pytest.raises(ConfigError, match="https://host/folder: only s3:// can list"):
        opened(make_config, kind="folder", path="https://host/folder").count()


def test_tars_are_a_source_with_their_name_in_the_key(tmp_path, make_png, make_config):
    for number in range(2):
        parts = [("x.png", make_png(number)), ("x.json", b'{"caption": "c", "w": 1}'), ("y.txt", b"alone")]
        tar_of(tmp_path / f"{number:02d}.tar", parts)
    path = f"{tmp_path}/{{00..01}}.tar"
    rows = list(open_source(make_config(source={"kind": "tars", "path": path}, output="u").source).rows(0, 4))
    assert [row.key for row in rows] == ["00/x", "00/y", "01/x", "01/y"]
    assert (rows[2].image, rows[2].captions, rows[2].meta) == (make_png(1), ("c",), {"w": 1})
    assert (rows[1].reason, rows[3].reason) == ("no_image", "no_image")


BESIDE = [{"key": "k", "caption": "not this", "w": 7, "more": [1], "status": "success"}, {"key": "l", "w": 8}]


def tar_with_a_table(folder, make_png):
    tar_of(folder / "00.tar", [("k.png", make_png()), ("k.txt", b"c")])
    pq.write_table(pa.Table.from_pylist(BESIDE), folder / "00.parquet")
    tar_of(folder / "01.tar", [("k.png", make_png()), ("k.txt", b"c")])


def test_a_table_beside_a_tar_gives_attributes_here_and_over_http(tmp_path, make_png, make_config, serve):
    tar_with_a_table(tmp_path, make_png)
    for where in (str(tmp_path), serve(tmp_path)):
        rows = list(opened(make_config, kind="tars", path=f"{where}/{{00..01}}.tar").rows(0, 2))
        assert [row.meta for row in rows] == [{"w": 7, "more": [1]}, {}]


@pytest.mark.real
@pytest.mark.slow
def test_a_table_beside_a_tar_gives_attributes_on_s3(tmp_path, make_png, make_config, bucket):
    tar_with_a_table(tmp_path, make_png)
    storage = open_storage(f"{bucket}/in")
    for path in sorted(tmp_path.glob("0*")):
        storage.put_if_absent(path.name, path.read_bytes())
    rows = list(opened(make_config, kind="tars", path=f"{bucket}/in").rows(0, 2))
    assert [row.meta for row in rows] == [{"w": 7, "more": [1]}, {}]


def test_a_server_that_will_not_say_whether_a_table_lies_beside_a_tar_has_none(
    tmp_path, make_png, make_config, serve, monkeypatch
):
    tar_with_a_table(tmp_path, make_png)
    original = HttpStorage._head
    refused = lambda self, name: (  # noqa: E731
        HTTPResponse(status=403) if name.endswith(".parquet") else original(self, name)
    )
    monkeypatch.setattr(HttpStorage, "_head", refused)
    rows = list(opened(make_config, kind="tars", path=f"{serve(tmp_path)}/00.tar").rows(0, 1))
    assert [row.meta for row in rows] == [{}]


def test_a_damaged_table_beside_a_tar_is_an_error_of_data(tmp_path, make_png, make_config):
    tar_with_a_table(tmp_path, make_png)
    (tmp_path / "00.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="00.parquet: not a valid parquet file"):
        list(opened(make_config, kind="tars", path=f"{tmp_path}/00.tar").rows(0, 1))


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
        ({"kind": "folder", "path": "/nowhere"}, "/nowhere: not found"),
        ({"kind": "csv", "path": "/nowhere.csv"}, "/nowhere.csv: not found"),
        ({"kind": "tars", "path": "/nowhere/{0..1}.tar"}, "/nowhere/0.tar: not found"),
        ({"kind": "folder", "path": "EMPTY"}, "no images"),
        ({"kind": "tars", "path": "EMPTY"}, "no samples"),
        ({"kind": "csv", "path": "EMPTY"}, "a folder; set source.table to the csv file"),
        ({"kind": "jsonl", "path": "BLANK"}, "no rows"),
        ({"kind": "parquet", "path": "BLANK"}, "not a valid parquet file"),
    ],
)
def test_a_missing_or_empty_source_is_refused(tmp_path, make_config, source, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank").touch()
    paths = {"EMPTY": str(tmp_path / "empty"), "BLANK": str(tmp_path / "blank")}
    config = make_config(source={**source, "path": paths.get(source["path"], source["path"])}, output="unused")
    with pytest.raises((DataError, ConfigError), match=message):
        open_source(config.source).count()


# ------------------------------------------------------------------------------------ published formats


def opened(make_config, **source):
    return open_source(make_config(source=source, output="unused").source)


def test_coco_captions_are_grouped_by_image_and_keep_their_licences(shared, make_config):
    path = shared / "data/metadata-formats/coco-captions-val2017-subset.json.gz"
    tree = json.loads(gzip.decompress(path.read_bytes()))
    source = opened(make_config, kind="coco", path=str(path))
    rows = list(source.rows(0, source.count()))
    assert len(rows) == len(tree["images"]) == 1000
    assert sum(len(row.captions) for row in rows) == len(tree["annotations"]) == 5002
    by_id = {str(image["id"]): image for image in tree["images"]}
    licenses = {entry["id"]: entry["url"] for entry in tree["licenses"]}
    for row in rows:
        assert isinstance(row, Link) and row.url == by_id[row.key]["coco_url"]
        assert row.meta["license_url"] == licenses[by_id[row.key]["license"]]
    first = [a for a in tree["annotations"] if str(a["image_id"]) == rows[7].key]
    assert sorted(rows[7].captions) == sorted(a["caption"] for a in first)


def test_coco_images_may_lie_in_a_folder(tmp_path, make_png, make_config):
    (tmp_path / "img").mkdir()
    (tmp_path / "img/a.png").write_bytes(make_png())
    images = [{"id": 2, "file_name": "b.png"}, {"id": 1, "file_name": "a.png"}, {"id": 3}]
    annotations = [{"image_id": 1, "id": 9, "caption": "second"}, {"image_id": 1, "id": 8, "caption": "first"}]
    (tmp_path / "c.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    rows = list(opened(make_config, kind="coco", path=f"{tmp_path}/c.json", images="img").rows(0, 3))
    assert rows[0] == Pair("1", make_png(), ("first", "second"), {})
    assert [row.reason for row in rows[1:]] == ["unreadable_file", "no_image"]


def test_cc3m_lines_are_captions_and_addresses_without_quotation_rules(shared, make_config):
    path = shared / "data/metadata-formats/cc3m-validation-sample.tsv"
    lines = [line.split("\t") for line in path.read_text().splitlines()]
    rows = list(opened(make_config, kind="cc3m", path=str(path)).rows(0, 1500))
    assert [(row.captions[0], row.url) for row in rows] == [(caption, url.strip()) for caption, url in lines]


@pytest.mark.parametrize(
    ("name", "kind", "image", "caption", "count"),
    [("sample.parquet", "parquet", "URL", "TEXT", 1000), ("sample.csv", "csv", "url", "caption", 300)],
)
def test_laion_tables_give_addresses_to_fetch(shared, make_config, name, kind, image, caption, count):
    path = f"{shared}/data/metadata-formats/laion400m-{name}"
    source = opened(make_config, kind=kind, path=path, image=image, captions=[caption])
    rows = list(source.rows(0, source.count()))
    assert len(rows) == count and all(isinstance(row, Link) and row.url.startswith("http") for row in rows)
    assert len({row.key for row in rows}) == count


@pytest.mark.parametrize("encode", [base64.b64encode, base64.urlsafe_b64encode])
def test_muge_lines_hold_their_images(tmp_path, make_png, make_config, encode):
    images = [encode(make_png(number)).decode().rstrip("=" if number else "") for number in range(3)]
    lines = [f'{7 + number}\t“红色"外套\t{image}\n' for number, image in enumerate(images)]
    (tmp_path / "x.tsv").write_text("".join(lines) + "9\t短\t@@@\n")
    rows = list(opened(make_config, kind="muge", path=f"{tmp_path}/x.tsv").rows(0, 4))
    assert [row.image for row in rows[:3]] == [make_png(number) for number in range(3)]
    assert (rows[0].captions, rows[0].meta) == (('“红色"外套',), {"id": "7"})
    assert (rows[3].reason, rows[3].key) == ("wrong_base64", "000000003")


def test_fruits_and_fashion_are_read_inline(shared, tmp_path, make_config):
    path = f"{shared}/data/fruits32/test.parquet"
    fruits = opened(make_config, kind="parquet", path=path, key="id", captions=["class_name"])
    rows = list(fruits.rows(0, fruits.count()))
    assert len(rows) == 200 and all(row.image.startswith(b"\x89PNG") and row.captions[0] for row in rows)
    packed = lzma.decompress((shared / "data/fashion-mnist/t10k-images-idx3-ubyte.xz").read_bytes())
    pixels = np.frombuffer(packed, np.uint8, offset=16).reshape(-1, 28, 28)[:20]
    labels = np.frombuffer(
        gzip.decompress((shared / "data/fashion-mnist/t10k-labels-idx1-ubyte.gz").read_bytes()), "u1"
    )
    files = [cv2.imencode(".png", picture)[1].tobytes() for picture in pixels]
    table = [
        {"image": {"bytes": file, "path": None}, "caption": str(label)}
        for file, label in zip(files, labels[8:28], strict=True)
    ]
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "fashion.parquet")
    rows = list(opened(make_config, kind="parquet", path=f"{tmp_path}/fashion.parquet").rows(0, 20))
    assert [row.image for row in rows] == files


@pytest.mark.parametrize("name", ["x.json", "x.json.gz"])
def test_a_json_list_is_a_table(tmp_path, make_png, make_config, name):
    (tmp_path / "0.png").write_bytes(make_png())
    data = json.dumps([{"image": "0.png", "caption": "c", "n": 1}, 5]).encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    rows = list(opened(make_config, kind="json", path=f"{tmp_path}/{name}").rows(0, 2))
    assert rows[0] == Pair("000000000", make_png(), ("c",), {"n": 1}) and rows[1].reason == "unreadable_row"


def test_img2dataset_tars_keep_the_columns_of_their_parquet(tmp_path, make_png, make_config):
    files = [("000.jpg", make_png()), ("000.txt", b"c"), ("000.json", b'{"key": "000", "sha256": "s"}')]
    tar_of(tmp_path / "00000.tar", files)
    records = [
        {"key": "000", "similarity": 0.3, "caption": "c", "status": "success", "sha256": "older"},
        {"key": "001", "similarity": 0.1, "caption": "d", "status": "failed_to_download", "sha256": None},
    ]
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "00000.parquet")
    (row,) = opened(make_config, kind="tars", path=str(tmp_path)).rows(0, 1)
    assert (row.key, row.captions, row.meta) == ("00000/000", ("c",), {"key": "000", "sha256": "s", "similarity": 0.3})


# ------------------------------------------------------------------------------------- unions and ranges


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "jsonl.gz", "parquet"])
def test_unions_and_braces_are_their_tables_one_after_another(tmp_path, make_config, kind):
    (tmp_path / "more").mkdir()
    names = ["a-08", "a-09", "a-10", "more/b"]
    for number, name in enumerate(names):
        rows = [{"image": f"http://h/{name}/{row}", "caption": f"{number} {row}"} for row in range(3 + number)]
        write_table(tmp_path / f"{name}.{kind}", kind, rows)
    path = f"{tmp_path}/a-{{08..10}}.{kind}::{tmp_path}/more"
    source = opened(make_config, kind=kind.removesuffix(".gz"), path=path)
    assert source.count() == 3 + 4 + 5 + 6
    everything = [row.captions[0] for row in source.rows(0, 18)]
    assert everything == [f"{number} {row}" for number in range(4) for row in range(3 + number)]
    for start in range(18):
        for stop in range(start, 19):
            assert [row.captions[0] for row in source.rows(start, stop)] == everything[start:stop]


DIRTY = [
    "plain",
    'a "quoted" word',
    '5" screen, new',
    '"leading',
    "line\nbreak",
    "ends\r\nwith",
    "comma, and ; tab\t",
    "Ünï 图片",
    "",
    '""',
]


@pytest.mark.parametrize("kind", ["csv", "tsv"])
def test_every_range_of_a_dirty_csv_is_what_the_standard_library_reads(tmp_path, make_config, monkeypatch, kind):
    monkeypatch.setattr(tables, "STRIDE", 4)
    rows = [{"image": f"http://h/{number}", "caption": DIRTY[number % len(DIRTY)]} for number in range(57)]
    write_table(tmp_path / f"x.{kind}", kind, rows)
    source = opened(make_config, kind=kind, path=f"{tmp_path}/x.{kind}", quotes=True)
    assert source.count() == 57
    for start, stop in itertools.combinations(range(0, 58, 3), 2):
        found = [(row.url, row.captions[0] if row.captions else "") for row in source.rows(start, stop)]
        assert found == [(row["image"], row["caption"]) for row in rows[start:stop]]


def test_the_layout_of_rows_is_read_once_and_handed_on(tmp_path, make_config, monkeypatch):
    lines = [json.dumps({"image": f"http://h/{number}", "caption": "x" * 50}) + "\n" for number in range(5000)]
    (tmp_path / "x.jsonl").write_text("".join(lines))
    config = make_config(source={"kind": "jsonl", "path": f"{tmp_path}/x.jsonl"}, output="u").source
    layout = open_source(config).layout
    assert len(layout.parts[0].offsets) == 5
    read = []
    monkeypatch.setattr(tables, "open_input", lambda path: Counting(path, read))
    assert [row.url for row in open_source(config, layout).rows(4500, 4510)] == [
        f"http://h/{number}" for number in range(4500, 4510)
    ]
    assert len(read) <= 4510 - 4096  # lines from the noted place before the range, none from the first row


class Counting(io.FileIO):
    """A file that notes every line that is read from it."""

    def __init__(self, path, read):
        super().__init__(path)
        self._read = read

    def readline(self, size=-1):
        self._read.append(1)
        return super().readline(size)


def test_a_long_tar_is_read_from_the_noted_place(tmp_path, make_png, make_config, monkeypatch):
    monkeypatch.setattr(sources, "TAR_STRIDE", 4)
    tar_of(
        tmp_path / "x.tar",
        [(f"{n:03d}.{e}", make_png() if e == "png" else b"c") for n in range(11) for e in ("png", "txt")],
    )
    source = opened(make_config, kind="tars", path=f"{tmp_path}/x.tar")
    for start in range(11):
        assert [row.key for row in source.rows(start, 11)] == [f"x/{number:03d}" for number in range(start, 11)]


def test_a_tar_cut_between_two_files_is_refused(tmp_path, make_png, make_config):
    tar_of(tmp_path / "x.tar", [("0.png", make_png()), ("0.txt", b"c"), ("1.png", make_png()), ("1.txt", b"c")])
    data = (tmp_path / "x.tar").read_bytes()
    (tmp_path / "x.tar").write_bytes(data[: data.index(b"1.png")])
    with pytest.raises(DataError, match="x.tar: ends at byte .* closing blocks"):
        opened(make_config, kind="tars", path=f"{tmp_path}/x.tar").count()


def test_a_file_address_in_a_table_is_never_opened(tmp_path, make_config):
    (tmp_path / "x.jsonl").write_text('{"image": "file:///etc/passwd", "caption": "x"}\n')
    (row,) = opened(make_config, kind="jsonl", path=f"{tmp_path}/x.jsonl").rows(0, 1)
    assert (row.reason, "No such file" in row.detail) == ("unreadable_file", True)


def test_a_quotation_mark_that_never_closes_costs_its_line_and_is_a_letter_without_quotes(tmp_path, make_config):
    (tmp_path / "x.csv").write_text('image,caption\nhttp://h/0,a\nhttp://h/1,"open\nhttp://h/2,c\n')
    source = opened(make_config, kind="csv", path=f"{tmp_path}/x.csv")
    first, unclosed, last = source.rows(0, source.count())
    assert (first.captions, unclosed.reason, last.captions) == (("a",), "unclosed_quote", ("c",))
    assert unclosed.detail.startswith("line 3: ")
    plain = opened(make_config, kind="csv", path=f"{tmp_path}/x.csv", quotes=False)
    assert [row.captions for row in plain.rows(0, plain.count())] == [("a",), ('"open',), ("c",)]


def test_rows_of_several_tables_find_the_images_beside_their_own(tmp_path, make_png, make_config):
    for number, name in enumerate("ab"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes(make_png(number))
        (tmp_path / name / "x.csv").write_text("image,caption\n0.png,c\n")
    source = opened(make_config, kind="csv", path=f"{tmp_path}/a/x.csv::{tmp_path}/b/x.csv")
    assert [row.image for row in source.rows(0, 2)] == [make_png(0), make_png(1)]


def test_tables_and_tars_are_read_over_http(tmp_path, make_png, make_config, serve):
    (tmp_path / "rows.csv").write_text("image,caption\n0.png,one\n0.png,two\n")
    (tmp_path / "0.png").write_bytes(make_png())
    pq.write_table(pa.Table.from_pylist([{"image": make_png(1), "caption": "p"}]), tmp_path / "rows.parquet")
    tar_of(tmp_path / "00.tar", [("k.png", make_png(2)), ("k.txt", b"t")])
    address = serve(tmp_path)
    (first, second) = opened(make_config, kind="csv", path=f"{address}/rows.csv").rows(0, 2)
    assert (first.image, second.captions) == (make_png(), ("two",))
    assert next(iter(opened(make_config, kind="parquet", path=f"{address}/rows.parquet").rows(0, 1))).image == make_png(
        1
    )
    assert next(iter(opened(make_config, kind="tars", path=f"{address}/{{00..00}}.tar").rows(0, 1))).image == make_png(
        2
    )
    with pytest.raises(DataError, match="gone.csv"):
        opened(make_config, kind="csv", path=f"{address}/gone.csv").count()
