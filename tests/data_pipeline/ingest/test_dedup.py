import io
import itertools
import tarfile

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipeline.images import decode_rgb
from data_pipeline.ingest.dedup import COLOUR_LEVELS, duplicates, first_of_alike, first_of_equals
from data_pipeline.signatures import COLOUR_BYTES, colour_signature, perceptual_hash


def slow_alike(hashes, bits, colours=None):
    """Row by row: goes to the first staying row within `bits` whose colours agree or are not known."""
    staying, result = [], []
    for row, value in enumerate(hashes):
        near = [other for other in staying if bin(int(value) ^ int(hashes[other])).count("1") <= bits]
        if colours is not None:
            near = [other for other in near if agree(colours[row], colours[other])]
        result.append(near[0] if near else row)
        staying += [] if near else [row]
    return result


def agree(one, other):
    unknown = not any(one.tolist()) or not any(other.tolist())
    pairs = zip(one.tolist(), other.tolist(), strict=True)
    return unknown or all(abs(first - second) <= COLOUR_LEVELS for first, second in pairs)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(st.integers(0, 8), st.integers(0, 2**32), st.integers(1, 60))
def test_banded_matching_is_the_comparison_of_every_pair(bits, seed, count):
    random = np.random.default_rng(seed)
    centres = random.integers(0, 2**64, 4, dtype=np.uint64)
    noise = [sum(1 << int(bit) for bit in random.integers(0, 64, random.integers(0, 8))) for _ in range(count)]
    hashes = centres[random.integers(0, 4, count)] ^ np.array([value % 2**64 for value in noise], np.uint64)
    assert first_of_alike(hashes, bits).tolist() == slow_alike(hashes, bits)
    colours = np.clip(128 + random.choice([0, 15, 30, 100], (count, 1)) + np.zeros((1, COLOUR_BYTES)), 0, 255)
    colours = (colours * random.integers(0, 4, (count, 1)).clip(0, 1)).astype(np.uint8)  # some are not known
    assert first_of_alike(hashes, bits, colours).tolist() == slow_alike(hashes, bits, colours)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 5), max_size=40))
def test_of_equal_digests_the_first_row_stays(values):
    digests = np.array([[value, value * 7] for value in values], np.uint64).reshape(-1, 2)
    assert first_of_equals(digests).tolist() == [values.index(value) for value in values]


def test_pairs_are_compared_a_bounded_number_at_a_time(monkeypatch):
    hashes = np.random.default_rng(0).integers(0, 2**10, 300, dtype=np.uint64)
    expected = first_of_alike(hashes, 2)
    monkeypatch.setattr("data_pipeline.ingest.dedup._PAIRS_AT_ONCE", 50)
    assert first_of_alike(hashes, 2).tolist() == expected.tolist() == slow_alike(hashes, 2)


def test_rows_that_come_later_change_nothing_about_earlier_ones():
    hashes = np.random.default_rng(1).integers(0, 2**12, 200, dtype=np.uint64)
    whole = first_of_alike(hashes, 2)
    for count in (1, 50, 199):
        assert first_of_alike(hashes[:count], 2).tolist() == whole[:count].tolist()


def test_equal_bytes_and_alike_images_each_name_the_row_that_stays():
    digests = np.array([[1, 1], [2, 2], [1, 1], [3, 3], [2, 2], [4, 4]], np.uint64)
    hashes = np.array([0, 1, 0, 255, 1, 0], np.uint64)
    hashed = np.array([True, True, True, True, True, False])
    keepers, same = duplicates(digests, hashes, hashed, 1)
    assert keepers.tolist() == [-1, 0, 0, -1, 0, -1]
    assert same.tolist() == [False, False, True, False, True, False]
    assert duplicates(digests, hashes, hashed, None)[0].tolist() == [-1, -1, 0, -1, 1, -1]
    assert duplicates(None, hashes, hashed, 0)[0].tolist() == [-1, -1, 0, -1, 1, -1]


def photo(seed):
    small = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return cv2.resize(small, (320, 240), interpolation=cv2.INTER_CUBIC)


def jpeg(pixels, quality):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "jpeg", quality=quality)
    return np.asarray(Image.open(io.BytesIO(file.getvalue())))


def distance(first, second):
    return (perceptual_hash(first) ^ perceptual_hash(second)).bit_count()


@pytest.mark.parametrize(
    "change",
    [
        lambda pixels: jpeg(pixels, 60),
        lambda pixels: cv2.resize(pixels, (160, 120), interpolation=cv2.INTER_AREA),
        lambda pixels: np.clip(pixels.astype(int) + 12, 0, 255).astype(np.uint8),
    ],
    ids=["recompressed", "half the size", "brighter"],
)
def test_the_same_picture_in_another_file_is_near(change):
    assert all(distance(photo(seed), change(photo(seed))) <= 6 for seed in range(20))
    assert all(of_one_colour(photo(seed), change(photo(seed))) for seed in range(20))


