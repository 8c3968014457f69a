"""The data recipes of the repository, checked and built on the real data where it is there."""

import gzip
import json
import lzma
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.config import BuildConfig
from data_pipeline.images import decode_rgb, encode
from data_pipeline.ingest import run
from data_pipeline.settings import load_settings
from data_pipeline.shards.verify import verify
from data_pipeline.stream.reader import Stream
from data_pipeline.text.config import VocabConfig

REPOSITORY = Path(__file__).resolve().parents[2]
REAL = [("emoji", "emoji-captions", 2852, 2), ("photos", "photo-captions", 39, 5)]


@pytest.mark.parametrize("name", ["data/emoji", "data/photos", "data/folder", "data/laion", "demo/data"])
def test_every_data_recipe_validates_and_says_how_to_run_it(name):
    path = REPOSITORY / "configs" / f"{name}.yaml"
    load_settings(BuildConfig, path)
    assert f"tessera data build configs/{name}.yaml" in path.read_text()


def test_the_vocabulary_recipe_reads_what_the_data_recipe_writes():
    data = load_settings(BuildConfig, REPOSITORY / "configs/demo/data.yaml")
    assert load_settings(VocabConfig, REPOSITORY / "configs/demo/vocab.yaml").dataset == data.output


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "data", "pairs", "captions"), REAL)
def test_real_pairs_are_all_built_and_verified(shared, tmp_path, recipe, data, pairs, captions):
    overrides = [f"source.path={shared}/data/{data}", f"output={tmp_path}/out"]
    stats = run.build(load_settings(BuildConfig, REPOSITORY / f"configs/data/{recipe}.yaml", overrides), progress=False)
    assert (stats["in"], stats["out"], stats["rejected"]) == (pairs, pairs, {})
    assert verify(tmp_path / "out")["samples"] == pairs
    assert len(Stream(tmp_path / "out", seed=0).fetch(0).texts) == captions


# ------------------------------------------------------------------------- labelled images, as captions


@pytest.mark.slow
def test_the_fruits_are_built_whole_with_their_class_as_caption(shared, build_here, tmp_path):
    folder = f"{shared}/data/fruits32"
    source = {"kind": "parquet", "path": f"{folder}/train.parquet::{folder}/test.parquet", "key": "id"}
    stats = build_here(source={**source, "captions": ["class_name"]}, output=f"{tmp_path}/out", shard_size=500)
    classes = json.loads((shared / "data/fruits32/classes.json").read_text())
    assert (stats["in"], stats["out"], stats["shards"]) == (1400, 1400, 3) and verify(tmp_path / "out")
    stream = Stream(tmp_path / "out", seed=0)
    captions = Counter(stream.fetch(number).texts[0] for number in range(1400))
    assert set(captions) <= set(classes.values() if isinstance(classes, dict) else classes) and len(captions) == 20
    assert decode_rgb(stream.fetch(0).image).shape == (32, 32, 3)


@pytest.mark.slow
def test_fashion_mnist_is_built_from_the_parquet_that_its_arrays_are_written_to(shared, build_here, tmp_path):
    """idx files are arrays, no table of files: eight lines of a user's make them one, with PNG, which loses nothing."""
    folder = shared / "data/fashion-mnist"
    pixels = np.frombuffer(lzma.decompress((folder / "t10k-images-idx3-ubyte.xz").read_bytes()), "u1")[16:]
    labels = np.frombuffer(gzip.decompress((folder / "t10k-labels-idx1-ubyte.gz").read_bytes()), "u1")[8:]
    pixels = pixels.reshape(-1, 28, 28)[:1000]
    names = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle-boot"]
    files = [encode(np.repeat(image[..., None], 3, 2), "png", 100) for image in pixels]
    table = pa.table({"image": files, "caption": [names[label] for label in labels[: len(files)]]})
    pq.write_table(table, tmp_path / "fashion.parquet")
    stats = build_here(source={"kind": "parquet", "path": f"{tmp_path}/fashion.parquet"}, output=f"{tmp_path}/out")
    assert (stats["in"], stats["out"]) == (1000, 1000) and verify(tmp_path / "out")
    stream = Stream(tmp_path / "out", seed=0)
    for number in range(0, 1000, 97):
        sample = stream.fetch(number)
        assert (decode_rgb(sample.image)[..., 1] == pixels[number]).all()
        assert sample.texts == (names[labels[number]],)
