"""Every field of a tar header and every name of a member, one by one, against struct, tarfile and tables."""

import io
import itertools
import re
import struct
import tarfile

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import DataError
from data_pipeline.shards import tar
from data_pipeline.shards.manifest import index_tar
from data_pipeline.shards.tar import (
    BLOCK,
    NEWEST,
    Member,
    NotAFile,
    TarWriter,
    group_samples,
    header,
    is_litter,
    padded,
    parse_files,
    parse_header,
    parse_members,
    refuse_compressed,
    samples_of,
    scan,
    split_names,
)
from tests.data_pipeline.shards.test_tar import END, READERS, entry, pax

FIELDS = struct.Struct("100s8s8s8s12s12s8s1s100s8s32s32s8s8s155s12s")
THREE = b"00000000003\0"


def block_of(
    name=b"a.png", size=THREE, kind=b"0", link=b"", magic=b"ustar\x0000", prefix=b"", written=b"%06o\0 ", rest=b""
):
    """A header of any fields; `written` is how its checksum is spelled."""
    before = [name, b"0000644\0", b"0000000\0", b"0000000\0", size, b"00000000000\0"]
    after = [kind, link, magic, b"", b"", b"", b"", prefix, rest]
    total = sum(FIELDS.pack(*before, b" " * 8, *after))
    return FIELDS.pack(*before, written % total if b"%" in written else written, *after)


def found(members, data):
    """(name, contents, or what it is instead) of members within `data`."""
    return [(m.name, m.instead or data[m.data : m.data + m.size]) for m in members]


def read_alike(data):
    """What `scan`, `parse_members`, `parse_files` and `samples_of` read from a whole tar, after they read the same."""
    scanned = list(scan(io.BytesIO(data), "x"))
    assert list(parse_members(data, "x")) == scanned
    assert parse_files(data.removesuffix(END), "x") == found(scanned, data)
    for version in (1, 2):
        for piece in (100, len(data)):
            pieces = [data[at : at + piece] for at in range(0, len(data), piece)]
            samples = list(samples_of(pieces, "x", version, len(data)))
            groups = list(group_samples(scanned, version))
            assert [start for start, _ in samples] == [group[0].start for group in groups]
            ends = [*(start for start, _ in samples[1:]), scanned[-1].stop if scanned else 0]
            assert [sample for _, sample in samples] == [
                data[start:end] for (start, _), end in zip(samples, ends, strict=True)
            ]
    return scanned


# ------------------------------------------------------------------------------------------- names and groups


@pytest.mark.parametrize("size", [0, 1, 2, 510, 511, 512, 513, 1023, 1024, 1025, 2**40 - 1, 2**40, 2**40 + 1])
def test_a_size_is_padded_to_the_next_whole_block(size):
    whole = next(number for number in range(size, size + BLOCK) if number % BLOCK == 0)
    assert padded(size) == whole and Member("a", 0, 1024, size).stop == 1024 + whole


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["22.05.jpg", "22.06.TXT"], [("22.05", "jpg"), ("22.06", "txt")]),
        (["d.x/22.0.JPG"], [("d.x/22.0", "jpg")]),
        (["22.05.jpg", "22.jpg"], [("22", "05.jpg"), ("22", "jpg")]),
        (["a.9.jp2"], [("a.9", "jp2")]),
        (["a.1_-.2.j"], [("a.1_-.2", "j")]),
        (["a.-1.jpg"], [("a", "-1.jpg")]),
        (["a.x1.jpg"], [("a", "x1.jpg")]),
        (["a.1x.jpg"], [("a", "1x.jpg")]),
        (["a.1.2jpg"], [("a", "1.2jpg")]),
        (["a.1.j_g"], [("a", "1.j_g")]),
        (["a.1."], [("a", "1.")]),
        (["a.1"], [("a", "1")]),
        (["A.B/K.Seg.PNG", "A.B/K.TXT"], [("A.B/K", "seg.png"), ("A.B/K", "txt")]),
        (["/a.png", "a", "a/b"], [("/a", "png"), ("a", ""), ("a/b", "")]),
    ],
)
def test_names_are_split_where_the_key_ends(names, expected):
    assert split_names(names) == expected


LITTER = [
    *("._a.png", "d/._a.png", ".DS_Store", "d/e/.DS_Store", ".", "Thumbs.db", "d/THUMBS.DB", "desktop.ini"),
    *("d/Desktop.INI", "__MACOSX/a.png", "d/__macosx/a.png", "__meta__", "__meta__/x.json", "__META__/x", "____"),
]
NO_LITTER = [
    *("a.png", "thumbs.dbx", "xthumbs.db", "thumbsxdb", "desktop.ini.png", "mydesktop.ini", "desktopxini"),
    *("__MACOSX", "x__MACOSX/a.png", "d/__meta__/x", "__meta", "_meta__", "___", "__meta__.png", "d/.e/a.png"),
    *("__a/b__", "a.__meta__", "d/"),
]


