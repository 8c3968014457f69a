import hashlib
import io
import itertools
import tarfile
import time

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import DataError
from data_pipeline.shards.manifest import index_tar
from data_pipeline.shards.tar import (
    BLOCK,
    TarWriter,
    checksum,
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
        with pytest.raises(DataError, match="invalid PAX header"):
            list(read())


@pytest.mark.parametrize("cut", [100, BLOCK, 3 * BLOCK, -2 * BLOCK])
def test_a_tar_that_was_cut_off_is_refused_even_between_files(tmp_path, cut):
    write(tmp_path / "x.tar")
    data = (tmp_path / "x.tar").read_bytes()
    with pytest.raises(DataError, match="truncated|closing blocks"):
        list(scan(io.BytesIO(data[:cut]), "x.tar"))
    with pytest.raises(DataError, match="truncated|closing blocks"):
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


# ----------------------------------------------------------------------------------- sizes that are not believed


def field(number):
    """A size in GNU's base 256."""
    return b"\x80" + number.to_bytes(11, "big")


def entry(name="a.png", size=b"00000000003\0", body=b"abc", kind=b"0"):
    """A header with any 12 bytes as its size and a right checksum, and a body with its padding."""
    block = bytearray(header(name, 0))
    block[124:136] = size
    block[156:157] = kind
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + body + bytes(-len(body) % BLOCK)


def pax(*records, kind=b"x"):
    lines = b""
    for key, value in records:
        length = len(key) + len(value) + 3
        length += len(str(length + len(str(length))))
        lines += b"%d %s=%s\n" % (length, key, value)
    return entry("PaxHeader", b"%011o\0" % len(lines), lines, kind)


END = bytes(2 * BLOCK)
READERS = {
    "scan": lambda data: [(m.name, data[m.data : m.data + m.size]) for m in scan(io.BytesIO(data), "x")],
    "parse_members": lambda data: [(m.name, data[m.data : m.data + m.size]) for m in parse_members(data, "x")],
    "parse_files": lambda data: parse_files(data.removesuffix(END), "x"),
    "samples_of": lambda data: [file for _, one in samples_of([data], "x") for file in parse_files(one, "x")],
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
@pytest.mark.parametrize(
    "size",
    [
        *(b"-0000001000\0", b"-0000000001\0", b"+0000000003\0", b"0o000000003\0", b"0_000000003\0", b"00000000009\0"),
        *(b"\xff" * 12, b"\xff" * 11 + b"\0", field(1 << 40), field((1 << 88) - 1), b"77777777777\0", b"x" * 12),
        *(b"\xc0" + bytes(11), b"3 3        \0", b"3\n         \0"),
    ],
)
def test_a_size_that_is_negative_beyond_the_file_or_no_number_is_refused_by_every_reader(read, size):
    with pytest.raises(DataError, match="for 'a.png'|of .* bytes"):
        read(entry(size=size) + entry("b.png") + END)


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
@pytest.mark.parametrize(
    "size", [b"00000000003\0", b"000000000003", b"3\0" + b"x" * 10, b"          3 ", b"3           ", field(3)]
)
def test_every_spelling_of_a_size_that_tarfile_reads_is_read(read, size):
    data = entry(size=size) + entry("b.png") + END
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert (
            [(m.name, tar.extractfile(m).read()) for m in tar] == [("a.png", b"abc"), ("b.png", b"abc")] == read(data)
        )


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
@pytest.mark.parametrize("size", [b"-1000", b"", b"0x3", b"1e3", b" 3", b"9" * 30, b"9" * 5000, b"99999999", b"3\0"])
def test_a_size_in_a_pax_record_is_refused_in_the_same_way(read, size):
    with pytest.raises(DataError, match="has size|of .* bytes"):
        read(pax((b"size", size)) + entry() + END)


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_the_size_in_a_pax_record_counts_instead_of_the_headers(read):
    data = pax((b"mtime", b"1.5"), (b"size", b"700"), (b"path", b"b.png")) + entry(
        "a.png", b"0" * 11 + b"\0", b"x" * 700
    )
    data += entry() + END
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert [(m.name, tar.extractfile(m).read()) for m in tar] == read(data)
    assert [(name, len(body)) for name, body in read(data)] == [("b.png", 700), ("a.png", 3)]


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
@pytest.mark.parametrize("name", [b"path", b"size"])
def test_a_global_pax_header_that_names_or_measures_every_entry_is_refused(read, name):
    assert read(pax((b"comment", b"a commit"), kind=b"g") + entry() + END) == [("a.png", b"abc")]
    with pytest.raises(DataError, match=f"sets '{name.decode()}' for every entry; pack the tar again without"):
        read(pax((name, b"3"), kind=b"g") + entry() + END)


@pytest.mark.parametrize("kind", [b"x", b"g", b"L", b"K"])
def test_a_name_of_gigabytes_is_not_read(kind):
    class Endless(io.RawIOBase):
        """16 GB of names behind one header."""

        def __init__(self):
            self.head, self.at, self.read_bytes = entry("n", b"%011o\0" % (1 << 32), b"", kind), 0, 0

        def seek(self, offset, whence=0):
            self.at = offset if whence == 0 else 1 << 34
            return self.at

        def read(self, size=-1):
            self.read_bytes += size
            assert 0 <= size < 1 << 20
            data = self.head[self.at : self.at + size]
            self.at += size
            return data.ljust(size, b"n")

    with pytest.raises(DataError, match="name of 4294967296 bytes"):
        list(scan(Endless(), "x"))
    pieces = itertools.chain([entry("n", b"%011o\0" % (1 << 32), b"", kind)], itertools.repeat(bytes(BLOCK), 4))
    with pytest.raises(DataError, match="name of 4294967296 bytes"):
        list(samples_of(pieces, "x"))


def test_a_member_that_claims_more_than_the_tar_is_not_waited_for():
    def pieces():
        yield entry(size=field(1 << 50))
        raise AssertionError("read on")

    with pytest.raises(DataError, match="of 1125899906842624 bytes"):
        index_tar(pieces(), "x", size=10 * BLOCK)


def test_a_signed_checksum_of_old_programs_is_read_as_tarfile_reads_it():
    block = bytearray(entry("é.png")[:BLOCK])
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % (sum(block) - 2 * 256)
    data = bytes(block) + b"abc".ljust(BLOCK, b"\0") + END
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert tar.getnames() == [member.name for member in scan(io.BytesIO(data), "x")] == ["é.png"]


# ------------------------------------------------------------------------------------------------------ fuzzing

SIZES = st.one_of(
    st.integers(0, 3 * BLOCK).map(lambda number: b"%011o\0" % number),
    st.integers(-(1 << 33), 1 << 33).map(lambda number: (b"%011o\0" % number)[:12].ljust(12, b"\0")),
    st.integers(0, (1 << 88) - 1).map(field),
    st.integers(0, 5000).map(field),
    st.binary(min_size=12, max_size=12),
)
NAMES = st.sampled_from(["a.png", "a.txt", "b.png", "./c/d.json", "._a.png", "n" * 100, "no", "é.jpg"])
KINDS = st.sampled_from(
    [b"0", b"0", b"0", b"\0", b"5", b"1", b"2", b"3", b"6", b"7", b"S", b"L", b"K", b"x", b"g", b"Z"]
)
RECORDS = st.lists(
    st.tuples(
        st.sampled_from([b"path", b"size", b"mtime", b"linkpath", b"GNU.sparse.size"]),
        st.one_of(st.integers(-600, 2000).map(lambda number: b"%d" % number), st.binary(min_size=1, max_size=12)),
    ),
    max_size=3,
)
ENTRIES = st.one_of(
    st.builds(entry, NAMES, SIZES, st.binary(max_size=40).map(lambda body: body * 30), KINDS),
    st.builds(lambda name, body: entry(name, b"%011o\0" % len(body), body), NAMES, st.binary(max_size=20)),
    st.builds(
        lambda kind, name: entry("long", b"%011o\0" % (len(name) + 1), name + b"\0", kind),
        st.sampled_from([b"L", b"L", b"K"]),
        st.binary(max_size=150),
    ),
    st.builds(lambda records, kind: pax(*records, kind=kind), RECORDS, st.sampled_from([b"x", b"x", b"g"])),
    st.binary(max_size=600),
)


@st.composite
def damaged_tars(draw):
    data = bytearray(b"".join(draw(st.lists(ENTRIES, max_size=6))) + draw(st.sampled_from([END, b"", END * 3])))
    for _ in range(draw(st.integers(0, 2)) if data else 0):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return bytes(data)


class Counted(io.BytesIO):
    """A file that counts what is read from it."""

    reads = taken = 0

    def read(self, size=-1):
        data = super().read(size)
        self.reads, self.taken = self.reads + 1, self.taken + len(data)
        return data


@pytest.mark.slow
@settings(max_examples=400, deadline=None, derandomize=True)
@given(damaged_tars(), st.integers(1, 2000))
def test_any_bytes_are_read_or_refused_within_their_own_length_by_every_reader_alike(data, piece):
    file = Counted(data)
    members, refused = [], None
    try:
        members.extend(scan(file, "x"))
    except DataError as error:
        refused = error
    assert file.reads <= 2 * (len(data) // BLOCK + 2) and file.taken <= len(data) + BLOCK
    starts = [member.start for member in members]
    assert starts == sorted(set(starts)) and all(m.start < m.data <= m.data + m.size <= len(data) for m in members)
    pieces = [data[at : at + piece] for at in range(0, len(data), piece)]
    try:
        index, _ = index_tar(pieces, "x", len(data))
    except DataError:
        assert refused is not None or members and members[-1].stop > len(data)
        return
    assert refused is None
    offsets = [offset * BLOCK for offset in index.offsets.tolist()]
    assert offsets == sorted(offsets) and offsets[-1] <= len(data)
    found = [file for start, stop in itertools.pairwise(offsets) for file in parse_files(data[start:stop], "x")]
    if members:
        expected = [(m.name, m.instead or data[m.data : m.data + m.size]) for m in members if m.start >= offsets[0]]
        assert found == expected or index.samples == 0


@settings(max_examples=200, deadline=None, derandomize=True)
@given(damaged_tars())
def test_what_is_read_is_what_tarfile_reads(data):
    try:
        members = list(scan(io.BytesIO(data), "x"))
    except DataError:
        return
    try:
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            files = [(m.name, m.offset_data, m.size) for m in tar if m.isreg() and not m.issparse()]
    except (tarfile.TarError, ValueError, OverflowError):
        return  # refused there for what does not concern us, such as a time that is no number
    found = [(m.name, m.data, m.size) for m in members if not m.instead]
    assert [place for _, *place in found] == [place for _, *place in files]
    for (ours, *_), (theirs, *_) in zip(found, files, strict=True):
        assert ours == theirs or theirs.startswith(ours)  # tarfile reads a GNU long name beyond its size, to a NUL


def test_a_long_run_of_small_pax_records_takes_no_longer_than_its_length():
    body = b"4 =\n" * (1 << 17)
    began = time.process_time()
    assert READERS["scan"](entry("p", b"%011o\0" % len(body), body, b"x") + entry() + END) == [("a.png", b"abc")]
    assert time.process_time() - began < 5


# ------------------------------------------------------------------------------------------- limits, one by one


def test_a_file_of_a_ustar_tar_has_less_than_8_gib():
    assert header("x", 8 * 2**30 - 1)[124:135] == b"7" * 11
    with pytest.raises(DataError, match="less than 8 GiB"):
        header("x", 8 * 2**30)


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_a_body_may_end_with_the_tar_and_not_one_byte_later(read):
    whole = entry("a.png", b"%011o\0" % BLOCK, b"x" * BLOCK)
    assert read(whole + END) == [("a.png", b"x" * BLOCK)]
    for size, there in ((BLOCK, BLOCK - 1), (700, 512), (2 * BLOCK, 2 * BLOCK - 1)):
        second = entry("b.png", b"%011o\0" % size, b"")
        with pytest.raises(DataError, match=f"'b.png' has {there} of {size} bytes"):
            read(whole + second + b"y" * there)


def test_a_link_to_a_file_whose_name_begins_with_a_digit_is_a_link():
    info = tarfile.TarInfo("a.png")
    info.type, info.linkname = tarfile.LNKTYPE, "0.png"
    assert parse_files(info.tobuf(tarfile.USTAR_FORMAT), "x") == [("a.png", "a hard link to '0.png'")]


def test_the_sum_of_a_sample_is_the_lower_half_of_its_xxh3():
    for data in (b"", b"abc", b"x" * 3000):
        assert checksum(data) == xxhash.xxh3_64_intdigest(data) % 2**32


def test_of_two_names_for_one_file_the_first_counts_as_in_tarfile():
    long = b"l" * 120 + b".png"
    gnu = entry("long", b"%011o\0" % (len(long) + 1), long + b"\0", b"L")
    for data in (gnu + pax((b"path", b"p.png")) + entry() + END, pax((b"path", b"p.png")) + gnu + entry() + END):
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            assert READERS["scan"](data) == READERS["samples_of"](data) == [(tar.getnames()[0], b"abc")]
