import hashlib
import io
import json
import os
import shutil

import cv2
import numpy as np
import pytest
from PIL import Image

from data_pipeline.errors import ConfigError, DataError
from data_pipeline.shards import codes
from data_pipeline.shards.codes import codes_name, encode_dataset, encode_shard, read_codes
from data_pipeline.shards.verify import sampled_rows, verify
from data_pipeline.storage import open_storage
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

    def local(job, manifest, *_):
        there = open_storage(job.dataset).list()
        for number, shard in enumerate(manifest.shards):
            if codes_name(shard.name, job.tokenizer_id) not in there:
                encode_shard(job.dataset, number, job.factory(job.directory), job.crops)

    monkeypatch.setattr(codes, "_encode_shards", local)
    return lambda dataset, factory=means, crops=1: encode_dataset(dataset, factory, "dir", progress=False, crops=crops)


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


def test_workers_are_told_the_whole_path_of_a_dataset(small, encode_here, monkeypatch):
    jobs, local = [], codes._encode_shards
    monkeypatch.setattr(codes, "_encode_shards", lambda job, *rest: jobs.append(job) or local(job, *rest))
    monkeypatch.chdir(small.parent)
    encode_here("small")
    assert [job.dataset for job in jobs] == [str(small)]


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
        encode_shard(str(small), 0, Means())


def test_what_was_begun_with_other_crops_is_not_taken_for_finished(small, encode_here):
    encode_shard(str(small), 1, Means())
    with pytest.raises(DataError, match="00001.vq-0123456789ab.bin: 320 bytes instead of 3200; delete it"):
        encode_here(small, crops=10)
    assert not (small / f"codes.vq-{Means().id}.json").exists()


@pytest.mark.parametrize("tokenizer_id", ["short", "0123456789AB"])
def test_a_tokenizer_with_a_malformed_id_is_refused(small, encode_here, tokenizer_id):
    with pytest.raises(DataError, match="12 hex digits"):
        encode_here(small, lambda directory: Means(tokenizer_id))


def test_a_code_beyond_the_codebook_is_refused_before_it_is_written(small, encode_here):
    class Narrow(Means):
        def __init__(self):
            super().__init__()
            self.codebook_size = 2

    with pytest.raises(DataError, match="up to 1, export it again"):
        encode_here(small, lambda directory: Narrow())
    assert not list(small.glob("*.vq-*"))


# ------------------------------------------------------------------------------------------- several crops


