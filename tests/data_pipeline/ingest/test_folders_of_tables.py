"""Several files of one source: partitioned folders beside pyarrow's reading, hidden files, images beside each file."""

import json
import shutil

import fsspec
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest

from data_pipeline.errors import ConfigError
from data_pipeline.ingest.run import retry
from data_pipeline.ingest.sources import open_source
from data_pipeline.stream.reader import Stream

PARTS = ["lang=en/part-0", "lang=en/part-1", "lang=zh%20tw/year=2024/part-0", "lang=__HIVE_DEFAULT_PARTITION__/part-0"]


def write_rows(path, kind, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif kind in ("json", "jsonl"):
        path.write_text(json.dumps(rows) if kind == "json" else "".join(json.dumps(row) + "\n" for row in rows))
    else:
        lines = [rows[0].keys(), *(row.values() for row in rows)]
        path.write_text("".join(("," if kind == "csv" else "\t").join(line) + "\n" for line in lines))


@pytest.fixture
def partitioned(tmp_path):
    """partitioned(kind) -> a partitioned table of two rows a file."""

    def write(kind):
        for number, name in enumerate(PARTS):
            rows = [{"image": f"http://h/{number}/{row}", "caption": f"c {number} {row}"} for row in range(2)]
            write_rows(tmp_path / "table" / f"{name}.{kind}", kind, rows)
        return tmp_path / "table"

    return write


def rows_of(make_config, **source):
    opened = open_source(make_config(source=source, output="unused").source)
    rows = list(opened.rows(0, opened.count()))
    for start in range(len(rows)):
        assert list(opened.rows(start, len(rows))) == rows[start:]
    return rows


@pytest.mark.parametrize("kind", ["parquet", "csv", "tsv", "jsonl", "json"])
@pytest.mark.parametrize("pattern", ["{}", "{}/", "{}/**/*.{}", "{}/lang=*/part-?.{}"])
def test_the_folders_of_a_partitioned_table_are_columns(kind, pattern, partitioned, make_config):
    root = partitioned(kind)
    if "lang=*" in pattern:
        shutil.rmtree(root / "lang=zh%20tw")
        pattern = pattern.replace("?", "*")
    found = [(row.url, row.meta) for row in rows_of(make_config, kind=kind, path=pattern.format(root, kind))]
    expected = {
        "0": {"lang": "en"},
        "1": {"lang": "en"},
        "2": {"lang": "zh tw", "year": "2024"},
        "3": {"lang": None},
    }
    assert len(found) == (6 if "lang=*" in pattern else 8)
    assert all(meta == expected[url.split("/")[3]] for url, meta in found)


def test_a_partitioned_table_is_what_pyarrow_reads(partitioned, make_config):
    root = partitioned("parquet")
    read = pa.dataset.dataset(root, partitioning="hive").to_table().to_pylist()
    found = [
        {"image": row.url, "caption": row.captions[0], "lang": row.meta["lang"], "year": row.meta.get("year")}
        for row in rows_of(make_config, kind="parquet", path=str(root))
    ]
    for row in read:
        row["year"] = None if row["year"] is None else str(row["year"])
    assert sorted(found, key=lambda row: row["image"]) == sorted(read, key=lambda row: row["image"])


def test_a_partitioned_table_elsewhere_is_read_as_here(partitioned, make_config):
    root = partitioned("csv")
    system = fsspec.filesystem("memory")
    for path in root.rglob("*.csv"):
        system.pipe(f"memory://table/{path.relative_to(root)}", path.read_bytes())
    system.pipe("memory://table/lang=en/._part-0.csv", b"\0\5\x16\7")
    here = rows_of(make_config, kind="csv", path=str(root))
    assert rows_of(make_config, kind="csv", path="memory://table") == here


def test_a_column_of_the_folders_can_be_the_caption_the_key_and_asked_for(
    partitioned, make_config, build_here, tmp_path
):
    root = partitioned("parquet")
    source = {"kind": "parquet", "path": str(root), "captions": ["lang"]}
    assert [row.captions for row in rows_of(make_config, **source)] == [()] * 2 + [("en",)] * 4 + [("zh tw",)] * 2
    by_key = open_source(make_config(source={**source, "key": "lang"}, output="unused").source)
    assert list(by_key.keys())[1:4] == ["row 000000001", "en", "en"]


def test_a_file_that_is_named_itself_gets_no_columns_from_its_folders(partitioned, make_config):
    root = partitioned("csv")
    (first, _) = rows_of(make_config, kind="csv", path=f"{root}/lang=en/part-0.csv")
    assert first.meta == {}


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl", "json"])
@pytest.mark.parametrize("pattern", ["{}", "{}/*.{}", "{}/*"])
def test_hidden_files_are_passed_over(kind, pattern, tmp_path, make_config):
    write_rows(tmp_path / f"in/x.{kind}", kind, [{"image": "http://h/0", "caption": "c"}])
    for name in (f"._x.{kind}", f".x.{kind}", f".x.{kind}.crc", ".DS_Store"):
        (tmp_path / "in" / name).write_bytes(b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X")
    assert len(rows_of(make_config, kind=kind, path=pattern.format(tmp_path / "in", kind))) == 1


def test_a_folder_of_hidden_files_alone_holds_no_table(tmp_path, make_config):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/._x.parquet").write_bytes(b"\x00\x05\x16\x07")
    with pytest.raises(ConfigError, match="a folder; set source.table to the parquet file"):
        rows_of(make_config, kind="parquet", path=f"{tmp_path}/in")


def test_hidden_files_that_the_pattern_names_are_read(tmp_path, make_config):
    write_rows(tmp_path / ".in/x.csv", "csv", [{"image": "http://h/0", "caption": "c"}])
    assert len(rows_of(make_config, kind="csv", path=f"{tmp_path}/.in/*.csv")) == 1


# ------------------------------------------------------------------------------- images beside each file


def coco(ids):
    images = [{"id": number, "file_name": f"{number}.png"} for number in ids]
    return {"images": images, "annotations": [{"id": n, "image_id": n, "caption": f"c {n}"} for n in ids]}


@pytest.mark.parametrize("way", ["union", "folder", "pattern"])
@pytest.mark.parametrize("store", ["images", "images.tar"])
def test_coco_finds_the_images_beside_each_of_several_files(way, store, tmp_path, build_here, make_png):
    names = ["in/a.json", "in/b.json"] if way == "folder" else ["in/a.json", "more/b.json"]
    for number, name in enumerate(names):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(coco([2 * number, 2 * number + 1])))
        (path.parent / "images").mkdir(exist_ok=True)
        for image in (2 * number, 2 * number + 1):
            (path.parent / "images" / f"{image}.png").write_bytes(make_png(image))
    if store == "images.tar":
        for folder in {(tmp_path / name).parent for name in names}:
            shutil.make_archive(str(folder / "images"), "tar", folder / "images")
            shutil.rmtree(folder / "images")
    ways = {"union": "::".join(f"{tmp_path}/{name}" for name in names), "folder": f"{tmp_path}/in"}
    path = ways.get(way, f"{tmp_path}/*/?.json".replace("?", "*"))
    stats = build_here(source={"kind": "coco", "path": path, "images": store}, output=f"{tmp_path}/out", shard_size=3)
    assert (stats["in"], stats["rejected"]) == (4, {})
    stream = Stream(tmp_path / "out", seed=0)
    samples = [stream.fetch(number) for number in range(4)]
    assert [(sample.key, sample.texts) for sample in samples] == [(str(n), (f"c {n}",)) for n in range(4)]
    assert [sample.image for sample in samples] == [make_png(number) for number in range(4)]


def test_other_annotations_in_a_folder_of_coco_are_rows_of_rejects(tmp_path, build_here, make_png):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/0.png").write_bytes(make_png())
    (tmp_path / "in/captions.json").write_text(json.dumps(coco([0])))
    boxes = {"images": [{"id": 0, "file_name": "0.png"}], "annotations": [{"id": 1, "image_id": 0, "bbox": [1, 2]}]}
    (tmp_path / "in/instances.json").write_text(json.dumps(boxes))
    (tmp_path / "in/._captions.json").write_bytes(b"\x00\x05\x16\x07")
    source = {"kind": "coco", "path": f"{tmp_path}/in", "images": "."}
    stats = build_here(source=source, output=f"{tmp_path}/out")
    assert (stats["in"], stats["out"], stats["rejected"]) == (2, 1, {"duplicate_key": 1})


def test_json_lists_in_several_folders_find_the_images_beside_their_own(tmp_path, build_here, make_config, make_png):
    for number, name in enumerate("ab"):
        write_rows(
            tmp_path / f"{name}/x.json", "json", [{"image": "0.png", "caption": f"{name} 0"}, {"image": "1.png"}]
        )
        (tmp_path / name / "0.png").write_bytes(make_png(number))
    tree = {
        "source": {"kind": "json", "path": f"{tmp_path}/a/x.json::{tmp_path}/b/x.json"},
        "output": f"{tmp_path}/out",
        "shard_size": 3,
    }
    stats = build_here(**tree)
    assert (stats["in"], stats["out"], stats["rejected"]) == (4, 2, {"unreadable_file": 2})
    stream = Stream(tmp_path / "out", seed=0)
    assert [(s.texts, s.image) for s in map(stream.fetch, range(2))] == [
        (("a 0",), make_png(0)),
        (("b 0",), make_png(1)),
    ]
    assert retry(make_config(**tree), progress=False)["in"] == 4
