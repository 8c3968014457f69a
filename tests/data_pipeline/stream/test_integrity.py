"""What is not what the index was made of is found when it is read, and named."""

import shutil
import tarfile

import numpy as np
import pytest

from data_pipeline.errors import DataError
from data_pipeline.shards.manifest import pack_index, read_index, read_manifest
from data_pipeline.shards.tar import BLOCK, TarWriter, scan
from data_pipeline.shards.verify import index, verify
from data_pipeline.storage import open_storage
from data_pipeline.stream.reader import Stream


def write(folder, seed, name="00000.tar"):
    """Ten samples whose sizes do not depend on the seed."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(seed)
    with (folder / name).open("wb") as file:
        writer = TarWriter(file)
        for row in range(10):
            writer.add(f"{row:09d}", [("jpg", rng.bytes(3000)), ("json", b'{"captions": ["%d"]}' % rng.integers(10))])
        writer.close()
    return folder


@pytest.fixture
def dataset(tmp_path):
    folder = write(tmp_path / "data", 0)
    index([str(folder)], workers=1)
    return folder


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("part", ["name", "header", "image", "json", "padding"])
def test_a_flipped_bit_anywhere_in_a_sample_is_found_and_the_others_are_read(dataset, part):
    path = dataset / "00000.tar"
    with path.open("rb") as file:
        image, text = [member for member in scan(file, "x") if member.name.startswith("000000004.")]
    places = {"name": image.start, "header": image.start + 110, "image": image.data + 1234, "json": text.data + 3,
              "padding": text.data + text.size + 9}  # fmt: skip
    flip(path, places[part])
    stream = Stream(dataset, seed=0)
    with pytest.raises(DataError, match=r"00000\.tar sample 4, bytes \d+\.\.\d+, does not match its index"):
        stream.fetch(4)
    assert [stream.fetch(row).key for row in (0, 3, 5, 9)] == [f"{row:09d}" for row in (0, 3, 5, 9)]


def test_a_tar_cut_between_its_files_is_found_even_with_closing_blocks(dataset):
    path = dataset / "00000.tar"
    with path.open("rb") as file:
        last = [member for member in scan(file, "x") if member.name.startswith("000000007.")][-1]
    path.write_bytes(path.read_bytes()[: last.stop] + bytes(2 * BLOCK))
    with tarfile.open(path) as tar:
        assert len(tar.getmembers()) == 16, "tarfile, and whoever reads as it does, sees nothing"
    with pytest.raises(DataError, match=r"00000\.tar: \d+ bytes, the manifest has \d+; .* was truncated"):
        Stream(dataset, seed=0).fetch(0)


def test_a_tar_that_is_cut_while_it_is_open_is_named(dataset):
    stream = Stream(dataset, seed=0)
    stream.fetch(0)
    with (dataset / "00000.tar").open("r+b") as file:
        file.truncate(9 * BLOCK)
    with pytest.raises(DataError, match=r"00000\.tar: requested bytes \d+\.\.\d+, got .* it was truncated"):
        stream.fetch(5)


def test_another_tar_of_the_same_size_is_found(dataset, tmp_path):
    other = write(tmp_path / "other", 1)
    assert (other / "00000.tar").stat().st_size == (dataset / "00000.tar").stat().st_size
    shutil.copy(other / "00000.tar", dataset)
    with pytest.raises(DataError, match="sample 0, .* another tar or another index"):
        Stream(dataset, seed=0).fetch(0)
    with pytest.raises(DataError, match=r"00000\.tar: sha256"):
        verify(dataset)


def test_the_index_of_another_tar_is_found_whatever_its_size(dataset, tmp_path):
    other = write(tmp_path / "other", 1)
    index([str(other)], workers=1)
    shutil.copy(other / "00000.tar.idx", dataset)
    with pytest.raises(DataError, match="sample 0, .* another tar or another index"):
        Stream(dataset, seed=0).fetch(0)
    with pytest.raises(DataError, match=r"00000\.tar\.idx: index of another tar"):
        verify(dataset)


def test_an_index_without_sums_is_still_read(dataset):
    storage = open_storage(dataset)
    found = read_index(storage, read_manifest(storage).shards[0])
    (dataset / "00000.tar.idx").write_bytes(pack_index(type(found)(found.tar_bytes, found.xxh3, found.offsets)))
    assert read_index(storage, read_manifest(storage).shards[0]).sums is None
    assert Stream(dataset, seed=0).fetch(3).key == "000000003" and verify(dataset)["samples"] == 10
