"""Evaluation and previews read samples as training does: a sample that cannot be used is replaced and listed."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline.errors import DataError
from data_pipeline.shards.verify import index
from data_pipeline.stream.order import order
from pretrain import evaluate
from pretrain.config import RunConfig
from pretrain.evaluations import prompts, retrieval
from pretrain.models import MODELS
from tests.families import PAIRS, Family, Material
from tests.pretrain.commands import clip, recipe, tessera, vqgan

DAMAGED: dict[int, Callable[[str, bytes], bytes]] = {
    1: lambda ending, data: b"\x89PNG, but no further" if ending == "png" else data,
    3: lambda ending, data: json.dumps({"captions": []}).encode() if ending == "json" else b"",
    6: lambda ending, data: json.dumps({"captions": ["", "  "]}).encode() if ending == "json" else b" ",
    9: lambda ending, data: b"{not json" if ending == "json" else data,
    11: lambda ending, data: b"" if ending == "png" else data,
}
"""Samples by number, and what becomes of their files: images stay whole where captions are missing."""


def spoil(dataset: Path, folder: Path, damaged: dict[int, Callable[[str, bytes], bytes]] = DAMAGED) -> Path:
    """A copy of a dataset as a tar made elsewhere, some of its samples damaged."""
    folder.mkdir()
    numbers: dict[str, int] = {}
    with tarfile.open(folder / "0.tar", "w") as copy:
        for path in sorted(dataset.glob("*.tar")):
            with tarfile.open(path) as tar:
                for member in tar:
                    key, _, ending = member.name.partition(".")
                    number = numbers.setdefault(key, len(numbers))
                    data = tar.extractfile(member).read()  # type: ignore[union-attr]
                    if number in damaged and not (ending == "png" and number in (3, 6)):
                        data = damaged[number](ending, data)
                    info = tarfile.TarInfo(member.name)
                    info.size = len(data)
                    copy.addfile(info, io.BytesIO(data))
    index([str(folder)], 1)
    return folder


@pytest.fixture(scope="module")
def spoilt(material: Material, tmp_path_factory: pytest.TempPathFactory) -> Material:
    return Material(spoil(material.dataset, tmp_path_factory.mktemp("spoilt") / "data"), material.vocabulary)


def evaluated(tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """`tessera evaluate` of an untrained model of this run."""
    config = RunConfig.model_validate(tree)
    Path(config.run).mkdir(exist_ok=True)
    torch.manual_seed(0)
    model = MODELS[config.model.kind](config.model).eval()
    monkeypatch.setattr(evaluate, "load_trained", lambda *_: (model, config, 0))
    monkeypatch.setattr(retrieval, "CANDIDATES", 8)
    monkeypatch.setattr("pretrain.evaluations.evaluated.BATCH", 40)
    monkeypatch.setattr(prompts, "load_tokenizer", lambda *_: None)
    images = np.zeros((200, 8, 8, 3), np.uint8)
    monkeypatch.setattr(prompts, "generate_images", lambda *parts, **_: images[: len(parts[3])])
    return evaluate.main(config.run)


def ledger(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "bad_samples/evaluation.jsonl").read_text().splitlines()]


def unusable(family: Family) -> set[int]:
    """The samples of DAMAGED that lack what the family reads."""
    captions = {3, 6, 9} if family.reads.text else set()
    return captions | {1, 9, 11} if family.reads.pixels else captions


@pytest.mark.slow
@pytest.mark.parametrize("name", PAIRS)
def test_no_sample_ends_an_evaluation_and_each_replaced_one_is_listed(
    name: str, spoilt: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A retrieval reads only the first positions, two of which are damaged, and draws among the rest."""
    bad, ranks = unusable(PAIRS[name]), PAIRS[name].figure == "retrieval_r1"
    tree = PAIRS[name].run(spoilt, tmp_path / "run") | {"seed": seed_with_first({1, 6}) if ranks else 0}
    figures = evaluated(tree, monkeypatch)
    assert figures and all(np.isfinite(value) for value in figures.values() if isinstance(value, float))
    rows = ledger(tmp_path / "run")
    listed = {row["sample"] for row in rows}
    assert ({1, 6} <= listed <= bad if ranks else listed == bad) and len(rows) == len(listed)
    assert not {row["replacement"] for row in rows} & listed and all(row["reason"] for row in rows)
    assert "bad_samples/evaluation.jsonl" in capsys.readouterr().err


def test_an_evaluation_of_sound_data_lists_nothing(
    material: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluated(clip(material, tmp_path / "run"), monkeypatch)
    assert not (tmp_path / "run/bad_samples").exists() and "cannot be used" not in capsys.readouterr().err


def test_data_without_a_usable_sample_are_refused_by_name(
    material: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    none = spoil(material.dataset, tmp_path / "none", dict.fromkeys(range(200), DAMAGED[1]))
    with pytest.raises(DataError, match="nor can 16 replacements.*tessera data verify"):
        evaluated(vqgan(Material(none, material.vocabulary), tmp_path / "run"), monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, family in PAIRS.items() if family.reads.pixels])
def test_an_evaluation_shows_the_centre_square_whatever_training_draws(
    name: str, material: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = PAIRS[name].run(material, tmp_path / "run")
    plain = evaluated(tree, monkeypatch)
    for drawn in ({"crop_ratio": [0.5, 2.0]}, {"crop_scale": [0.2, 0.5]}, {"flip": True}):
        assert evaluated(tree | {"data": tree["data"] | drawn}, monkeypatch) == plain


@pytest.mark.slow
@pytest.mark.real
def test_a_preview_replaces_what_training_replaces(spoilt: Material, tmp_path: Path) -> None:
    tree = vqgan(spoilt, tmp_path / "run")
    tree["train"] |= {"steps": 4, "sample_every_steps": 2}
    tree["seed"] = seed_with_first({1})
    done = tessera("train", recipe(tree, tmp_path / "run.yaml"))
    assert done.returncode == 0, done.stdout[-3000:]
    assert (tmp_path / "run/samples/reconstructions-step-00000004.png").is_file()
    lines = (tmp_path / "run/bad_samples/preview.jsonl").read_text().splitlines()
    trained = (tmp_path / "run/bad_samples/rank-00000.jsonl").read_text().splitlines()
    assert lines and len(set(lines)) == len(lines) and set(lines) <= set(trained)


def seed_with_first(samples: set[int]) -> int:
    """A seed whose first 16 positions hold these samples of 200."""
    return next(seed for seed in range(10_000) if samples <= set(order(np.arange(16), 200, seed)[1].tolist()))
