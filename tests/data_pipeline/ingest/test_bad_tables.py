"""Tables that are cut off, damaged, closed or malformed: one clear error with its exit code, or rows of rejects."""

import base64
import gzip
import io
import json
import os
import tarfile
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from data_pipeline.errors import ConfigError, DataError
from data_pipeline.ingest.sources import open_source
from data_pipeline.settings import read_yaml
from data_pipeline.shards.samples import NESTED_AT_MOST
from data_pipeline.stream.reader import Stream
from tests.data_pipeline.conftest import png

LINES = {
    "csv": "image,caption\n" + "".join(f"{n}.png,{n}\n" for n in range(5000)),
    "tsv": "image\tcaption\n" + "".join(f"{n}.png\t{n}\n" for n in range(5000)),
    "jsonl": "".join(json.dumps({"image": f"{n}.png", "caption": str(n)}) + "\n" for n in range(5000)),
    "json": json.dumps([{"image": f"{n}.png", "caption": str(n)} for n in range(5000)]),
    "coco": json.dumps({"images": [{"id": n} for n in range(5000)], "annotations": []}),
}


def refused(build_here, tmp_path, said, **source) -> DataError:
    """The error of a build, whose exit code is that of data."""
    with pytest.raises(DataError, match=said) as caught:
        build_here(source=source, output=f"{tmp_path}/out")
    assert caught.value.exit_code == 74 and "\n" not in str(caught.value)
    return caught.value


def rejects(tmp_path):
    rows = pq.read_table(tmp_path / "out/rejects.parquet").to_pylist()
    return [(row["row"], row["key"], row["reason"]) for row in rows]


# -------------------------------------------------------------------------------------- cut off, damaged, closed


def flipped(data):
    middle = len(data) // 2
    return data[:middle] + bytes(byte ^ 255 for byte in data[middle : middle + 100]) + data[middle + 100 :]