def test_what_archivers_leave_is_told_by_its_name():
    assert [name for name in LITTER if not is_litter(name)] == []
    assert [name for name in NO_LITTER if is_litter(name)] == []


@pytest.mark.parametrize(
    ("names", "first", "second"),
    [
        ("a.png a.txt b.png", "a.png a.txt|b.png", "a.png a.txt|b.png"),
        ("a.png b.png a.txt", "a.png|b.png|a.txt", "a.png|b.png|a.txt"),
        ("a.png ._a.png a.txt", "a.png|._a.png|a.txt", "a.png a.txt"),
        ("a.png a.lnk b.png", "a.png|b.png", "a.png a.lnk|b.png"),
        ("a.png b.lnk a.txt", "a.png a.txt", "a.png|b.lnk|a.txt"),
        ("1.05.png 1.05.txt 1.06.png", "1.05.png 1.05.txt 1.06.png", "1.05.png 1.05.txt|1.06.png"),
        ("1.05.png 1.06.png 1.05.txt", "1.05.png 1.06.png 1.05.txt", "1.05.png|1.06.png|1.05.txt"),
        ("1.05.png 1.png", "1.05.png 1.png", "1.05.png 1.png"),
        ("", "", ""),
    ],
)
def test_neighbours_with_one_key_are_a_sample_by_the_rules_of_each_version(names, first, second):
    instead = {True: NotAFile("a link"), False: None}
    members = [Member(name, at, at, 0, instead[name.endswith(".lnk")]) for at, name in enumerate(names.split())]
    for expected, groups in (
        (first, group_samples(members, 1)),
        (second, group_samples(members, 2)),
        (second, group_samples(members, NEWEST)),
        (second, group_samples(members)),
    ):
        groups = list(groups)
        assert "|".join(" ".join(member.name for member in group) for group in groups) == expected
        assert all(member in members for group in groups for member in group)


COMPRESSED_TARS = [f"x.tar.{end}" for end in ("gz", "bz2", "xz", "zst", "zstd", "lz4", "lzma", "z", "br")]
COMPRESSED_TARS += ["x.tgz", "x.tbz", "x.tbz2", "x.txz", "x.tzst", "x.TAR.GZ", "x.Tgz"]
COMPRESSED = [name.replace("tar.", "") for name in COMPRESSED_TARS if "tar." in name] + ["x.zip", "x.ZIP", "x.tar.zip"]
PLAIN = ["x.tar", "gz", "tgz", "xtgz", "x.tgz2", "x.gz.txt", "x.tar.gz.idx", "x.tar.idx", "x.gzip", "x.7z", "x.tarxgz"]


@pytest.mark.parametrize("name", [*COMPRESSED_TARS, *COMPRESSED, *PLAIN])
def test_compressed_tars_are_refused_and_other_compressed_files_only_where_there_is_no_tar(name):
    for beside, refused in ((["a.tar"], COMPRESSED_TARS), (["a.tar.idx"], COMPRESSED_TARS + COMPRESSED)):
        if name in refused:
            with pytest.raises(
                DataError, match=rf"^here: 1 compressed files, such as {re.escape(name)}; .*decompress them"
            ):
                refuse_compressed([*beside, name], "here")
        else:
            refuse_compressed([*beside, name], "here")


def test_compressed_files_are_counted_and_the_first_is_named():
    with pytest.raises(DataError, match=r"here: 2 compressed files, such as a\.tgz;"):
        refuse_compressed(iter(["z.tar.gz", "b.tar", "a.tgz"]), "here")


# ----------------------------------------------------------------------------------------------- the writer


NAMES = ["a", "a.png", "n" * 100, "é.png", "d/e/f.json"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [0, 1, 7, 8, 511, 512, 8**11 - 1])
def test_a_header_of_any_name_and_size_is_the_one_that_tarfile_makes(name, size):
    info = tarfile.TarInfo(name)
    info.size = size
    assert header(name, size) == info.tobuf(tarfile.USTAR_FORMAT)


@pytest.mark.parametrize("name", ["", "n" * 101, "é" * 51])
def test_a_name_that_is_refused_is_told_with_its_size(name):
    with pytest.raises(DataError, match=f"tar member '{name}' of 5 bytes"):
        header(name, 5)


