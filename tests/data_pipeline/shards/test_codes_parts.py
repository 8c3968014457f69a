"""Each part of the code files, without a build and without Ray: names, places, batches, crops and what is refused."""

import hashlib
import io
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from data_pipeline import sandbox
from data_pipeline.errors import ConfigError, DataError
from data_pipeline.images import MAX_PIXELS, Reject
from data_pipeline.shards import codes
from data_pipeline.shards.codes import (
    CENTRE,
    CHUNK,
    CodesFile,
    Job,
    blame_image,
    codes_name,
    crops_of,
    encode_dataset,
    encode_rows,
    encode_shard,
    find_meta,
    meta_name,
    open_codes,
    parse_meta,
    read_codes,
    read_meta,
    tokenizers_of,
)
from data_pipeline.shards.manifest import Manifest, Shard, index_tar, open_dataset, publish_index
from data_pipeline.shards.tar import BLOCK, TarWriter
from data_pipeline.storage import open_storage
from tests.data_pipeline.shards.test_codes import Means, ten_crops_by_hand

ID, SHA = "0123456789ab", "0123456789abcdef" * 4


class Noting(Means):
    """Means that keeps the shapes of what it was given."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.seen: list[tuple[int, ...]] = []

    def encode(self, images: np.ndarray) -> np.ndarray:
        self.seen.append((images.shape, str(images.dtype)))
        return super().encode(images)


@pytest.fixture(autouse=True)
def no_ray(monkeypatch):
    monkeypatch.setattr(codes, "ray_session", lambda *_: pytest.fail("Ray was to start"))


def pixels_of(number: int, side: int = 16) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)


def png_of(number: int, side: int = 16) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels_of(number, side)).save(file, "png")
    return file.getvalue()


def dataset(folder: Path, *counts: int, files: Any = None) -> Path:
    """A dataset with shards of so many images, image i of `pixels_of(i)`."""
    folder.mkdir(parents=True, exist_ok=True)
    shards, storage, image = [], open_storage(folder), 0
    for number, count in enumerate(counts):
        file = io.BytesIO()
        writer = TarWriter(file)
        for _ in range(count):
            writer.add(f"{image:03d}", files or [("png", png_of(image)), ("txt", b"a")])
            image += 1
        writer.close()
        index, digest = index_tar([file.getvalue()], "x")
        name = f"{number:05d}.tar"
        (folder / name).write_bytes(file.getvalue())
        publish_index(storage, name, index)
        shards.append(Shard(name, count, index.tar_bytes, digest))
    (folder / "manifest.json").write_bytes(Manifest(tuple(shards)).to_json())
    return folder


def encoded(folder: Path, tokenizer: Any = None, crops: int = 1) -> dict[str, Any]:
    """All shards encoded here, then what `encode_dataset` adds when none is missing."""
    tokenizer = tokenizer or Means()
    for number in range(len(open_dataset(folder)[1].shards)):
        encode_shard(str(folder), number, tokenizer, crops)
    return encode_dataset(folder, lambda directory: tokenizer, "dir", progress=False, crops=crops)


def rewritten(folder: Path, **values: Any) -> None:
    path = folder / f"codes.vq-{ID}.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


# ------------------------------------------------------------------------------------------ names and places


def test_names_of_code_files_hold_tokenizer_and_version():
    assert meta_name(ID) == f"codes.vq-{ID}.json" and meta_name(ID, SHA) == f"codes.vq-{ID}-0123456789ab.json"
    assert codes_name("00000.tar", ID) == f"00000.vq-{ID}.bin" and codes_name("a.tar.tar", ID) == f"a.tar.vq-{ID}.bin"


@pytest.mark.parametrize(("crops", "shape"), [(1, (3,)), (10, (10, 3)), (2, (2, 3))])
def test_a_sample_of_codes_lies_at_its_stride(tmp_path, crops, shape):
    values = np.arange(4 * crops * 3, dtype=np.uint16) * 257
    (tmp_path / "b").write_bytes(values.astype("<u2").tobytes())
    file = CodesFile(open_storage(tmp_path), [("a", 0, SHA), ("b", 0, SHA)], 3, 65536, crops)
    assert file.shape == shape
    whole = file.read_shard(1)
    assert whole.dtype == np.uint16 and whole.shape == (4, *shape) and whole.ravel().tolist() == values.tolist()
    for row in range(4):
        name, start, stop = file.place(1, row)
        assert name == "b" and (stop - start) == 2 * crops * 3
        found = np.frombuffer((tmp_path / "b").read_bytes()[start:stop], "<u2").reshape(shape)
        np.testing.assert_array_equal(found, whole[row])
    assert file.place(0, 2)[0] == "a" and CodesFile(file.storage, [], 3, 4).shape == (3,)


def test_codes_of_one_crop_are_the_default(tmp_path):
    meta = encoded(dataset(tmp_path, 2))
    assert (meta["crops"], read_codes(tmp_path, ID).shape) == (1, (2, 16))


def test_tokenizers_are_known_by_their_files(tmp_path):
    folder = dataset(tmp_path / "a", 2)
    storage, manifest = open_dataset(folder)
    assert tokenizers_of(storage) == tokenizers_of(storage, manifest) == []
    encoded(folder)
    others = ["codes.vq-0123456789a.json", f"codes.vq-{ID}-{ID}.json", "codesXvq-ba9876543210.json"]
    others += ["codes.vq-x.json", "codes.vq-ba9876543210.json.tmp", "xcodes.vq-ba9876543210.json"]
    for name in others:
        (folder / name).write_text("{}")
    (folder / meta_name("ba9876543210")).write_text(
        json.dumps({**json.loads((folder / meta_name(ID)).read_text()), "tokenizer": "ba9876543210", "dataset": SHA})
    )
    assert sorted(tokenizers_of(storage)) == [ID, "ba9876543210"] and tokenizers_of(storage, manifest) == [ID]


def test_what_describes_codes_is_found_under_either_name_of_its_version_only(tmp_path):
    folder = dataset(tmp_path, 2)
    storage, manifest = open_dataset(folder)
    assert find_meta(storage, manifest, ID) is None and read_meta(storage, meta_name(ID)) is None
    meta = encoded(folder)
    assert find_meta(storage, manifest, ID) == meta == read_meta(storage, meta_name(ID))
    assert find_meta(storage, manifest, "f" * 12) is None
    (folder / meta_name(ID)).rename(folder / meta_name(ID, manifest.fingerprint))
    assert find_meta(storage, manifest, ID) == meta
    (folder / meta_name(ID)).write_text(json.dumps({**meta, "dataset": SHA}))
    assert find_meta(storage, manifest, ID) == meta
    assert find_meta(storage, Manifest(()), ID) is None


META = {"tokenizer": ID, "codes_per_image": 16, "codebook_size": 256, "shards": []}


def test_a_description_of_before_has_one_crop_and_no_dataset():
    assert parse_meta(json.dumps(META).encode(), "x") == {**META, "crops": 1, "dataset": ""}
    whole = {**META, "crops": 10, "dataset": SHA, "more": [1]}
    assert parse_meta(json.dumps(whole).encode(), "x") == whole


@pytest.mark.parametrize(("field", "most"), [("codes_per_image", 2**20), ("codebook_size", 2**16), ("crops", None)])
def test_numbers_of_a_description_have_bounds(field, most):
    taken = [1, 2, most] if most else [1, 10]
    for value in taken:
        assert parse_meta(json.dumps({**META, field: value}).encode(), "here")[field] == value
    for value in [0, -1, most + 1] if most else [0, 2, 9, 11, -10]:
        with pytest.raises(DataError, match=f"^here: {field}={value}: .*encode again"):
            parse_meta(json.dumps({**META, field: value}).encode(), "here")


def test_the_entry_of_a_shard_has_three_keys():
    entry = {"name": "a.bin", "bytes": 2, "digest": SHA}
    assert parse_meta(json.dumps({**META, "shards": [entry]}).encode(), "here")["shards"] == [entry]
    for wrong, key in (({**entry, "more": 1}, "more"), ({"name": "a.bin", "bytes": 2}, "digest")):
        with pytest.raises(
            DataError, match=rf"^here: shards\.0\.{key}.*remove the codes of this tokenizer and encode again"
        ):
            parse_meta(json.dumps({**META, "shards": [wrong]}).encode(), "here")


# ------------------------------------------------------------------------------------------- opening codes


def test_codes_are_opened_with_what_describes_them(tmp_path):
    folder = dataset(tmp_path, 3, 2)
    meta = encoded(folder, crops=10)
    storage, manifest = open_dataset(folder)
    found = open_codes(storage, manifest, ID)
    data = [(folder / f"0000{number}.vq-{ID}.bin").read_bytes() for number in range(2)]
    assert found.files == [
        (f"0000{number}.vq-{ID}.bin", len(one), hashlib.sha256(one).hexdigest()) for number, one in enumerate(data)
    ]
    assert (found.codes_per_image, found.codebook_size, found.crops) == (16, 256, 10)
    assert meta == {
        "version": 1, "tokenizer": ID, "dataset": manifest.fingerprint, "image_size": 16, "codes_per_image": 16,
        "codebook_size": 256, "crops": 10, "samples": 5, "shards": meta["shards"],
        "codes_used": len(set(np.frombuffer(b"".join(data), "<u2").tolist())),
    }  # fmt: skip
    assert [(one["name"], one["bytes"], one["digest"]) for one in meta["shards"]] == found.files
    expected = [ten_crops_by_hand(pixels_of(number), 16) for number in range(5)]
    np.testing.assert_array_equal(read_codes(folder, ID), [Means().encode(np.stack(crops)) for crops in expected])


def test_codes_that_are_not_there_name_those_that_are(tmp_path):
    folder = dataset(tmp_path / "a", 2)
    root = re.escape(str(folder))
    with pytest.raises(
        DataError,
        match=f"^{root}: no codes of tokenizer {ID}; available are none; "
        f"run `tessera data encode {root} --image-tokenizer DIR` with the tokenizer {ID}$",
    ):
        read_codes(folder, ID)
    encoded(folder)
    meta = json.loads((folder / meta_name(ID)).read_text())
    (folder / meta_name("b" * 12)).write_text(json.dumps({**meta, "tokenizer": "b" * 12}))
    with pytest.raises(DataError, match=f"available are ({ID}, {'b' * 12}|{'b' * 12}, {ID}); run"):
        read_codes(folder, "c" * 12)
    rewritten(folder, dataset=SHA)
    fingerprint = open_dataset(folder)[1].fingerprint[:12]
    with pytest.raises(
        DataError,
        match=f"^{root}/codes.vq-{ID}.json: codes of dataset 0123456789ab, this dataset is {fingerprint}; run",
    ):
        read_codes(folder, ID)


def test_codes_of_other_files_or_of_another_tokenizer_are_refused(tmp_path):
    folder = dataset(tmp_path, 2, 1)
    shards = encoded(folder)["shards"]
    storage, manifest = open_dataset(folder)
    message = f"codes.vq-{ID}.json: must list one NAME.vq-{ID}.bin for each of 2 shards; remove the codes"
    for values in (
        {"shards": shards[::-1]},
        {"shards": shards[:1]},
        {"shards": [*shards, shards[0]]},
        {"tokenizer": "b" * 12},
    ):
        rewritten(folder, **{"shards": shards, "tokenizer": ID, **values})
        with pytest.raises(DataError, match=message):
            open_codes(storage, manifest, ID)


@pytest.mark.parametrize("shard", [0, 1])
def test_codes_of_another_size_are_refused_where_the_size_is_known(tmp_path, shard):
    folder = dataset(tmp_path, 2, 1)
    shards = encoded(folder)["shards"]
    storage, manifest = open_dataset(folder)
    sizes = [64, 32]
    elsewhere = SimpleNamespace(root="far", exists=storage.exists, get=storage.get, list=storage.list)
    name = f"0000{shard}.vq-{ID}.bin"
    stated = [{**one, "bytes": one["bytes"] + 2 * (number == shard)} for number, one in enumerate(shards)]
    rewritten(folder, shards=stated)
    with pytest.raises(
        DataError, match=f"^{re.escape(str(folder))}/{name}: {sizes[shard]} bytes instead of {sizes[shard]}; delete it"
    ):
        open_codes(storage, manifest, ID)
    with pytest.raises(DataError, match=f"^far/{name}: {sizes[shard] + 2} bytes instead of {sizes[shard]}; delete it"):
        open_codes(elsewhere, manifest, ID)
    rewritten(folder, shards=shards)
    for harm in (lambda data: data[:-2], lambda data: data + b"xx"):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(harm(data))
        with pytest.raises(DataError, match=f"{name}: {len(harm(data))} bytes instead of {sizes[shard]}; delete it"):
            open_codes(storage, manifest, ID)
        assert open_codes(elsewhere, manifest, ID).files[shard][0] == name  # a GET tells it
        (folder / name).write_bytes(data)
    open_codes(storage, manifest, ID)


# ------------------------------------------------------------------------------------------------ encoding


@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 130])
def test_a_tokenizer_gets_64_images_at_once_from_the_start_of_a_shard(tmp_path, count):
    folder, tokenizer = dataset(tmp_path, count), Noting()
    assert encode_shard(str(folder), 0, tokenizer) == count
    batches = [min(64, count - first) for first in range(0, count, 64)]
    assert tokenizer.seen == [((batch, 16, 16, 3), "uint8") for batch in batches] and CHUNK == 64
    stored = np.frombuffer((folder / f"00000.vq-{ID}.bin").read_bytes(), "<u2").reshape(count, 16)
    if count:
        np.testing.assert_array_equal(stored, Means().encode(np.stack([pixels_of(number) for number in range(count)])))


@pytest.mark.parametrize("count", [1, 5, 6, 7, 13])
def test_of_ten_crops_six_images_are_encoded_at_once(tmp_path, count):
    folder, tokenizer = dataset(tmp_path, count), Noting()
    storage, manifest = open_dataset(folder)
    found = encode_rows(storage, manifest.shards[0], range(count), tokenizer, 10)
    assert tokenizer.seen == [((10 * min(6, count - at), 16, 16, 3), "uint8") for at in range(0, count, 6)]
    assert found.shape == (count, 10, 16) and found.dtype == np.uint16
    for number in range(count):
        np.testing.assert_array_equal(found[number], Means().encode(np.stack(ten_crops_by_hand(pixels_of(number), 16))))


def test_a_crowd_of_crops_is_encoded_an_image_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(codes, "CHUNK", 9)
    folder, tokenizer = dataset(tmp_path, 2), Noting()
    storage, manifest = open_dataset(folder)
    assert encode_rows(storage, manifest.shards[0], [0, 1], tokenizer, 10).shape == (2, 10, 16)
    assert [shape[0] for shape, _ in tokenizer.seen] == [10, 10]


def test_images_are_decoded_by_one_thread_as_every_worker_has_one_core(tmp_path):
    before = cv2.getNumThreads()
    try:
        cv2.setNumThreads(2)
        encode_rows(*rows_of(dataset(tmp_path, 1)), [0], Means())
        assert cv2.getNumThreads() == 1
    finally:
        cv2.setNumThreads(before)


def test_rows_are_encoded_in_the_order_that_is_asked_for(tmp_path):
    storage, manifest = open_dataset(dataset(tmp_path, 5))
    found = encode_rows(storage, manifest.shards[0], [3, 0, 4], Means())
    np.testing.assert_array_equal(found[:, 0], Means().encode(np.stack([pixels_of(number) for number in (3, 0, 4)])))
    assert encode_rows(storage, manifest.shards[0], [], Means()).shape == (0, 1, 16)


@pytest.mark.parametrize(("size", "wide"), [(8, 9), (10, 11), (15, 16), (16, 18), (20, 22), (25, 28), (40, 44)])
def test_ten_crops_of_any_size_are_those_by_hand(size, wide):
    image = pixels_of(3, 64)
    found = crops_of(image, size, 10)
    np.testing.assert_array_equal(found, ten_by_resize(image, size, wide))
    assert found.shape == (10, size, size, 3) and found.dtype == np.uint8
    np.testing.assert_array_equal(crops_of(image, size, 1), codes.resize(image, "center_crop", size)[None])
    assert CENTRE == 4 and codes.CROPS == (1, 10)


def ten_by_resize(image: np.ndarray, size: int, wide: int) -> list[np.ndarray]:
    scaled, far = codes.resize(image, "center_crop", wide), wide - size
    places = [(0, 0), (0, far), (far, 0), (far, far), (far // 2, far // 2)]
    plain = [scaled[top : top + size, left : left + size] for top, left in places]
    return [*plain, *(np.fliplr(crop) for crop in plain)]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda found: found[:-1], r"uint16 \(1, 16\)"),
        (lambda found: found[:, :-1], r"uint16 \(2, 15\)"),
        (lambda found: found.reshape(2, 4, 4), r"uint16 \(2, 4, 4\)"),
        (lambda found: found.astype(np.int64), r"int64 \(2, 16\)"),
        (lambda found: found.astype(np.uint8), r"uint8 \(2, 16\)"),
        (lambda found: np.full_like(found, 256), r"uint16 \(2, 16\) up to 256"),
        (lambda found: np.append(found.ravel()[:-1], np.uint16(300)).reshape(2, 16), r"uint16 \(2, 16\) up to 300"),
    ],
)
def test_codes_of_another_shape_type_or_size_than_stated_are_refused(tmp_path, wrong, said):
    class Wrong(Means):
        def encode(self, images):
            return wrong(super().encode(images))

    folder = dataset(tmp_path, 2)
    with pytest.raises(
        DataError,
        match=rf"^tokenizer {ID} gave {said}.* for 2 images; expected uint16 \(2, 16\) up to 255, export it again",
    ):
        encode_shard(str(folder), 0, Wrong())
    assert not list(folder.glob("*.vq-*"))


def test_the_last_code_of_a_codebook_may_be_used(tmp_path):
    class Largest(Means):
        def encode(self, images):
            return np.full((len(images), 16), 255, np.uint16)

    assert encoded(dataset(tmp_path, 2), Largest())["codes_used"] == 1


@pytest.mark.parametrize(
    ("values", "refused"),
    [
        ({}, False), ({"codebook_size": 1}, False), ({"codebook_size": 65536}, False), ({"codebook_size": 0}, True),
        ({"codebook_size": 65537}, True), ({"id": "0123456789a"}, True), ({"id": "0123456789abc"}, True),
        ({"id": "0123456789ag"}, True), ({"id": ID + "\n"}, True), ({"id": "x" + ID}, True),
    ],
)  # fmt: skip
def test_a_tokenizer_has_twelve_digits_and_at_most_65536_codes(tmp_path, values, refused):
    folder, tokenizer = dataset(tmp_path), Means()
    vars(tokenizer).update(values)
    if refused:
        with pytest.raises(
            DataError,
            match=f"^tokenizer id={re.escape(repr(tokenizer.id))} with {tokenizer.codebook_size} codes: an id",
        ):
            encoded(folder, tokenizer)
    else:
        assert encoded(folder, tokenizer)["codebook_size"] == tokenizer.codebook_size


@pytest.mark.parametrize("crops", [0, 2, 9, 11])
def test_an_image_is_encoded_in_one_crop_or_in_ten(tmp_path, crops):
    with pytest.raises(ConfigError, match=f"^crops={crops}: use 1 or 10"):
        encode_dataset(dataset(tmp_path, 1), lambda directory: Means(), "dir", crops=crops)


@pytest.mark.parametrize(("first", "second"), [(1, 10), (10, 1)])
def test_codes_of_other_crops_stay_and_are_named(tmp_path, first, second):
    folder = dataset(tmp_path, 1)
    encoded(folder, crops=first)
    message = f"^{re.escape(str(folder))}/codes.vq-{ID}.json: has {first} crops per image, requested {second}; "
    message += f"encode with --crops {first}, or remove these codes"
    with pytest.raises(DataError, match=message):
        encode_dataset(folder, lambda directory: Means(), "dir", progress=False, crops=second)
    assert encode_dataset(folder, lambda directory: Means(), "dir", progress=False, crops=first)["crops"] == first


def test_codes_that_are_there_in_another_length_are_refused_before_they_are_described(tmp_path):
    folder = dataset(tmp_path, 2)
    for data, length in ((bytes(62), 62), (bytes(66), 66)):
        (folder / f"00000.vq-{ID}.bin").write_bytes(data)
        with pytest.raises(
            DataError,
            match=f"^{re.escape(str(folder))}/00000.vq-{ID}.bin: {length} bytes instead of 64; delete it and encode",
        ):
            encode_dataset(folder, lambda directory: Means(), "dir", progress=False)
    assert not (folder / meta_name(ID)).exists()


def test_codes_that_are_described_but_damaged_since_are_refused_when_encoded_again(tmp_path):
    folder = dataset(tmp_path, 2)
    encoded(folder)
    (folder / f"00000.vq-{ID}.bin").write_bytes(bytes(62))
    with pytest.raises(DataError, match=f"00000.vq-{ID}.bin: 62 bytes instead of 64; delete it and encode again"):
        encode_dataset(folder, lambda directory: Means(), "dir", progress=False)


def test_a_sample_that_has_no_image_or_one_that_does_not_decode_is_named(tmp_path):
    folder = dataset(tmp_path / "text", 2, files=[("txt", b"a")])
    with pytest.raises(
        DataError, match=f"^{re.escape(str(folder))}/00000.tar: a sample without an image at block 2; only image"
    ):
        encode_rows(*rows_of(folder), [1], Means())
    folder = dataset(tmp_path / "bad", 2, files=[("png", b"no image")])
    with pytest.raises(
        DataError,
        match=f"^{re.escape(str(folder))}/00000.tar 001.png: cannot be decoded \\(.+\\); see `tessera data verify`",
    ) as raised:
        encode_rows(*rows_of(folder), [1], Means())
    assert raised.value.__suppress_context__


def rows_of(folder: Path) -> tuple[Any, Shard]:
    storage, manifest = open_dataset(folder)
    return storage, manifest.shards[0]


# ----------------------------------------------------------------------------------- who encodes what, without Ray


@pytest.fixture
def pool(monkeypatch):
    """A Ray of this process: -> what was asked of it."""
    asked: dict[str, Any] = {"options": [], "sessions": [], "order": [], "counted": []}

    class Actor:
        def __init__(self, job):
            self.inner, self.number = codes._Encoder(job), len(asked["actors"])
            asked["actors"].append(self)
            self.encode = SimpleNamespace(remote=self.run)

        def run(self, shard):
            asked["order"].append((self.number, shard))
            return self.inner.encode(shard)

    def remote(kind):
        assert kind is codes._Encoder
        return SimpleNamespace(options=lambda **given: asked["options"].append(given) or SimpleNamespace(remote=Actor))

    class Session:
        def __init__(self, *given):
            asked["sessions"].append(given)

        def __enter__(self):
            return None

        def __exit__(self, *_):
            asked["sessions"].append("left")

    class Counter(Session):
        def __init__(self, *given):
            asked["counter"] = given

        def __enter__(self):
            return SimpleNamespace(add=asked["counted"].append)

        def __exit__(self, *_):
            asked["counted"].append("closed")

    def run_tasks(submit, items, workers, gpus, examine):
        asked.update(items=items, workers=workers, gpus=gpus, examine=examine)
        for item in items:
            yield item, submit(item)

    asked["actors"] = []
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(remote=remote))
    for name, value in (("ray_session", Session), ("Counter", Counter), ("run_tasks", run_tasks)):
        monkeypatch.setattr(codes, name, value)
    return asked


def test_missing_shards_are_encoded_by_actors_in_turn(tmp_path, pool):
    folder = dataset(tmp_path, 2, 1, 3, 1)
    encode_shard(str(folder), 1, Means())
    made: list[str] = []
    meta = encode_dataset(
        folder, lambda directory: made.append(directory) or Means(), "tokenizers/a", 2, True, "there:1", gpus=3
    )
    assert pool["counter"] == ("encode", 7, True, 1) and pool["counted"] == [2, 3, 1, "closed"]
    assert pool["sessions"] == [(2, "there:1", 6), "left"]
    assert (pool["items"], pool["workers"], pool["gpus"]) == ([0, 2, 3], 2, 3)
    assert pool["options"] == [{"num_cpus": 1, "num_gpus": 3, "max_restarts": 3, "max_task_retries": 3}]
    assert pool["order"] == [(0, 0), (1, 2), (0, 3)]
    assert made == ["tokenizers/a", *[str(Path("tokenizers/a").absolute())] * 2]  # once here, once an actor
    assert meta["samples"] == 7 and len(read_codes(folder, ID)) == 7
    examine = pool["examine"]
    assert examine.func is blame_image and examine.args[0].dataset == str(folder)


def test_there_are_no_more_actors_than_shards_and_none_for_none(tmp_path, pool):
    folder = dataset(tmp_path, 2, 1)
    encode_dataset(folder, lambda directory: Means(), "dir", 5, progress=False)
    assert len(pool["actors"]) == 2 and pool["sessions"] == [(5, None, 0), "left"]
    assert pool["counter"] == ("encode", 3, False, 0)
    (folder / meta_name(ID)).unlink()
    encode_dataset(folder, lambda directory: Means(), "dir")
    assert len(pool["actors"]) == 2 and len(pool["sessions"]) == 2 and pool["counter"] == ("encode", 3, True, 3)
    pool["counter"] = None
    encode_dataset(folder, lambda directory: Means(), "dir")
    assert pool["counter"] is None  # described already


def test_one_worker_is_the_default_and_paths_are_whole(tmp_path, pool, monkeypatch):
    folder = dataset(tmp_path / "set", 1, 1)
    monkeypatch.chdir(tmp_path)
    encode_dataset("set", lambda directory: Means(), "dir")
    assert len(pool["actors"]) == 1 and pool["sessions"][0] == (1, None, 0)
    job = pool["examine"].args[0]
    assert (job.dataset, job.directory, job.tokenizer_id, job.crops) == (str(folder), str(tmp_path / "dir"), ID, 1)


def test_an_address_of_a_store_stays_as_it_is(tmp_path, pool, monkeypatch):
    inner = open_storage(dataset(tmp_path, 1))
    root = "far://bucket/set"
    far = SimpleNamespace(
        root=root, **{name: getattr(inner, name) for name in ("exists", "get", "list", "put_if_absent", "get_range")}
    )
    monkeypatch.setattr(codes, "open_storage", lambda address: far if address == root else pytest.fail(address))
    monkeypatch.setattr(codes, "open_dataset", lambda address: (far, open_dataset(tmp_path)[1]))
    encode_dataset(root, lambda directory: Means(), "dir", crops=10)
    job = pool["examine"].args[0]
    assert (job.dataset, job.crops) == (root, 10)


def test_another_tokenizer_on_a_node_is_refused_naming_both(tmp_path):
    folder = dataset(tmp_path, 1)
    encoder = codes._Encoder(Job(str(folder), lambda directory: Means("b" * 12), "/there", ID, 1))
    with pytest.raises(
        DataError, match=f"^/there: tokenizer {'b' * 12} on this node, {ID} on the driver's node; the folder must"
    ):
        encoder.encode(0)
    assert not list(folder.glob("*.vq-*"))


def test_an_encoder_loads_its_tokenizer_once(tmp_path):
    folder, loaded = dataset(tmp_path, 2, 1), []
    encoder = codes._Encoder(Job(str(folder), lambda directory: loaded.append(directory) or Means(), "/there", ID, 10))
    assert loaded == [] and [encoder.encode(shard) for shard in (0, 1)] == [2, 1] and loaded == ["/there"]
    assert (folder / f"00001.vq-{ID}.bin").stat().st_size == 2 * 10 * 16


@pytest.mark.parametrize(
    ("reason", "blamed"),
    [("decoder_crash", True), ("decoder_timeout", True), ("undecodable", False), ("too_large", False)],
)
def test_only_an_image_that_ends_its_decoder_is_to_blame(tmp_path, monkeypatch, reason, blamed):
    folder, asked = dataset(tmp_path, 1, 3), []

    class Decoder:
        def __init__(self, rules, **given):
            asked.append((rules.max_pixels, given))

        def look(self, contents):
            asked.append(contents)
            if contents == png_of(2):
                raise Reject(reason, "why")

        def close(self):
            asked.append("closed")

    monkeypatch.setattr(sandbox, "SandboxDecoder", Decoder)
    job = Job(str(folder), Means, "dir", ID, 1)
    if blamed:
        with pytest.raises(
            DataError,
            match=f"^{re.escape(str(folder))}/00001.tar 002.png: crashes the decoder \({reason}: why\); remove it",
        ):
            blame_image(job, 1)
    else:
        blame_image(job, 1)
    looked = [png_of(1), png_of(2), *([] if blamed else [png_of(3)])]
    assert asked == [(MAX_PIXELS, {"stored": False, "cpu_s": 60.0}), *looked, "closed"]


# ------------------------------------------------------------------------------------- versions of a dataset


def grown(folder: Path, *counts: int) -> str:
    """Let a dataset grow to these shards, its manifest kept -> the fingerprint that it had."""
    before = open_dataset(folder)[1]
    (folder / f"manifest-{before.fingerprint[:12]}.json").write_bytes(before.to_json())
    dataset(folder, *counts)
    return before.fingerprint


def test_codes_of_every_version_are_described_beside_each_other(tmp_path):
    folder = dataset(tmp_path, 2)
    first = encoded(folder)
    old = grown(folder, 2, 1)
    assert find_meta(*open_dataset(folder), ID) is None
    second = encoded(folder)
    assert (second["samples"], json.loads((folder / meta_name(ID)).read_text())) == (3, second)
    assert json.loads((folder / meta_name(ID, old)).read_text()) == first
    assert find_meta(*open_dataset(f"{folder}@{old}"), ID) == first
    assert not (folder / meta_name(ID, second["dataset"])).exists()


def test_an_older_version_is_described_under_its_own_name(tmp_path):
    folder = dataset(tmp_path, 2)
    old = grown(folder, 2, 1)
    encode_shard(str(folder), 0, Means())
    meta = encode_dataset(f"{folder}@{old}", lambda directory: Means(), "dir", progress=False)
    assert (meta["dataset"], meta["samples"]) == (old, 2) and not (folder / meta_name(ID)).exists()
    assert json.loads((folder / meta_name(ID, old)).read_text()) == meta
    assert (folder / meta_name(ID, old)).read_bytes().startswith(b'{\n "codebook_size": 256,\n')


def test_a_description_of_another_dataset_is_not_put_aside(tmp_path):
    folder = dataset(tmp_path, 2)
    meta = encoded(folder)
    rewritten(folder, dataset=SHA)
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    with pytest.raises(DataError, match=f"no version {SHA}"):
        encoded(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    assert meta["dataset"] != SHA


def test_codes_are_of_the_blocks_that_the_index_says(tmp_path):
    folder = dataset(tmp_path, 3)
    storage, shard = rows_of(folder)
    offsets = codes.read_index(storage, shard).offsets.tolist()
    for row in range(3):
        where, contents = codes._image(storage, shard.name, (offsets[row], offsets[row + 1]))
        assert (where, contents) == (f"{folder}/00000.tar 00{row}.png", png_of(row)) and BLOCK == 512