def ten_crops_by_hand(pixels, side):
    """18 pixels for a tokenizer of 16: corners and centre of the scaled square, then each seen in a mirror."""
    wide = int(side * 1.1 + 0.5)
    scaled = cv2.resize(pixels, (wide, wide), interpolation=cv2.INTER_CUBIC)
    places = [(0, 0), (0, wide - side), (wide - side, 0), (wide - side, wide - side), ((wide - side) // 2,) * 2]
    crops = []
    for mirrored in (False, True):
        for top, left in places:
            crop = np.empty((side, side, 3), np.uint8)
            for y in range(side):
                for x in range(side):
                    crop[y, x] = scaled[top + y, left + (side - 1 - x if mirrored else x)]
            crops.append(crop)
    return crops


def test_ten_crops_lie_one_after_another_at_a_fixed_stride(small, encode_here, by_tarfile):
    meta = encode_here(small, crops=10)
    assert (meta["crops"], meta["codes_per_image"]) == (10, 16)
    assert [entry["bytes"] for entry in meta["shards"]] == [n * 10 * 16 * 2 for n in (10, 10, 5)]
    for sample_id, sample in enumerate(by_tarfile(small)):
        file = small / codes_name(f"{sample_id // 10:05d}.tar", Means().id)
        for crop, pixels in enumerate(ten_crops_by_hand(np.asarray(Image.open(io.BytesIO(sample["png"]))), 16)):
            place = (sample_id % 10 * 10 + crop) * 16 * 2
            stored = np.frombuffer(file.read_bytes()[place : place + 32], "<u2")
            np.testing.assert_array_equal(stored, Means().encode(pixels[None])[0])


def test_ten_crops_are_read_by_position_and_verified(small, encode_here):
    encode_here(small, crops=10)
    whole, stream = read_codes(small, Means().id), Stream(small, seed=0, codes=Means().id)
    assert whole.shape == (25, 10, 16)
    samples = stream.read(3, 40)
    np.testing.assert_array_equal(np.stack([sample.codes for sample in samples]), whole[[s.id for s in samples]])
    np.testing.assert_array_equal(stream.read_codes(3, 40), whole[[s.id for s in samples]])
    assert verify(small, Means())["agreement"]["lowest"] == 1.0


def test_other_crops_beside_those_that_are_there_are_refused(small, encode_here, tree_digests):
    encode_here(small)
    before = tree_digests(small)
    with pytest.raises(DataError, match="has 1 crops per image, requested 10; encode with --crops 1"):
        encode_here(small, crops=10)
    with pytest.raises(ConfigError, match="crops=3: use 1 or 10"):
        encode_here(small, crops=3)
    assert tree_digests(small) == before


# --------------------------------------------------------------------------------------- encoded once more


class Drifted(Means):
    """The same name, other codes: one of every `each` is off by one. Counts what it encodes."""

    def __init__(self, each, tokenizer_id="0123456789ab"):
        super().__init__(tokenizer_id)
        self.each, self.encoded = each, 0

    def encode(self, images):
        self.encoded += len(images)
        found = super().encode(images)
        found[:, :: self.each] ^= 1
        return found


def test_verify_encodes_the_same_sample_of_every_shard_again(small, encode_here):
    encode_here(small)
    counted = Drifted(each=17)  # of 16 codes the first
    report = verify(small, counted, sample=4, min_agreement=0.9)
    assert counted.encoded == 4 + 4 + 4
    assert report["agreement"] == {
        "tokenizer": Means().id, "samples": 12, "mean": 15 / 16, "lowest": 15 / 16, "lowest_shard": "00000.tar",
    }  # fmt: skip
    assert verify(small, Means())["agreement"] | {"lowest_shard": ""} == {
        "tokenizer": Means().id, "samples": 25, "mean": 1.0, "lowest": 1.0, "lowest_shard": "",
    }  # fmt: skip


def test_the_sample_is_a_draw_of_seed_and_shard():
    drawn = {(seed, shard): tuple(sampled_rows(1000, 16, seed, shard)) for seed in (0, 1) for shard in (0, 1)}
    assert len(set(drawn.values())) == 4
    for (seed, shard), rows in drawn.items():
        assert list(rows) == sampled_rows(1000, 16, seed, shard) == sorted(set(rows)) and len(rows) == 16
    assert sampled_rows(3, 16, 0, 0) == [0, 1, 2]


def test_verify_refuses_a_shard_that_agrees_too_little(small, encode_here):
    encode_here(small)
    other = np.frombuffer((small / f"00001.vq-{Means().id}.bin").read_bytes(), "<u2").copy()
    other[::2] ^= 1  # as if this shard alone had been encoded by other weights, and its digest noted
    (small / f"00001.vq-{Means().id}.bin").write_bytes(other.tobytes())
    path = small / f"codes.vq-{Means().id}.json"
    meta = json.loads(path.read_text())
    meta["shards"][1]["digest"] = hashlib.sha256(other.tobytes()).hexdigest()
    path.write_text(json.dumps(meta))
    assert verify(small)["codes"] == [Means().id]
    with pytest.raises(DataError, match=r"1 faults(.|\n)*00001.vq-0123456789ab.bin: 0.5000 of the codes of 10 images"):
        verify(small, Means())
    assert verify(small, Means(), min_agreement=0.5)["agreement"]["lowest_shard"] == "00001.tar"


def test_verify_with_a_tokenizer_whose_codes_are_not_there_is_refused(small, encode_here):
    encode_here(small)
    with pytest.raises(DataError, match="no codes of tokenizer ffffffffffff; available are 0123456789ab"):
        verify(small, Means("ffffffffffff"))


# ----------------------------------------------------------------------------------------- grown since


@pytest.fixture
def growing(folder, build_here, tmp_path, make_png):
    """-> grow(): six images in shards of four at first, one more each time."""
    tree = {"source": {"kind": "folder", "path": str(folder)}, "output": f"{tmp_path}/out", "shard_size": 4}
    build_here(**tree)

    def grow(number):
        (folder / f"a/n{number}.png").write_bytes(make_png(number))
        (folder / f"a/n{number}.txt").write_text("new")
        return build_here(**tree, grow=True)

    return grow


def test_codes_of_a_dataset_that_grew_stay_and_the_new_shards_get_theirs(growing, encode_here, tmp_path):
    out, first = tmp_path / "out", Stream(tmp_path / "out", seed=0).fingerprint
    encode_here(out)
    before = {path.name: path.read_bytes() for path in out.glob("*.vq-*")}
    growing(50)
    with pytest.raises(DataError, match="codes of dataset .*run `tessera data encode`"):
        Stream(out, seed=0, codes=Means().id)
    assert verify(out)["codes"] == [] and verify(f"{out}@{first}")["codes"] == [Means().id]
    counted = Drifted(each=100)
    encode_here(out, lambda directory: counted)
    assert counted.encoded == 1
    assert {name: (out / name).read_bytes() for name in before if name.endswith(".bin")}.items() <= before.items()
    kept = out / f"codes.vq-{Means().id}-{first[:12]}.json"
    assert kept.read_bytes() == before[f"codes.vq-{Means().id}.json"]
    assert len(read_codes(out, Means().id)) == 7 and len(read_codes(f"{out}@{first}", Means().id)) == 6
    np.testing.assert_array_equal(read_codes(out, Means().id)[:6], read_codes(f"{out}@{first}", Means().id))
    assert verify(out)["codes"] == verify(f"{out}@{first}")["codes"] == [Means().id]


def test_an_older_version_can_be_encoded_after_the_newest(growing, encode_here, tmp_path):
    out, first = tmp_path / "out", Stream(tmp_path / "out", seed=0).fingerprint
    growing(50)
    encode_here(out)
    newest = (out / f"codes.vq-{Means().id}.json").read_bytes()
    encode_here(f"{out}@{first}")
    assert (out / f"codes.vq-{Means().id}.json").read_bytes() == newest
    assert len(Stream(f"{out}@{first}", seed=0, codes=Means().id).read_codes(0, 6)) == 6


def test_codes_of_another_dataset_are_never_put_aside(small, encode_here, growing, tmp_path):
    encode_here(small)
    shutil.copy(small / f"codes.vq-{Means().id}.json", tmp_path / "out")
    with pytest.raises(DataError, match="no version"):
        encode_here(tmp_path / "out")


@pytest.mark.real
@pytest.mark.slow
def test_ray_actors_give_the_codes_of_one_process_and_take_a_gpu_each(small, encode_here, monkeypatch, tmp_path):
    class Local(Means):  # defined here so that it travels by value to workers that cannot import this file
        def encode(self, images):
            (tmp_path / f"gpu-{os.environ.get('CUDA_VISIBLE_DEVICES', '')}").touch()
            return super().encode(images)

    monkeypatch.undo()
    meta = encode_dataset(small, lambda directory: Local(), tmp_path, workers=2, progress=False, crops=10, gpus=1)
    assert json.loads((small / f"codes.vq-{Means().id}.json").read_text()) == meta
    assert sorted(path.name for path in tmp_path.glob("gpu-*")) == ["gpu-0", "gpu-1"]
    for shard in range(3):
        encode_shard(str(small), shard, Means(), crops=10)  # refuses where the bytes differ


@pytest.mark.real
@pytest.mark.slow
def test_an_image_that_kills_the_encoder_is_named(small, encode_here, monkeypatch, repository, by_tarfile, tmp_path):
    lethal = by_tarfile(small)[12]["png"]
    monkeypatch.undo()
    monkeypatch.setenv("TESSERA_TEST_LETHAL", json.dumps({hashlib.sha256(lethal).hexdigest(): "abort"}))
    path = os.environ.get("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONPATH", f"{repository / 'tests/pretrain/lethal'}{os.pathsep}{path}")
    local = type("Local", (Means,), {"__module__": "__main__"})  # travels by value to workers
    with pytest.raises(DataError, match="00001.tar 000000012.png: crashes the decoder .*SIGABRT"):
        encode_dataset(small, lambda directory: local(), tmp_path, workers=1, progress=False)
