"""Small data, made once."""

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipeline.config import BuildConfig
from data_pipeline.ingest import run
from data_pipeline.settings import check_settings
from data_pipeline.shards.codes import encode_dataset, encode_shard
from data_pipeline.text.config import VocabConfig
from data_pipeline.text.training import train_vocabulary
from tests.families import FAMILIES, Material


@pytest.fixture(scope="session")
def build_scenes() -> Callable[[Path, int, int], Path]:
    """build_scenes(output, count, seed): shards made in this process, without Ray's seconds."""

    def build(output: Path, count: int, seed: int) -> Path:
        tree = {"source": {"kind": "scenes", "count": count, "seed": seed}, "output": str(output), "shard_size": 50}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(run, "ray_session", lambda *_: contextlib.nullcontext())
            patch.setattr(run, "_submitter", lambda plan, task, linked: lambda shard: task(plan, shard))
            patch.setattr(run, "run_tasks", lambda submit, items, *_: ((item, submit(item)) for item in items))
            run.build(check_settings(BuildConfig, tree, "test"), progress=False)
        return output

    return build


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory, build_scenes: Callable[[Path, int, int], Path]) -> Material:
    """200 scenes in shards of 50, and a vocabulary of 200 pieces."""
    folder = tmp_path_factory.mktemp("material")
    dataset = build_scenes(folder / "scenes", 200, 0)
    vocabulary = VocabConfig(
        dataset=str(dataset), output=str(folder / "vocab"), size=200, kind="bpe", character_coverage=1.0
    )
    return Material(dataset, Path(train_vocabulary(vocabulary)))


@pytest.fixture(scope="session")
def complete(material: Material, tmp_path_factory: pytest.TempPathFactory) -> Material:
    """The same scenes with codes of an image tokenizer that was not trained."""
    from pretrain.inputs.image_tokenizer import load_tokenizer
    from pretrain.interchange.folder import export_model
    from tests.families import task_of

    folder = tmp_path_factory.mktemp("complete")
    config = FAMILIES["vqgan"].config()
    images = export_model(folder / "images", config.model, task_of(config).model.state_dict())
    dataset = folder / "scenes"
    shutil.copytree(material.dataset, dataset)
    tokenizer = load_tokenizer(images)
    for shard in range(len(list(dataset.glob("*.tar")))):
        encode_shard(str(dataset), shard, tokenizer)
    encode_dataset(dataset, lambda _: tokenizer, images, progress=False)
    return Material(dataset, material.vocabulary, images)
