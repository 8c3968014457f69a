import io
import json

import numpy as np
import pytest
from PIL import Image

from data_pipeline.errors import DataError
from data_pipeline.shards import codes
from data_pipeline.shards.codes import encode_dataset, encode_shard, read_codes
from data_pipeline.shards.verify import verify
from data_pipeline.stream.reader import Stream


class Means:
    """A tokenizer whose codes are the means of 4 x 4 patches."""

    def __init__(self, tokenizer_id="0123456789ab"):
        self.id, self.image_size, self.codes_per_image, self.codebook_size = tokenizer_id, 16, 16, 256

    def encode(self, images):
        return images.reshape(-1, 4, 4, 4, 4, 3).mean((2, 4, 5)).astype(np.uint16).reshape(len(images), 16)

    def decode(self, values):
        return np.repeat(values.reshape(-1, 4, 4, 1), 3, -1).repeat(4, 1).repeat(4, 2).astype(np.uint8)


def means(directory):
    return Means()


@pytest.fixture
def encode_here(monkeypatch):
    """encode_dataset without Ray."""

    def local(storage, manifest, tokenizer_id, source, *_):
        for shard in range(len(manifest.shards)):
            encode_shard(storage.root, shard, source[0](source[1]))

    monkeypatch.setattr(codes, "_encode_shards", local)
    return lambda dataset, factory=means: encode_dataset(dataset, factory, "dir", progress=False)


@pytest.fixture
def small(build_here, tmp_path):
    build_here(source={"kind": "scenes", "count": 25, "image_size": 16}, output=f"{tmp_path}/small", shard_size=10)
    return tmp_path / "small"


def test_codes_come_back_by_sample_and_all_at_once(small, encode_here, by_tarfile):
    meta = encode_here(small)
    pixels = [np.asarray(Image.open(io.BytesIO(sample["png"]))) for sample in by_tarfile(small)]
    expected = Means().encode(np.stack(pixels))
    stream = Stream(small, seed=0, codes=Means().id)
    np.testing.assert_array_equal(read_codes(small, Means().id), expected)
    for sample in stream.read(0, 25):
        np.testing.assert_array_equal(sample.codes, expected[sample.id])
    assert (meta["samples"], meta["codes_used"]) == (25, len(np.unique(expected)))


def test_codes_are_read_by_position_without_touching_the_tars(small, encode_here):
    encode_here(small)
    stream = Stream(small, seed=0, codes=Means().id)
    expected = np.stack([sample.codes for sample in stream.read(3, 60)])
    for path in small.glob("*.tar*"):
        path.unlink()
    np.testing.assert_array_equal(Stream(small, seed=0, codes=Means().id).read_codes(3, 60), expected)
    with pytest.raises(DataError, match="opened without codes"):
        Stream(small, seed=0).read_codes(0, 1)


def test_codes_leave_the_fingerprint_of_the_dataset_alone(small, encode_here):
    before = Stream(small, seed=0).fingerprint
    encode_here(small)
    assert Stream(small, seed=0, codes=Means().id).fingerprint == before
    assert verify(small)["codes"] == [Means().id]


def test_encoding_again_changes_nothing(small, encode_here, tree_digests):
    encode_here(small)
    before = tree_digests(small)
    encode_here(small)
    assert tree_digests(small) == before


@pytest.mark.parametrize("encoded", [False, True])
def test_codes_of_another_tokenizer_are_refused_naming_both(small, encode_here, encoded):
    if encoded:
        encode_here(small)
    with pytest.raises(DataError, match="no codes of tokenizer ffffffffffff.*data encode") as caught:
        Stream(small, seed=0, codes="ffffffffffff")
    assert ("0123456789ab" if encoded else "none") in str(caught.value)


def test_codes_of_another_dataset_are_refused(small, encode_here, build_here, tmp_path):
    encode_here(small)
    build_here(
        source={"kind": "scenes", "count": 25, "image_size": 16, "seed": 1}, output=f"{tmp_path}/b", shard_size=10
    )
    for path in small.glob("*vq-*"):
        (tmp_path / "b" / path.name).write_bytes(path.read_bytes())
    with pytest.raises(DataError, match="codes of dataset"):
        Stream(tmp_path / "b", seed=0, codes=Means().id)


@pytest.mark.parametrize("harm", [lambda data: data[:-2], lambda data: b"\1" + data[1:]])
def test_verify_sees_damaged_codes(small, encode_here, harm):
    encode_here(small)
    path = small / f"00001.vq-{Means().id}.bin"
    path.write_bytes(harm(path.read_bytes()))
    with pytest.raises(DataError, match="00001.vq-0123456789ab.bin"):
        verify(small)


def test_other_codes_under_the_same_id_are_never_written_over(small, encode_here):
    encode_here(small)
    (small / f"codes.vq-{Means().id}.json").unlink()
    (small / f"00000.vq-{Means().id}.bin").write_bytes(bytes(10 * 32))
    with pytest.raises(DataError, match="nothing was overwritten"):
        encode_here(small)


@pytest.mark.parametrize("tokenizer_id", ["short", "0123456789AB"])
def test_a_tokenizer_with_a_malformed_id_is_refused(small, encode_here, tokenizer_id):
    with pytest.raises(DataError, match="12 hex digits"):
        encode_here(small, lambda directory: Means(tokenizer_id))


@pytest.mark.real
@pytest.mark.slow
def test_ray_actors_give_the_codes_of_one_process(small, encode_here, monkeypatch, tmp_path, tree_digests):
    class Local(Means):  # defined here so that it travels by value to workers that cannot import this file
        pass

    monkeypatch.undo()
    meta = encode_dataset(small, lambda directory: Local(), tmp_path, workers=2, progress=False)
    assert json.loads((small / f"codes.vq-{Means().id}.json").read_text()) == meta
    for shard in range(3):
        encode_shard(str(small), shard, Means())  # refuses where the bytes differ