SAMPLES = st.lists(
    st.lists(st.tuples(st.sampled_from(["png", "txt", "json"]), st.binary(max_size=1100)), min_size=1, max_size=3),
    max_size=4,
)


@settings(max_examples=50, deadline=None)
@given(SAMPLES)
def test_the_writer_makes_the_bytes_of_tarfile_and_notes_each_sample(samples):
    theirs, ours = io.BytesIO(), io.BytesIO()
    writer, begins = TarWriter(ours), [0]
    with tarfile.open(fileobj=theirs, mode="w", format=tarfile.USTAR_FORMAT) as file:
        for number, parts in enumerate(samples):
            writer.add(f"{number:03d}", parts)
            for extension, data in parts:
                info = tarfile.TarInfo(f"{number:03d}.{extension}")
                info.size = len(data)
                file.addfile(info, io.BytesIO(data))
            begins.append(file.offset)
            assert (writer.bytes, writer.xxh3) == (file.offset, xxhash.xxh3_64_intdigest(ours.getvalue()))
    writer.close()
    data = ours.getvalue()
    assert data == theirs.getvalue()[: begins[-1]] + bytes(1024)
    assert (writer.bytes, writer.xxh3) == (len(data), xxhash.xxh3_64_intdigest(data))
    assert writer.offsets == [begin // 512 for begin in begins]
    assert writer.sums == [xxhash.xxh3_64_intdigest(data[a:b]) % 2**32 for a, b in itertools.pairwise(begins)]


def test_a_closed_tar_is_on_the_disk_while_its_file_is_open(tmp_path):
    with (tmp_path / "x.tar").open("wb") as file:
        writer = TarWriter(file)
        writer.add("a", [("txt", b"abc")])
        writer.close()
        assert (tmp_path / "x.tar").stat().st_size == writer.bytes == 4 * BLOCK
        assert not file.closed


# ------------------------------------------------------------------------------------------ fields of a header


@pytest.mark.parametrize(
    "written", [b"%06o\0 ", b"%06o\0\xff", b"%07o\0", b"%08o", b"  %06o", b"%06o  ", b" %05o \0", b"%05o\0\xff\xff"]
)
@pytest.mark.parametrize("name", [b"a.png", b"n" * 100])
def test_every_spelling_of_a_checksum_is_read(written, name):
    block = block_of(name, written=written)
    assert parse_header(block, "x", 0) == (name.decode(), 3, b"0", "")
    assert parse_header(block, "x", 0, checked=True) == parse_header(block, "x", 0, checked=False)


@pytest.mark.parametrize(
    "written",
    [b"", b" " * 8, b"\0" * 8, b"xx%05o\0", b"-%06o\0", b"0o%05o\0", b"%05o8", b"0 %05o\0", b"0000001\0", b"\0%06o"],
)
def test_another_checksum_is_refused_unless_it_is_not_looked_at(written):
    block = block_of(written=written)
    with pytest.raises(DataError, match="^here: no tar header at byte 1024; the file is damaged or not a tar$"):
        parse_header(block, "here", 1024)
    assert parse_header(block, "here", 1024, checked=False) == ("a.png", 3, b"0", "")


@pytest.mark.parametrize("off", [-256, -255, -1, 1, 255, 256, 512])
def test_a_checksum_that_is_off_is_refused(off):
    for name in (b"a.png", b"\xe9.png"):
        total = int(block_of(name)[148:154], 8)
        wrong = block_of(name, written=b"%06o\0 " % (total + off))
        if (name, off) == (b"\xe9.png", -256):  # of signed bytes, one of which is negative
            assert parse_header(wrong, "x", 0)[1] == 3
        else:
            with pytest.raises(DataError, match="no tar header"):
                parse_header(wrong, "x", 0)


@pytest.mark.parametrize("byte", [0x7F, 0x80, 0xFF])
def test_checksums_of_signed_bytes_count_each_byte_outside_their_own_field(byte):
    for at in (0, 147, 156, 511):
        block = bytearray(block_of(kind=b"7"))
        block[at] = byte
        block[148:156] = b" " * 8
        signed = sum(struct.unpack("512b", block))
        block[148:156] = b"%06o\0\xff" % signed
        assert parse_header(bytes(block), "x", 0)[3] == ""
        block[148:156] = b"%06o\0\xff" % (signed + 1)
        with pytest.raises(DataError, match="no tar header"):
            parse_header(bytes(block), "x", 0)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, ("a.png", 3, b"0", "")),
        ({"name": b"n" * 100}, ("n" * 100, 3, b"0", "")),
        ({"name": b"a\0b"}, ("a", 3, b"0", "")),
        ({"name": b""}, ("", 3, b"0", "")),
        ({"name": b"\xe9.png"}, ("\udce9.png", 3, b"0", "")),
        ({"prefix": b"d"}, ("d/a.png", 3, b"0", "")),
        ({"prefix": b"d/e\0f"}, ("d/e/a.png", 3, b"0", "")),
        ({"prefix": b"p" * 155, "rest": b"r" * 12}, ("p" * 155 + "/a.png", 3, b"0", "")),
        ({"prefix": b"\0d"}, ("a.png", 3, b"0", "")),
        ({"prefix": b"d", "magic": b"ustar  \0"}, ("a.png", 3, b"0", "")),
        ({"prefix": b"d", "magic": b"ustar\0xx"}, ("d/a.png", 3, b"0", "")),
        ({"prefix": b"d", "magic": b"xstar\x0000"}, ("a.png", 3, b"0", "")),
        ({"kind": b"2", "link": b"b.png"}, ("a.png", 3, b"2", "b.png")),
        ({"kind": b"1", "link": b"l" * 100}, ("a.png", 3, b"1", "l" * 100)),
        ({"kind": b"1", "link": b"l\0m"}, ("a.png", 3, b"1", "l")),
        ({"size": b"\0" * 12}, ("a.png", 0, b"0", "")),
        ({"size": b" " * 12}, ("a.png", 0, b"0", "")),
        ({"size": b"777777777777"}, ("a.png", 8**12 - 1, b"0", "")),
        ({"size": b"  10 \0xxxxxx"}, ("a.png", 8, b"0", "")),
        ({"size": b"\x80" + b"\0" * 10 + b"\x03"}, ("a.png", 3, b"0", "")),
        ({"size": b"\x80\x01" + b"\0" * 10}, ("a.png", 1 << 80, b"0", "")),
        ({"size": b"\x80" + b"\0" * 9 + b"\x01\x00"}, ("a.png", 256, b"0", "")),
    ],
)
def test_a_header_is_read_field_by_field(fields, expected):
    assert parse_header(block_of(**fields), "x", 0) == expected


