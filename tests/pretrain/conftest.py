"""Small data, made once."""

import contextlib
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipeline.config import BuildConfig
from data_pipeline.ingest import run
from data_pipeline.settings import check_settings
from data_pipeline.text.config import VocabConfig
from data_pipeline.text.training import train_vocabulary
from tests.pretrain.commands import Material


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
