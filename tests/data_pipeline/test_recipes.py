"""The data recipes of the repository, checked and built on the real data where it is there."""

from pathlib import Path

import pytest

from data_pipeline.build import run
from data_pipeline.config import BuildConfig, VocabConfig
from data_pipeline.settings import load_settings
from data_pipeline.shards.verify import verify
from data_pipeline.stream.reader import Stream

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
    assert len(Stream(tmp_path / "out", seed=0).fetch(0).captions) == captions