@pytest.mark.parametrize(
    "size", [b"\x81" + bytes(11), b"\x7f" + bytes(11), b"8" * 12, b"1 1" + bytes(9), b"x" + bytes(11), b"-1\0"]
)
def test_a_size_that_is_none_is_named_with_its_place_and_the_name(size):
    shown = re.escape(repr(size.ljust(12, b"\0")))
    with pytest.raises(DataError, match=f"^here: the header at byte 512 has size {shown} for 'd/a.png'"):
        parse_header(block_of(size=size, prefix=b"d"), "here", 512)


@pytest.mark.parametrize(
    ("magic", "told"),
    [
        (b"\x1f\x8b", r"gzip.*\(gunzip\)"),
        (b"BZh", r"bzip2.*\(bunzip2\)"),
        (b"\xfd7zXZ\0", r"xz.*\(unxz\)"),
        (b"\x28\xb5\x2f\xfd", r"zstd.*\(unzstd\)"),
        (b"\x04\x22\x4d\x18", r"lz4.*\(unlz4\)"),
        (b"PK\x03\x04", r"zip.*\(unzip, then pack with tar\)"),
    ],
)
def test_a_compressed_file_is_told_as_that_whatever_its_length(magic, told):
    for length in (len(magic), 100, 511, 512, 2000):
        data = magic.ljust(length, b"x")
        for read in (lambda data=data: scan(io.BytesIO(data), "here"), lambda data=data: samples_of([data], "here")):
            with pytest.raises(DataError, match=f"^here: .*; it is compressed .{told}"):
                list(read())
    for data in (magic[:-1], b"x" + magic, entry() + magic, entry() + magic.ljust(BLOCK, b"x")):
        for read in (lambda data=data: scan(io.BytesIO(data), "here"), lambda data=data: samples_of([data], "here")):
            with pytest.raises(DataError, match="download it again|damaged") as raised:
                list(read())
            assert "compressed" not in str(raised.value)


# ----------------------------------------------------------------------------------------- kinds of an entry


