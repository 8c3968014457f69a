"""Sources on S3 behind a network that fails: what may pass is waited for, and never counts as bad data."""

import contextlib
import io
import json
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from s3fs import S3FileSystem

from data_pipeline import remote
from data_pipeline.errors import DataError
from data_pipeline.storage import open_storage
from launchers.chaos.proxy import CLEAN, fault_proxy

pytestmark = [pytest.mark.real, pytest.mark.slow]

SOURCES = {
    "images beside a table": {"kind": "jsonl", "path": "AT/rows.jsonl", "images": "img"},
    "images in a tar": {"kind": "jsonl", "path": "AT/rows.jsonl", "images": "images.tar"},
    "packed rows": {"kind": "jsonl", "path": "AT/rows.jsonl.gz", "images": "img"},
    "parquet": {"kind": "parquet", "path": "AT/rows.parquet"},
    "tars": {"kind": "tars", "path": "AT/images.tar"},
    "folder": {"kind": "folder", "path": "AT/img"},
}
FAULTS = [("503", 0), ("refuse", 0), ("cut", 700), ("short", 700), ("stall", 700)]


@pytest.fixture
def material(bucket, make_png):
    """The same twelve pairs in every shape, in a bucket -> its address."""
    import gzip

    storage = open_storage(f"{bucket}/in")
    images = [make_png(number, side=40) for number in range(12)]
    lines = "".join(
        json.dumps({"image": f"{n:02d}.png", "caption": f"c{n}", "pad": "x" * 400}) + "\n" for n in range(12)
    )
    tar, table = io.BytesIO(), io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as file:
        for number, data in enumerate(images):
            storage.put_if_absent(f"img/{number:02d}.png", data)
            storage.put_if_absent(f"img/{number:02d}.txt", f"c{number}".encode())
            for name, part in ((f"{number:02d}.png", data), (f"{number:02d}.txt", f"c{number}".encode())):
                info = tarfile.TarInfo(name)
                info.size = len(part)
                file.addfile(info, io.BytesIO(part))
    pq.write_table(pa.table({"image": images, "caption": [f"c{n}" for n in range(12)]}), table, row_group_size=5)
    files = {"rows.jsonl": lines.encode(), "rows.jsonl.gz": gzip.compress(lines.encode())}
    for name, data in {**files, "images.tar": tar.getvalue(), "rows.parquet": table.getvalue()}.items():
        storage.put_if_absent(name, data)
    return storage.root


@contextlib.contextmanager
def behind(gateway, script, monkeypatch):
    """Everything on S3 by way of a proxy. s3fs, which lists, keeps the address it saw first unless it forgets it."""
    with fault_proxy(gateway.port, script) as proxy, monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
        S3FileSystem.clear_instance_cache()
        try:
            yield proxy
        finally:
            S3FileSystem.clear_instance_cache()


@pytest.mark.parametrize("name", SOURCES)
def test_a_source_on_s3_is_read_whole_through_every_fault(
    material, gateway, build_here, monkeypatch, tmp_path, tree_digests, name
):
    monkeypatch.setattr(remote, "STALL_S", 1.0)
    source = {key: value.replace("AT", material) for key, value in SOURCES[name].items()}
    whole = build_here(source=source, output=f"{tmp_path}/whole", shard_size=5)
    assert (whole["in"], whole["out"]) == (12, 12)

    def script(number, line):
        return FAULTS[number // 3 % len(FAULTS)] if number % 3 == 1 else CLEAN

    with behind(gateway, script, monkeypatch) as proxy:
        build_here(source=source, output=f"{tmp_path}/out", shard_size=5)
    assert sum(proxy.happened.values()) > proxy.happened["clean"]
    assert tree_digests(tmp_path / "out") == tree_digests(tmp_path / "whole")


def test_a_source_that_is_gone_for_good_ends_the_build_and_no_row_is_blamed(
    material, gateway, build_here, monkeypatch, tmp_path
):
    monkeypatch.setattr(remote, "PATIENCE_S", 6.0)  # as long may the answers for other objects take
    source = {"kind": "jsonl", "path": f"{material}/rows.jsonl", "images": "img"}

    def script(number, line):
        return ("503", 0) if "07.png" in line else CLEAN

    with behind(gateway, script, monkeypatch), pytest.raises(DataError, match="img/07.png.*given up after"):
        build_here(source=source, output=f"{tmp_path}/out", shard_size=5)
    assert build_here(source=source, output=f"{tmp_path}/out", shard_size=5)["out"] == 12


def test_a_missing_image_on_s3_is_a_row_of_rejects(material, build_here, tmp_path):
    open_storage(material).remove("img/03.png")
    source = {"kind": "jsonl", "path": f"{material}/rows.jsonl", "images": "img"}
    stats = build_here(source=source, output=f"{tmp_path}/out", shard_size=5)
    assert (stats["out"], stats["rejected"]) == (11, {"unreadable_file": 1})
