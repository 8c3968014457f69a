import io
import json
import tarfile

import pytest

from data_pipeline.errors import DataError
from data_pipeline.shards.manifest import read_manifest
from data_pipeline.shards.verify import index, verify
from data_pipeline.storage import open_storage
from data_pipeline.stream.reader import Stream


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def edit(name, key, value):
    def change(root):
        tree = json.loads((root / name).read_text())
        tree[key] = value
        (root / name).write_text(json.dumps(tree))

    return change


FAULTS = [
    ("a flipped bit", lambda root: flip(root / "00001.tar"), "00001.tar: sha256"),
    ("a cut shard", lambda root: (root / "00000.tar").write_bytes((root / "00000.tar").read_bytes()[:-1024]), "bytes"),
    ("a lost shard", lambda root: (root / "00002.tar").unlink(), "00002.tar: not found"),
    (
        "another index",
        lambda root: (root / "00000.tar.idx").write_bytes((root / "00002.tar.idx").read_bytes()),
        "another tar",
    ),
    ("a damaged index", lambda root: (root / "00000.tar.idx").write_bytes(b"no"), "not an index"),
    ("lost rows", edit("stats.json", "in", 26), "in 26"),
    ("lost statistics", lambda root: (root / "00001_stats.json").unlink(), "00001_stats.json: not found"),
    ("wrong total", edit("manifest.json", "samples", 7), "samples=7.*download or build the dataset again"),
    ("another version", edit("manifest.json", "version", 9), "version 9"),
    ("no manifest", lambda root: (root / "manifest.json").unlink(), "tessera data build"),
]


def test_a_whole_dataset_verifies(scenes):
    report = verify(scenes)
    assert (report["samples"], report["shards"], report["codes"]) == (25, 3, [])
    assert report["fingerprint"] == read_manifest(open_storage(scenes)).fingerprint


@pytest.mark.parametrize(("what", "harm", "message"), FAULTS, ids=[fault[0] for fault in FAULTS])
def test_verify_names_what_is_off(scenes, what, harm, message):
    harm(scenes)
    with pytest.raises(DataError, match=message) as caught:
        verify(scenes)
    assert caught.value.exit_code == 74


def test_all_faults_are_listed_at_once(scenes):
    flip(scenes / "00000.tar")
    flip(scenes / "00002.tar")
    with pytest.raises(DataError, match=r"2 faults(.|\n)*00000.tar(.|\n)*00002.tar"):
        verify(scenes)


@pytest.mark.slow
def test_foreign_tars_are_indexed_and_read(tmp_path, make_png):
    for number in range(2):
        with tarfile.open(tmp_path / f"{number:05d}.tar", "w") as tar:
            for key in ("x", "y"):
                for name, data in ((f"{key}.png", make_png()), (f"{key}.txt", f"{key}{number}".encode())):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    assert index([f"{tmp_path}/{{00000..00001}}.tar"])["samples"] == 4
    stream = Stream(tmp_path, seed=0)
    assert [stream.fetch(i).texts for i in range(4)] == [("x0",), ("y0",), ("x1",), ("y1",)]
    assert verify(tmp_path)["shards"] == 2


def test_indexing_a_tar_that_was_cut_between_files_is_refused(scenes, tmp_path):
    (tmp_path / "cut.tar").write_bytes((scenes / "00000.tar").read_bytes()[:-1024])
    with pytest.raises(DataError, match="closing blocks"):
        index([str(tmp_path / "cut.tar")])