@pytest.mark.parametrize(
    ("kind", "size", "instead"),
    [
        (b"0", 3, None),
        (b"\0", 3, None),
        (b"7", 3, None),
        (b"1", 0, "a hard link to 't.png'"),
        (b"2", 0, "a symbolic link to 't.png'"),
        (b"3", 0, "a device or a pipe"),
        (b"4", 0, "a device or a pipe"),
        (b"6", 0, "a device or a pipe"),
        (b"S", 3, "a sparse file"),
        (b"Z", 3, "an entry of the unknown type b'Z'"),
        (b"8", 3, "an entry of the unknown type b'8'"),
    ],
)
@pytest.mark.parametrize("claimed", [b"00000000003\0", b"00000000000\0"])
def test_each_kind_of_entry_has_the_contents_and_the_words_that_it_has(kind, size, instead, claimed):
    size = size if claimed == THREE else 0
    body = b"abc".ljust(BLOCK, b"\0") if size else b""
    data = block_of(kind=kind, link=b"t.png", size=claimed) + body + entry("b.png") + END
    members = read_alike(data)
    assert members == [Member("a.png", 0, 512, size, instead), Member("b.png", len(data) - 2048, len(data) - 1536, 3)]
    assert members[0].instead is None or isinstance(members[0].instead, NotAFile)


@pytest.mark.parametrize(
    ("kind", "name", "size"),
    [(b"5", b"d/", 0), (b"V", b"v", 3), (b"D", b"d", 3), (b"A", b"a", 3), (b"\0", b"d/", 3), (b"\0", b"d/", 0)],
)
def test_folders_labels_and_lists_are_no_members(kind, name, size):
    middle = block_of(name, b"%011o\0" % (3 if kind == b"5" else size), kind) + b"abc".ljust(BLOCK, b"\0") * (size > 0)
    data = entry("a.png") + middle + entry("b.png") + END
    assert list(scan(io.BytesIO(data), "x")) == [
        Member("a.png", 0, 512, 3),
        Member("b.png", len(data) - 2048, len(data) - 1536, 3),
    ]
    assert list(samples_of([data], "x")) == [(0, data[: len(data) - 2048]), (len(data) - 2048, data[-2048:-1024])]
    assert parse_files(middle + entry("b.png"), "x") == [("b.png", b"abc")]
    last = entry("a.png") + middle + END  # what follows the last sample belongs to it
    assert list(samples_of([last], "x")) == [(0, last[:-1024])]


def test_a_regular_file_whose_name_ends_with_a_slash_is_a_member():
    data = block_of(b"d/") + b"abc".ljust(BLOCK, b"\0") + END
    assert READERS["scan"](data) == READERS["parse_files"](data) == [("d/", b"abc")]


@pytest.mark.parametrize("more", [0, 1, 2, 3])
@pytest.mark.parametrize("named", [False, True])
def test_the_map_of_a_sparse_file_is_passed_over_however_long(more, named):
    head = bytearray(block_of(b"s.png", kind=b"S", magic=b"ustar  \0"))
    head[482] = more > 0
    head[504] = more == 0
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    maps = b"".join(bytes([7] * 504 + [number < more - 1] + [0] * 7) for number in range(more))
    long = entry("long", b"%011o\0" % 6, b"s.png\0", b"L") if named else b""
    data = long + bytes(head) + maps + b"abc".ljust(BLOCK, b"\0") + entry("t.png") + END
    first, second = read_alike(data)
    start = len(long) + BLOCK + more * BLOCK
    assert first == Member("s.png", 0, start, 3, NotAFile("a sparse file"))
    assert second == Member("t.png", start + BLOCK, start + 2 * BLOCK, 3)


@pytest.mark.parametrize("kind", [b"0", b"7", b"1", b"Z"])
def test_only_a_sparse_file_has_a_map(kind):
    block = bytearray(block_of(kind=kind, size=b"0" * 11 + b"\0"))
    block[482] = block[504] = 1
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    assert [m.name for m in scan(io.BytesIO(bytes(block) + entry("b.png") + END), "x")] == ["a.png", "b.png"]


# ------------------------------------------------------------------------------------------- extended headers


LONG = "l" * 150 + ".png"
GNU_NAME = entry("long", b"%011o\0" % (len(LONG) + 1), LONG.encode() + b"\0", b"L")
GNU_LINK = entry("long", b"%011o\0" % 6, b"t\0xyz\0", b"K")
HARD = block_of(kind=b"1", link=b"short", size=b"0" * 11 + b"\0")