DAMAGE = {
    "cut": lambda data: data[: len(data) // 2],
    "flipped": flipped,
    "wrong sum": lambda data: data[:-8] + bytes(8),
    "not packed": gzip.decompress,
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("kind", LINES)
def test_a_damaged_gz_is_an_error_of_data(tmp_path, build_here, kind, damage):
    path = tmp_path / f"x.{'json' if kind == 'coco' else kind}.gz"
    path.write_bytes(DAMAGE[damage](gzip.compress(LINES[kind].encode())))
    refused(
        build_here, tmp_path, r"x\.\w+\.gz: truncated or damaged \(.*\); download it again", kind=kind, path=str(path)
    )


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_gz_that_was_cut_after_the_plan_is_an_error_of_data(tmp_path, make_config, kind):
    path = tmp_path / f"x.{kind}.gz"
    path.write_bytes(gzip.compress(LINES[kind].encode()))
    config = make_config(source={"kind": kind, "path": str(path)}, output="unused").source
    layout = open_source(config).layout
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(DataError, match="truncated or damaged"):
        list(open_source(config, layout).rows(0, 5000))


@pytest.fixture
def nobody():
    """A folder that everyone may read, in a process without the rights of root."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)
        try:
            yield Path(name), lambda: os.seteuid(user)
        finally:
            os.seteuid(user)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "json", "coco", "tars"])
@pytest.mark.parametrize("closed", ["file", "folder"])
def test_a_table_that_may_not_be_read_is_an_error_of_data(nobody, make_config, kind, closed):
    folder, as_root = nobody
    user = os.geteuid()
    as_root()
    (folder / "in").mkdir()
    path = folder / "in" / ("x.tar" if kind == "tars" else "x")
    path.write_text("")
    (path if closed == "file" else path.parent).chmod(0)
    os.seteuid(user)
    with pytest.raises(DataError, match="in.*: Permission denied; source.path.*grant this user access"):
        open_source(make_config(source={"kind": kind, "path": str(path)}, output="unused").source).count()


def test_a_folder_of_images_with_a_closed_one_in_it_is_an_error_of_data(nobody, make_config, make_png):
    folder, as_root = nobody
    user = os.geteuid()
    as_root()
    (folder / "in/closed").mkdir(parents=True)
    (folder / "in/0.png").write_bytes(make_png())
    (folder / "in/closed").chmod(0)
    os.seteuid(user)
    with pytest.raises(DataError, match="in/closed.*: Permission denied; source.path"):
        open_source(make_config(source={"kind": "folder", "path": f"{folder}/in"}, output="unused").source).count()


def test_a_folder_in_the_place_of_a_file_is_an_error_of_data(tmp_path, build_here):
    (tmp_path / "in/x.csv").mkdir(parents=True)
    refused(build_here, tmp_path, "x.csv: Is a directory", kind="csv", path=f"{tmp_path}/in")


# ------------------------------------------------------------------------------------------------------ parquet


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd", "gzip"])
@pytest.mark.parametrize("damaged", ["page", "footer", "cut"])
def test_a_damaged_parquet_is_an_error_of_data(tmp_path, build_here, compression, damaged):
    rows = [{"image": f"{n}.png", "caption": f"caption {n}" * 20} for n in range(3000)]
    path = tmp_path / "x.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, compression=compression, use_dictionary=False)
    data = bytearray(path.read_bytes())
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    if damaged == "page":
        data[4:2000] = b"\xff" * 1996
    elif damaged == "footer":
        data[footer : footer + 40] = b"\xff" * 40
    else:
        del data[footer:]
    path.write_bytes(data)
    said = r"x.parquet: not a valid parquet file \(.*\); download it again"
    refused(build_here, tmp_path, said, kind="parquet", path=str(path))


def test_text_of_a_parquet_that_is_not_utf_8_costs_its_row(tmp_path, build_here, make_png):
    (tmp_path / "0.png").write_bytes(make_png())
    raw = pa.array([b"good", b"bad \xff\xfe", b"good too"], pa.binary())
    text = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
    table = pa.table({"id": ["a", "b", "c"], "image": ["0.png"] * 3, "caption": text})
    pq.write_table(table, tmp_path / "x.parquet")
    source = {"kind": "parquet", "path": f"{tmp_path}/x.parquet", "key": "id"}
    stats = build_here(source=source, output=f"{tmp_path}/out")
    assert (stats["in"], stats["out"], rejects(tmp_path)) == (3, 2, [(1, "b", "unreadable_row")])


# ----------------------------------------------------------------------------------------------------------- COCO


def test_coco_images_without_an_id_are_rows_of_rejects(tmp_path, build_here, make_png):
    (tmp_path / "0.png").write_bytes(make_png())
    image = {"file_name": "0.png"}
    images = [image, {"id": 7, **image}, "text", {"id": None, **image}, {"id": [1], "license": [2], **image}]
    annotations = [{"image_id": name, "id": 1, "caption": "c"} for name in (7, [1])]
    (tmp_path / "x.json").write_text(json.dumps({"images": images, "annotations": annotations, "licenses": None}))
    source = {"kind": "coco", "path": f"{tmp_path}/x.json", "images": "."}
    stats = build_here(source=source, output=f"{tmp_path}/out")
    assert (stats["in"], stats["out"]) == (5, 2)
    assert rejects(tmp_path) == [
        (2, "row 000000002", "no_key"),
        (3, "row 000000003", "unreadable_row"),
        (4, "row 000000004", "no_key"),
    ]


@pytest.mark.parametrize("name", ["annotations", "licenses"])
@pytest.mark.parametrize("entry", [[1], "text", None])
def test_what_is_no_object_in_a_coco_file_is_named(tmp_path, build_here, name, entry):
    tree = {"images": [{"id": 1}], "annotations": [], "licenses": []}
    (tmp_path / "x.json").write_text(json.dumps({**tree, name: [{}, entry]}))
    refused(build_here, tmp_path, rf"x.json: {name}\[1\] is .*not an object", kind="coco", path=f"{tmp_path}/x.json")


def test_lists_that_are_none_are_no_coco(tmp_path, build_here):
    (tmp_path / "x.json").write_text('{"images": {}, "annotations": []}')
    refused(build_here, tmp_path, "not COCO captions", kind="coco", path=f"{tmp_path}/x.json")


# ----------------------------------------------------------------------------------------------------- deep nesting


def nested(levels):
    return "[" * levels + "]" * levels


@pytest.mark.parametrize("levels", [NESTED_AT_MOST, 500, 100_000])
def test_a_row_that_is_nested_too_deeply_is_a_row_of_rejects(tmp_path, build_here, make_png, levels):
    (tmp_path / "0.png").write_bytes(make_png())
    rows = [f'{{"image": "0.png", "caption": "c", "more": {nested(n)}}}' for n in (NESTED_AT_MOST - 1, levels)]
    (tmp_path / "x.jsonl").write_text("\n".join(rows))
    stats = build_here(source={"kind": "jsonl", "path": f"{tmp_path}/x.jsonl"}, output=f"{tmp_path}/out")
    assert (stats["in"], stats["out"], stats["rejected"]) == (2, 1, {"unreadable_row": 1})


@pytest.mark.parametrize("levels", [NESTED_AT_MOST, 500, 100_000])
def test_a_caption_file_that_is_nested_too_deeply_is_a_row_of_rejects(folder, build_here, tmp_path, levels):
    (folder / "a/1.json").write_text(f'{{"caption": "c", "more": {nested(levels)}}}')
    stats = build_here(source={"kind": "folder", "path": str(folder)}, output=f"{tmp_path}/out")
    assert (stats["in"], stats["out"], stats["rejected"]) == (6, 5, {"unreadable_caption": 1})


@pytest.mark.parametrize("kind", ["json", "coco"])
def test_a_whole_file_that_is_nested_too_deeply_is_an_error_of_data(tmp_path, build_here, kind):
    (tmp_path / "x.json").write_text(nested(100_000))
    refused(build_here, tmp_path, "x.json: not JSON .maximum recursion", kind=kind, path=f"{tmp_path}/x.json")


def test_an_item_of_a_list_that_is_nested_too_deeply_is_a_row_of_rejects(tmp_path, build_here, make_png):
    (tmp_path / "0.png").write_bytes(make_png())
    rows = ['{"image": "0.png", "caption": "c"}', f'{{"image": "0.png", "caption": "c", "more": {nested(500)}}}']
    (tmp_path / "x.json").write_text(f"[{','.join(rows)}]")
    stats = build_here(source={"kind": "json", "path": f"{tmp_path}/x.json"}, output=f"{tmp_path}/out")
    assert (stats["out"], stats["rejected"]) == (1, {"unreadable_row": 1})


# ---------------------------------------------------------------------------------------------------- configurations


@pytest.mark.slow
@pytest.mark.parametrize(
    "data",
    [b"output: \xff\xfe", "output: é".encode("latin-1"), b"\x00", ("x: " + nested(100_000)).encode(), b"x: 2024-13-45"],
)
def test_a_configuration_that_is_no_yaml_in_utf_8_is_an_error_of_configuration(tmp_path, data):
    (tmp_path / "x.yaml").write_bytes(data)
    with pytest.raises(ConfigError, match="x.yaml: not YAML in UTF-8") as caught:
        read_yaml(tmp_path / "x.yaml")
    assert caught.value.exit_code == 64


def test_a_configuration_that_may_not_be_read_is_an_error_of_configuration(nobody):
    folder, as_root = nobody
    user = os.geteuid()
    as_root()
    (folder / "x.yaml").write_text("x: 1")
    (folder / "x.yaml").chmod(0)
    os.seteuid(user)
    with pytest.raises(ConfigError, match="x.yaml: Permission denied"):
        read_yaml(folder / "x.yaml")


# ------------------------------------------------------------------------------------------- what is no Unicode


def test_keys_and_addresses_that_are_no_unicode_are_written_as_escapes(tmp_path, build_here):
    """Half of a surrogate pair stands in JSON as an escape, and nowhere in UTF-8."""
    image = {"image": base64.b64encode(png()).decode(), "caption": "a \ud800 dot"}
    rows = [image | {"key": "half \udc00"}, {"image": "http://127.0.0.1:9/\ud800", "caption": "b", "key": "address"}]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"kind": "jsonl", "path": f"{tmp_path}/x.jsonl", "image": "image", "captions": ["caption"], "key": "key"}
    fetch = {"allow_networks": ["127.0.0.0/8"], "attempts": 1, "timeout_s": 20}
    stats = build_here(source=source | {"base64": True}, output=f"{tmp_path}/out", fetch=fetch)
    assert (stats["in"], stats["out"]) == (2, 1)
    (kept,) = pq.read_table(tmp_path / "out/00000.parquet").filter(pc.field("status") == "ok").to_pylist()
    assert kept["key"] == "half \\udc00"
    assert [(row, key) for row, key, _ in rejects(tmp_path)] == [(1, "address")]


def test_a_coco_image_and_a_tar_with_such_names_are_rows_and_a_file_is_refused_by_name(tmp_path, build_here):
    coco = {"images": [{"id": "\ud800", "file_name": "\udc00.png"}], "annotations": []}
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    refused(build_here, tmp_path, "all 1 rows were rejected", kind="coco", path=f"{tmp_path}/coco.json")
    assert [key for _, key, _ in rejects(tmp_path)] == ["\\ud800"]

    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, data in ((b"caf\xe9.png", png()), (b"caf\xe9.txt", b"a dot")):
            info = tarfile.TarInfo(os.fsdecode(name))
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    stats = build_here(source={"kind": "tars", "path": f"{tmp_path}/x.tar"}, output=f"{tmp_path}/of-tars")
    assert (stats["in"], stats["out"]) == (1, 1)

    (tmp_path / "folder").mkdir()
    Path(os.fsdecode(os.fsencode(tmp_path / "folder") + b"/caf\xe9.png")).write_bytes(png())
    refused(
        build_here, tmp_path, r"caf\\udce9.png: 1 file names are not UTF-8", kind="folder", path=f"{tmp_path}/folder"
    )


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_null_among_captions_costs_neither_the_row_nor_the_others(kind, tmp_path, build_here, make_png):
    (tmp_path / "0.png").write_bytes(make_png())
    rows = [{"image": "0.png", "caption": captions} for captions in (["a cat", None], [None], None, ["a dog"])]
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    else:
        text = json.dumps(rows) if kind == "json" else "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"x.{kind}").write_text(text)
    stats = build_here(source={"kind": kind, "path": f"{tmp_path}/x.{kind}"}, output=f"{tmp_path}/out")
    assert (stats["in"], stats["out"], stats["rejected"]) == (4, 2, {"empty_caption": 2})
    stream = Stream(tmp_path / "out", seed=0)
    assert [stream.fetch(number).texts for number in range(2)] == [("a cat",), ("a dog",)]