def of_one_colour(first, second):
    rows = np.frombuffer(colour_signature(first) + colour_signature(second), np.uint8).reshape(2, -1)
    return first_of_alike(np.zeros(2, np.uint64), 0, rows).tolist() == [0, 0]


def drawn(shape, colour, side=96):
    """A picture of a kind: the same brightness everywhere, in another colour."""
    picture = np.full((side, side, 3), 255, np.uint8)
    if shape == "arrow":
        cv2.arrowedLine(picture, (10, side // 2), (side - 10, side // 2), colour, 8, tipLength=0.4)
    elif shape == "balloon":
        cv2.ellipse(picture, (side // 2, side // 3), (side // 5, side // 4), 0, 0, 360, colour, -1)
        cv2.line(picture, (side // 2, side // 2), (side // 2, side - 4), (90, 90, 90), 1)
    else:
        cv2.circle(picture, (side // 3, side // 3), side // 10, colour, -1)
    return picture


COLOURS = {
    "red": (220, 30, 30),
    "green": (20, 140, 60),
    "blue": (40, 90, 230),
    "orange": (240, 130, 20),
    "grey": [120] * 3,
}


@pytest.mark.parametrize("shape", ["arrow", "balloon", "small circle"])
def test_one_shape_in_two_colours_is_two_pictures(shape):
    for first, second in itertools.combinations(COLOURS.values(), 2):
        assert not of_one_colour(drawn(shape, first), drawn(shape, second)), (first, second)
        assert of_one_colour(drawn(shape, first), jpeg(drawn(shape, first), 60))


@pytest.mark.slow
def test_near_duplicates_of_a_build_have_the_colours_of_what_they_repeat(build_here, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, (colour, quality) in enumerate([("red", 95), ("blue", 95), ("red", 60), ("green", 95), ("blue", 60)]):
        pixels = np.ascontiguousarray(drawn("arrow", COLOURS[colour])[..., ::-1])
        cv2.imwrite(str(folder / f"{number}.jpg"), pixels, [cv2.IMWRITE_JPEG_QUALITY, quality])
        (folder / f"{number}.txt").write_text(f"a {colour} arrow")
    tree = {"source": {"kind": "folder", "path": str(folder)}, "output": f"{tmp_path}/out", "shard_size": 2}
    stats = build_here(**tree, dedup={"near_bits": 12})
    assert (stats["out"], stats["rejected"]) == (3, {"near_duplicate": 2})
    details = {row["key"]: row["detail"] for row in pq.read_table(tmp_path / "out/rejects.parquet").to_pylist()}
    assert details == {"2": "looks like row 0", "4": "looks like row 1"}


@pytest.mark.slow
def test_colours_that_an_earlier_version_did_not_note_separate_nothing(build_here, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()

    def add(name, colour):
        cv2.imwrite(str(folder / f"{name}.png"), np.ascontiguousarray(drawn("arrow", COLOURS[colour])[..., ::-1]))
        (folder / f"{name}.txt").write_text(f"a {colour} arrow")

    add("0", "red")
    tree = {"source": {"kind": "folder", "path": str(folder)}, "output": f"{tmp_path}/out", "shard_size": 1}
    build_here(**tree, dedup={"near_bits": 6})
    table = tmp_path / "out/00000.parquet"
    pq.write_table(pq.read_table(table).drop_columns(["colours"]), table)
    add("1", "blue")
    assert build_here(**tree, dedup={"near_bits": 6}, grow=True)["rejected"] == {"near_duplicate": 1}


@pytest.mark.slow
def test_emoji_of_other_colours_are_kept_and_their_copies_are_not(shared):
    wanted = (
        "1f534",
        "1f7e0",
        "1f7e1",
        "1f7e2",
        "1f7e3",
        "1f7e4",
    )  # circles: red, orange, ... brown
    with tarfile.open(shared / "data/emoji-captions/images.tar") as tar:
        circles = [decode_rgb(tar.extractfile(f"{name}.png").read()) for name in wanted]
    pictures = [copy for circle in circles for copy in (circle, jpeg(circle, 60), cv2.resize(circle, (64, 64)))]
    hashes = np.array([perceptual_hash(picture) for picture in pictures], np.uint64)
    rows = np.frombuffer(b"".join(map(colour_signature, pictures)), np.uint8).reshape(-1, COLOUR_BYTES)
    assert len(set(first_of_alike(hashes, 6).tolist())) < len(circles)
    assert first_of_alike(hashes, 6, rows).tolist() == [3 * (row // 3) for row in range(len(pictures))]


def test_other_pictures_are_far():
    pairs = itertools.combinations(range(20), 2)
    assert min(distance(photo(first), photo(second)) for first, second in pairs) > 12


def test_a_plain_picture_has_no_hash():
    assert perceptual_hash(np.full((20, 30, 3), 200, np.uint8)) is None