@pytest.mark.parametrize(
    ("before", "expected"),
    [
        (b"", ("a.png", "short")),
        (GNU_NAME, (LONG, "short")),
        (GNU_LINK, ("a.png", "t")),
        (GNU_NAME + GNU_LINK, (LONG, "t")),
        (GNU_LINK + GNU_NAME, (LONG, "t")),
        (pax((b"linkpath", b"p")), ("a.png", "p")),
        (pax((b"linkpath", b"p"), (b"path", b"q.png")), ("q.png", "p")),
        (pax((b"linkpath", b"p"), kind=b"X"), ("a.png", "p")),
        (GNU_LINK + pax((b"linkpath", b"p")), ("a.png", "t")),
        (pax((b"linkpath", b"p")) + GNU_LINK, ("a.png", "p")),
        (pax((b"path", b"q.png")) + pax((b"path", b"r.png"), (b"linkpath", b"p")), ("q.png", "p")),
        (pax((b"comment", b"c"), (b"linkpath", b"p"), kind=b"g"), ("a.png", "short")),
        (pax((b"path", b"q.png"), (b"GNU.sparse.name", b"r.png")), ("r.png", "short")),
        (pax((b"path", b"\xe9.png")), ("\udce9.png", "short")),
    ],
)
def test_extended_headers_name_the_entry_after_them_and_no_other(before, expected):
    name, target = expected
    data = before + HARD + entry("b.png") + HARD + END
    first, second, third = scan(io.BytesIO(data), "x")
    sparse = b"GNU.sparse" in before
    assert first == Member(name, 0, len(before) + BLOCK, 0, NotAFile(f"a hard link to {target!r}"))
    assert second == Member("b.png", len(before) + BLOCK, len(before) + 2 * BLOCK, 3)
    assert third[0] == "a.png" and third.instead == "a hard link to 'short'" and not (sparse and second.instead)
    assert list(parse_members(data, "x")) == [first, second, third]
    assert parse_files(data.removesuffix(END), "x") == found([first, second, third], data)


@pytest.mark.parametrize("key", [b"GNU.sparse.major", b"GNU.sparse.map", b"GNU.sparsX.map", b"xGNU.sparse.map"])
def test_a_sparse_file_of_pax_is_told(key):
    data = pax((b"comment", b"1"), (key, b"1"), (b"mtime", b"1")) + entry() + entry("b.png") + END
    first, second = read_alike(data)
    assert first.instead == ("a sparse file" if key.startswith(b"GNU.sparse.") else None) and second.instead is None
    early = pax((key, b"1")) + pax((b"comment", b"1")) + entry() + END
    assert READERS["scan"](early) == [("a.png", b"abc")]
    assert [m.instead for m in scan(io.BytesIO(early), "x")] == [first.instead]


def test_of_two_sizes_the_first_counts():
    body = b"x" * 700
    data = pax((b"size", b"700")) + pax((b"size", b"3"), (b"path", b"b.png")) + entry("a.png", body=body) + END
    assert READERS["scan"](data) == READERS["samples_of"](data) == [("b.png", body)]
    none = pax((b"size", b"0")) + entry("a.png", body=b"") + entry("b.png") + END
    assert READERS["scan"](none) == READERS["parse_files"](none) == [("a.png", b""), ("b.png", b"abc")]


@pytest.mark.parametrize(("digits", "taken"), [(b"0" * 18 + b"3", True), (b"0" * 19 + b"3", False)])
def test_a_size_of_pax_has_at_most_nineteen_digits(digits, taken):
    data = pax((b"size", digits)) + entry() + END
    if taken:
        assert READERS["scan"](data) == [("a.png", b"abc")]
    else:
        with pytest.raises(DataError, match=f"^x: a PAX header has size b'{digits.decode()}'; the tar is damaged"):
            READERS["scan"](data)


def test_a_wrong_size_of_pax_is_shown_up_to_forty_bytes():
    with pytest.raises(DataError, match=f"has size b'{'x' * 40}'"):
        READERS["scan"](pax((b"size", b"x" * 60)) + entry() + END)


@pytest.mark.parametrize(
    ("body", "taken"),
    [
        (b"8 path=b\n", False),  # nine bytes
        (b"9 path=b\n", True),
        (b"10 path=b\n", True),
        (b"9 path=b\n9 path=c\n", True),  # of two records the last counts
        (b"9 path=bx9 path=c\n", False),
        (b"000000000000000026 path=b\n", True),
        (b"0000000000000000027 path=b\n", True),  # a number of nineteen digits
        (b"00000000000000000028 path=b\n", False),  # of twenty
        (b"4 =\n9 path=b\n", True),
        (b"4 x\n", False),
        (b"3 \n", False),
        (b"1 \n", False),
        (b"2 =\n", False),
        (b"+9 path=b\n", False),
        (b" 9 path=b\n", False),
        (b" ", False),
        (b"9", False),
        (b"9 path=b", False),
        (b"9 path=b\n" + b"y" * 60, False),  # no blank: without a check of its own the record before came for ever
        (b"9 path=b\n9path=bb\n", False),
    ],
)
def test_a_pax_record_is_its_length_a_key_and_a_value(body, taken):
    data = entry("PaxHeader", b"%011o\0" % len(body), body, b"x") + entry() + END
    if taken:
        name = "c" if b"path=c" in body else "b"
        assert READERS["scan"](data) == READERS["samples_of"](data) == [(name, b"abc")]
    else:
        for read in (READERS["scan"], READERS["samples_of"], READERS["parse_files"]):
            with pytest.raises(DataError, match=r"^x: invalid PAX header b.*; the tar is damaged, download it again"):
                read(data)


