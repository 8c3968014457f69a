import hashlib
import io
import itertools
import tarfile

import pytest
import xxhash

from data_pipeline.errors import DataError
from data_pipeline.shards.manifest import index_tar
from data_pipeline.shards.tar import (
    BLOCK,
    TarWriter,
    header,
    parse_files,
    parse_members,
    samples_of,
    scan,
    split_name,
)

SAMPLES = [("000", [("png", b"x" * 700), ("txt", b"one")]), ("001", [("png", b""), ("txt", "二".encode())])]


def write(path, samples=SAMPLES):
    with path.open("wb") as file:
        writer = TarWriter(file)
        for base, parts in samples:
            writer.add(base, parts)
        writer.close()
    return writer


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("key.png", ("key", "png")),
        ("a.b/key.seg.PNG", ("a.b/key", "seg.png")),
        ("key", ("key", "")),
        ("./k.txt", ("./k", "txt")),
    ],
)
def test_a_name_is_split_at_the_first_dot_of_its_last_part(name, expected):
    assert split_name(name) == expected


def test_tarfile_reads_what_the_writer_writes(tmp_path):
    write(tmp_path / "x.tar")
    with tarfile.open(tmp_path / "x.tar") as tar:
        found = {member.name: tar.extractfile(member).read() for member in tar.getmembers()}
        assert {(m.mtime, m.uid, m.gid, m.mode) for m in tar.getmembers()} == {(0, 0, 0, 0o644)}
    assert found == {f"{base}.{extension}": data for base, parts in SAMPLES for extension, data in parts}


def test_a_header_is_the_one_that_tarfile_makes():
    info = tarfile.TarInfo("000000012.json")
    info.size = 123456
    assert header("000000012.json", 123456) == info.tobuf(tarfile.USTAR_FORMAT)


@pytest.mark.parametrize("piece", [1, 7, BLOCK, 10_000])
def test_an_index_made_of_pieces_is_what_the_writer_noted(tmp_path, piece):
    writer = write(tmp_path / "x.tar")
    data = (tmp_path / "x.tar").read_bytes()
    found, digest = index_tar((data[at : at + piece] for at in range(0, len(data), piece)), "x")
    assert (found.tar_bytes, found.xxh3) == (writer.bytes, writer.xxh3) == (len(data), xxhash.xxh3_64_intdigest(data))
    assert (found.offsets.tolist(), found.sums.tolist()) == (writer.offsets, writer.sums)
    assert digest == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_samples_are_cut_where_the_scanner_sees_the_next_begin(tmp_path, kind):
    with tarfile.open(tmp_path / "x.tar", "w", format=kind) as tar:
        for name in ("a/", "a/0.png", "a/0.txt", "b/", f"{'n' * 80}/{'m' * 60}.png", "c.png", "c.json", "d/"):
            info = tarfile.TarInfo(name)
            info.type = tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE
            info.size, info.mtime = 0 if name.endswith("/") else len(name), 1.5
            tar.addfile(info, io.BytesIO(name.encode()))
    data = (tmp_path / "x.tar").read_bytes()
    members = list(scan(io.BytesIO(data), "x"))
    firsts = [next(group).start for _, group in itertools.groupby(members, key=lambda m: split_name(m.name)[0])]
    found = list(samples_of([data], "x"))
    assert [start for start, _ in found] == firsts
    files = [file for _, sample in found for file in parse_files(sample, "x")]
    assert files == [(member.name, member.name.encode()) for member in members]


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
@pytest.mark.parametrize("name", ["short.png", "folder/图片.png", f"{'d' * 90}/{'n' * 60}.png"])
def test_names_of_every_tar_format_are_read_as_tarfile_reads_them(tmp_path, kind, name):
    if kind == tarfile.USTAR_FORMAT and not name.isascii():
        name = "plain.png"
    with tarfile.open(tmp_path / "x.tar", "w", format=kind) as tar:
        beside = tarfile.TarInfo("folder/")
        beside.type = tarfile.DIRTYPE
        tar.addfile(beside)
        info = tarfile.TarInfo(name)
        info.size = 3
        tar.addfile(info, io.BytesIO(b"abc"))
    data = (tmp_path / "x.tar").read_bytes()
    for members in (list(scan(io.BytesIO(data), "x")), list(parse_members(data, "x"))):
        found = [(member.name, data[member.data : member.data + member.size]) for member in members]
        assert found == [(name, b"abc")] == parse_files(data, "x")


@pytest.mark.parametrize("record", [b"", b"0 path=x\n", b"2 path=x\n", b"-9 path=x\n", b"abc", b"99 path=x\n"])
def test_a_damaged_pax_header_is_refused_by_every_reader(record):
    first, second = tarfile.TarInfo("PaxHeader"), tarfile.TarInfo("x.png")
    first.type, first.size, second.size = tarfile.XHDTYPE, 20, 3
    body = b"10 mtime=1" + record.ljust(10, b"?")
    data = first.tobuf() + body.ljust(BLOCK, b"\0") + second.tobuf() + b"abc".ljust(3 * BLOCK, b"\0")
    for read in (
        lambda: scan(io.BytesIO(data), "x"),
        lambda: parse_members(data, "x"),
        lambda: samples_of([data], "x"),
    ):
        with pytest.raises(DataError, match="PAX header says"):
            list(read())


@pytest.mark.parametrize("cut", [100, BLOCK, 3 * BLOCK, -2 * BLOCK])
def test_a_tar_that_was_cut_off_is_refused_even_between_files(tmp_path, cut):
    write(tmp_path / "x.tar")
    data = (tmp_path / "x.tar").read_bytes()
    with pytest.raises(DataError, match="cut off|closing blocks"):
        list(scan(io.BytesIO(data[:cut]), "x.tar"))
    with pytest.raises(DataError, match="cut off|closing blocks"):
        list(samples_of([data[:cut]], "x.tar"))


def test_a_flipped_bit_in_a_header_is_refused(tmp_path):
    write(tmp_path / "x.tar")
    data = bytearray((tmp_path / "x.tar").read_bytes())
    data[3] ^= 1
    with pytest.raises(DataError, match="no tar header at byte 0"):
        list(scan(io.BytesIO(bytes(data)), "x.tar"))


@pytest.mark.parametrize("name", ["", "n" * 101])
def test_a_name_that_ustar_cannot_hold_is_refused(name):
    with pytest.raises(DataError, match="1 to 100 bytes"):
        header(name, 1)
