"""Encodings of text files: what a byte order mark says holds for every kind of source, and nothing is replaced."""

import codecs
import io
import json
import tarfile

import pytest

from data_pipeline.shards.verify import index
from data_pipeline.stream.reader import Stream

MARKS = {"utf-8": codecs.BOM_UTF8, "utf-16-le": codecs.BOM_UTF16_LE, "utf-16-be": codecs.BOM_UTF16_BE}


def marked(text, codec):
    return MARKS[codec] + text.encode(codec)


def tar_of(path, files):
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.mark.parametrize("codec", MARKS)
def test_marks_are_taken_off_beside_images_and_in_tars(codec, tmp_path, build_here, make_png):
    files = {
        "a.png": make_png(0),
        "a.txt": marked("a café", codec),
        "b.png": make_png(1),
        "b.json": marked(json.dumps({"captions": ["ein Bär"]}, ensure_ascii=False), codec),
    }
    for name, data in files.items():
        (tmp_path / "raw" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "raw" / name).write_bytes(data)
    tar_of(tmp_path / "raw.tar", files)
    for kind, path in (("folder", "raw"), ("tars", "raw.tar")):
        stats = build_here(source={"kind": kind, "path": f"{tmp_path}/{path}"}, output=f"{tmp_path}/{kind}")
        stream = Stream(tmp_path / kind, seed=0)
        assert (stats["in"], stats["rejected"]) == (2, {})
        assert [stream.fetch(number).texts for number in range(2)] == [("a café",), ("ein Bär",)]
    (tmp_path / "indexed").mkdir()
    tar_of(tmp_path / "indexed" / "00000.tar", files)
    index([str(tmp_path / "indexed" / "00000.tar")], workers=1)
    stream = Stream(tmp_path / "indexed", seed=0)
    assert [stream.fetch(number).texts for number in range(2)] == [("a café",), ("ein Bär",)]