def test_a_wrong_pax_record_is_shown_from_its_beginning_up_to_forty_bytes():
    body = b"9 path=b\n" + b"y" * 60
    data = entry("PaxHeader", b"%011o\0" % len(body), body, b"x") + entry() + END
    with pytest.raises(DataError, match=f"invalid PAX header b'{'y' * 40}';"):
        READERS["scan"](data)


def test_of_a_global_header_the_first_name_is_told():
    with pytest.raises(DataError, match="^x: a global PAX header sets 'path' for every entry"):
        READERS["scan"](pax((b"size", b"3"), (b"path", b"p"), kind=b"g") + entry() + END)


@pytest.mark.parametrize("kind", [b"L", b"K", b"x", b"g", b"X"])
def test_an_extended_header_has_at_most_a_mebibyte(kind):
    def long(size):
        body = (b"%d comment=" % size).ljust(size - 1, b"n") + b"\n" if kind in b"xgX" else b"n" * size
        return entry() + entry("long", b"%011o\0" % size, body, kind) + HARD + END

    members = list(scan(io.BytesIO(long(1 << 20)), "x"))
    assert [len(member.name) for member in members] == [5, 1 << 20 if kind == b"L" else 5]
    same = parse_files(long(1 << 20).removesuffix(END), "x")[1][0] == members[1].name
    assert same  # apart, since pytest would compare such names letter by letter
    for read in (READERS["scan"], READERS["samples_of"], READERS["parse_files"]):
        with pytest.raises(DataError, match="^x: name of 1048577 bytes at byte 1024; the tar is damaged"):
            read(long((1 << 20) + 1))


@pytest.mark.parametrize("read", [READERS["scan"], READERS["samples_of"], READERS["parse_files"]])
def test_a_long_name_that_is_cut_off_says_how_much_is_there(read):
    data = entry("long", b"%011o\0" % 700, b"", b"L") + b"n" * 600
    with pytest.raises(DataError, match="^x: 'a long name' has 600 of 700 bytes; the tar was truncated"):
        read(data)


# ------------------------------------------------------------------------------- where a reader begins and ends


def test_plain_headers_are_parsed_on_the_short_path(monkeypatch):
    monkeypatch.setattr(tar, "parse_members", None)
    for name, body in (("a.png", b"abc"), ("n" * 99, b""), ("é.png", b"x" * BLOCK), ("a", b"x" * 513)):
        data = entry(name, b"%011o\0" % len(body), body) * 2
        assert parse_files(data, "x") == [(name, body)] * 2
    assert parse_files(b"", "x") == []


@pytest.mark.parametrize(
    "block",
    [
        block_of(b"n" * 100),
        block_of(kind=b"\0"),
        block_of(kind=b"7"),
        block_of(kind=b"1", link=b"b"),
        block_of(prefix=b"d"),
        block_of(size=b"000000000003"),
        block_of(size=b"00000000003 "),
        block_of(size=b"          3\0"),
        block_of(size=b"3 \0        "),
        block_of(size=b"\x80" + bytes(10) + b"\x03"),
    ],
)
def test_other_headers_are_parsed_as_they_are_scanned(block):
    body = b"" if block[156:157] == b"1" else b"abc".ljust(BLOCK, b"\0")
    for before in (b"", entry("0.png")):
        data = before + block + body + entry("z.png")
        assert parse_files(data, "x") == found(scan(io.BytesIO(data + END), "x"), data)


@pytest.mark.parametrize("before", [0, 1, 2])
def test_a_wrong_size_on_the_short_path_is_told_with_its_place(before):
    data = entry("0.png") * before + block_of(b"a.png", b"00000000009\0")
    with pytest.raises(
        DataError, match=rf"^here: the header at byte {before * 1024} has size b'00000000009' for 'a.png'"
    ):
        parse_files(data, "here")


