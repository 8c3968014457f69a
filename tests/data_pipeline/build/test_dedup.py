import io
import itertools

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipeline.build.dedup import duplicates, first_of_alike, first_of_equals, perceptual_hash


def slow_alike(hashes, bits):
    """Row by row: goes to the first staying row within `bits`."""
    staying, result = [], []
    for row, value in enumerate(hashes):
        near = [other for other in staying if bin(int(value) ^ int(hashes[other])).count("1") <= bits]
        result.append(near[0] if near else row)
        staying += [] if near else [row]
    return result


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 8), st.integers(0, 2**32), st.integers(1, 60))
def test_banded_matching_is_the_comparison_of_every_pair(bits, seed, count):
    random = np.random.default_rng(seed)
    centres = random.integers(0, 2**64, 4, dtype=np.uint64)
    noise = [sum(1 << int(bit) for bit in random.integers(0, 64, random.integers(0, 8))) for _ in range(count)]
    hashes = centres[random.integers(0, 4, count)] ^ np.array([value % 2**64 for value in noise], np.uint64)
    assert first_of_alike(hashes, bits).tolist() == slow_alike(hashes, bits)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 5), max_size=40))
def test_of_equal_digests_the_first_row_stays(values):
    digests = np.array([[value, value * 7] for value in values], np.uint64).reshape(-1, 2)
    assert first_of_equals(digests).tolist() == [values.index(value) for value in values]


def test_pairs_are_compared_a_bounded_number_at_a_time(monkeypatch):
    hashes = np.random.default_rng(0).integers(0, 2**10, 300, dtype=np.uint64)
    expected = first_of_alike(hashes, 2)
    monkeypatch.setattr("data_pipeline.build.dedup._PAIRS_AT_ONCE", 50)
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


def test_other_pictures_are_far():
    pairs = itertools.combinations(range(20), 2)
    assert min(distance(photo(first), photo(second)) for first, second in pairs) > 12


def test_a_plain_picture_has_no_hash():
    assert perceptual_hash(np.full((20, 30, 3), 200, np.uint8)) is None