@pytest.mark.parametrize("there", [0, 1, 511])
def test_a_file_that_is_cut_off_says_how_much_is_there(there):
    data = entry("0.png") + block_of(b"a.png", b"%011o\0" % 512) + b"x" * there
    for read in (
        parse_files,
        lambda data, where: list(scan(io.BytesIO(data), where)),
        lambda data, where: list(samples_of([data], where)),
    ):
        with pytest.raises(DataError, match=rf"^here: 'a.png' has {there} of 512 bytes; the tar was truncated"):
            read(data, "here")
    assert parse_files(data.ljust(2048, b"x"), "here")[1] == ("a.png", (b"x" * there).ljust(512, b"x"))


@pytest.mark.parametrize("size", [1, 511, 513])
def test_the_last_file_of_a_sample_may_lack_its_padding(size):
    data = block_of(b"a.png", b"%011o\0" % size) + b"x" * size
    assert parse_files(data, "x") == [("a.png", b"x" * size)] == found(parse_members(data, "x"), data)
    with pytest.raises(DataError, match="truncated|closing blocks"):
        list(samples_of([data], "x"))
    with pytest.raises(DataError, match="without the closing blocks"):
        list(scan(io.BytesIO(data), "x"))


@pytest.mark.parametrize("rest", [1, 100, 511])
def test_a_rest_that_is_shorter_than_a_header_ends_a_sample_and_cuts_a_tar(rest):
    data = entry() + b"x" * rest
    assert parse_files(data, "x") == [("a.png", b"abc")] == found(parse_members(data, "x"), data)
    for read in (lambda: scan(io.BytesIO(data), "x"), lambda: samples_of([data], "x")):
        with pytest.raises(
            DataError, match=f"^x: ends at byte {1024 + rest} without the closing blocks of a tar; download it again$"
        ):
            list(read())


def test_a_sample_may_end_with_a_closing_block():
    for more in (bytes(512), bytes(1024), bytes(512) + entry("b.png")):
        assert parse_files(entry() + more, "x") == [("a.png", b"abc")]


@pytest.mark.parametrize("closing", [512, 1024, 4096])
def test_one_empty_block_closes_a_tar_and_nothing_is_read_behind_it(closing):
    data = entry() + bytes(closing) + b"x" * 700
    assert READERS["scan"](data) == [("a.png", b"abc")]
    assert list(samples_of([data], "x")) == [(0, entry())]
    assert list(scan(io.BytesIO(bytes(closing)), "x")) == list(samples_of([bytes(closing)], "x")) == []


def test_a_scan_begins_at_a_position():
    data = entry("a.png") + entry("b.png") + END
    assert [(m.name, m.start, m.data) for m in scan(io.BytesIO(data), "x", 1024)] == [("b.png", 1024, 1536)]
    assert list(scan(io.BytesIO(data), "x", 2048)) == []
    with pytest.raises(DataError, match="^x: no tar header at byte 512; the file is damaged or not a tar"):
        list(scan(io.BytesIO(data), "x", 512))


@pytest.mark.parametrize("piece", [1, 511, 512, 513, 1024, 5000])
def test_pieces_are_taken_only_as_they_are_needed(piece):
    data = entry("a.png") + entry("a.txt") + entry("b.png") + entry("c.png") + END
    taken = 0

    def pieces():
        nonlocal taken
        for at in range(0, len(data), piece):
            taken += min(piece, len(data) - at)
            yield data[at : at + piece]

    needed = {0: 4096, 2048: 4608, 3072: 4608}  # all of the next sample and a file behind it, or the closing block
    for start, sample in samples_of(pieces(), "x"):
        assert sample == data[start : {0: 2048, 2048: 3072, 3072: 4096}[start]]
        assert needed[start] <= taken < needed[start] + piece


def test_a_member_that_ends_with_the_stated_size_is_read_and_one_byte_more_is_not():
    data = block_of(size=b"%011o\0" % 512) + b"x" * 512
    assert list(samples_of([data + END], "x", total=len(data) + 1024)) == [(0, data)]
    assert list(samples_of([data + END], "x", total=len(data))) == [(0, data)]
    with pytest.raises(DataError, match="'a.png' has 511 of 512 bytes"):
        list(samples_of([data + END], "x", total=len(data) - 1))
    second = entry("0.png") + data
    with pytest.raises(DataError, match="'a.png' has 511 of 512 bytes"):
        index_tar([second + END], "x", len(second) - 1)


def test_a_tar_that_is_empty_is_cut_off():
    for read in (lambda: scan(io.BytesIO(), "x"), lambda: samples_of([], "x")):
        with pytest.raises(
            DataError, match="^x: ends at byte 0 without the closing blocks of a tar; download it again"
        ):
            list(read())
