"""Another vocabulary, image tokenizer or dataset of the same shape is refused by name, wherever a model is used."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.errors import ConfigError
from data_pipeline.settings import check_settings
from data_pipeline.text.config import VocabConfig
from data_pipeline.text.kinds import open_tokenizer
from data_pipeline.text.training import train_vocabulary
from pretrain import evaluate, generate
from pretrain.checkpoint import verbs
from pretrain.checkpoint.fingerprints import of_datasets, of_files, of_initial, recorded, warn_of_others
from pretrain.config import RunConfig
from pretrain.inputs.source import open_stream
from pretrain.interchange.folder import export_model, load_model
from pretrain.models import MODELS
from pretrain.tracking import Writer
from tests.families import FAMILIES
from tests.pretrain.checkpoint.simulated import model_of, ranks_of, save, write
from tests.pretrain.commands import Material, clip, electra, vqgan


@pytest.fixture(scope="module")
def other_vocabulary(material: Material, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the same size, trained on fewer captions."""
    output = tmp_path_factory.mktemp("other")
    config = VocabConfig(
        dataset=str(material.dataset), output=str(output), size=200, kind="bpe", character_coverage=1.0, max_captions=90
    )
    path = train_vocabulary(config)
    assert open_tokenizer(path).size == open_tokenizer(material.vocabulary).size
    return path


@pytest.fixture
def own(material: Material, tmp_path: Path) -> Material:
    """Files of this test's own, to be replaced in place."""
    shutil.copytree(material.dataset, tmp_path / "scenes")
    shutil.copy(material.vocabulary, tmp_path / "vocab.model")
    return Material(tmp_path / "scenes", tmp_path / "vocab.model")


def finished(tree: dict[str, Any]) -> Path:
    """A run folder with one checkpoint, as training leaves it."""
    config = check_settings(RunConfig, tree, "test")
    run = Path(config.run)
    torch.manual_seed(0)
    save(ranks_of(run / "checkpoints", 1), 4, MODELS[config.model.kind](config.model))
    known = of_files(config.data) | of_datasets(config.data, open_stream(config.data, config.seed))
    Writer(config, 0, 4, 1, known).close("")
    return run


def tokenizer(folder: Path, seed: int = 0) -> Path:
    config = check_settings(RunConfig, vqgan(Material(Path("d"), Path("v")), folder), "test").model
    torch.manual_seed(seed)
    shutil.rmtree(folder, ignore_errors=True)
    return export_model(folder, config, MODELS["vqgan"](config).state_dict())


def gpt(own: Material, run: Path, images: Path) -> dict[str, Any]:
    return FAMILIES["gpt"].run(dataclasses.replace(own, images=images), run)


# ------------------------------------------------------------------------------------------------------ uses


@pytest.mark.slow
@pytest.mark.parametrize("family", [electra, clip])
def test_evaluation_refuses_a_vocabulary_that_was_replaced_in_place(
    family: Callable[..., dict[str, Any]], own: Material, other_vocabulary: Path, tmp_path: Path
) -> None:
    run = finished(family(own, tmp_path / "run"))
    assert evaluate.main(run)
    shutil.copy(other_vocabulary, own.vocabulary)
    before = (run / "evaluation.json").read_bytes()
    with pytest.raises(ConfigError, match=f"was trained with another data.text_tokenizer; (.|\n)*{own.vocabulary}"):
        evaluate.main(run)
    assert (run / "evaluation.json").read_bytes() == before


def test_evaluation_refuses_training_data_that_were_replaced_in_place_and_takes_any_held_out_ones(
    own: Material, build_scenes: Callable[[Path, int, int], Path], tmp_path: Path
) -> None:
    tree = electra(own, tmp_path / "run")
    run = finished(tree)
    shutil.rmtree(own.dataset)
    build_scenes(own.dataset, 200, 7)
    with pytest.raises(ConfigError, match="was trained with another data.dataset"):
        evaluate.main(run)
    named = json.loads((run / "config.json").read_text())
    named["data"]["evaluation"] = str(own.dataset)
    (run / "config.json").write_text(json.dumps(named))
    assert evaluate.main(run)


def test_a_mixture_is_known_by_each_of_its_datasets(
    own: Material, build_scenes: Callable[[Path, int, int], Path], tmp_path: Path
) -> None:
    second = build_scenes(tmp_path / "second", 100, 3)
    tree = electra(own, tmp_path / "run")
    tree["data"] = {
        "datasets": [{"path": str(own.dataset)}, {"path": str(second)}], "text_tokenizer": str(own.vocabulary)
    }  # fmt: skip
    run = finished(tree)
    shutil.rmtree(second)
    build_scenes(second, 100, 4)
    with pytest.raises(ConfigError, match=r"trained with another data.datasets.1.path; (.|\n)*second has fingerprint"):
        evaluate.main(run)


@pytest.mark.parametrize("what", ["data.text_tokenizer", "data.image_tokenizer"])
def test_images_are_neither_drawn_nor_evaluated_with_another_tokenizer_or_vocabulary(
    what: str, own: Material, other_vocabulary: Path, tmp_path: Path
) -> None:
    run = finished(gpt(own, tmp_path / "run", tokenizer(tmp_path / "images")))
    assert len(generate.main(str(run), "a red circle", 1)) == 2
    if what == "data.image_tokenizer":
        tokenizer(tmp_path / "images", seed=1)
    else:
        shutil.copy(other_vocabulary, own.vocabulary)
    drawn = sorted(run.rglob("*.png"))
    for use in (lambda: generate.main(str(run), "a blue ring", 1), lambda: evaluate.main(run)):
        with pytest.raises(ConfigError, match=f"was trained with another {what}; "):
            use()
    assert sorted(run.rglob("*.png")) == drawn


def test_a_ranker_refuses_a_vocabulary_that_it_was_not_trained_with(
    own: Material, other_vocabulary: Path, tmp_path: Path
) -> None:
    shutil.copy(own.vocabulary, tmp_path / "clip.model")
    ranker = finished(clip(Material(own.dataset, tmp_path / "clip.model"), tmp_path / "clip"))
    run = finished(gpt(own, tmp_path / "run", tokenizer(tmp_path / "images")))
    shutil.copy(other_vocabulary, tmp_path / "clip.model")
    with pytest.raises(ConfigError, match=f"{ranker} was trained with another data.text_tokenizer"):
        evaluate.main(run, ranker)


@pytest.mark.parametrize("form", ["tessera", "deepspeed", "transformers-electra"])
def test_an_export_is_refused_once_the_vocabulary_was_replaced(
    form: str, own: Material, other_vocabulary: Path, tmp_path: Path
) -> None:
    run = finished(electra(own, tmp_path / "run"))
    shutil.copy(other_vocabulary, own.vocabulary)
    with pytest.raises(ConfigError, match="was trained with another data.text_tokenizer"):
        verbs.export(run, tmp_path / "out", form=form)
    assert not (tmp_path / "out").exists()


def test_an_exported_folder_knows_what_it_was_trained_with_even_where_that_is_gone(
    own: Material, tmp_path: Path
) -> None:
    run = finished(electra(own, tmp_path / "run"))
    own.vocabulary.unlink()
    exported = verbs.export(run, tmp_path / "out")
    assert recorded(exported) == recorded(run) and set(recorded(run) or {}) == {"data.text_tokenizer", "data.dataset"}
    load_model(exported)


def test_an_exported_model_is_used_with_no_other_vocabulary_either(
    own: Material, other_vocabulary: Path, tmp_path: Path
) -> None:
    """Replaced in place, or named by an override; the same one at another place is taken."""
    images = tokenizer(tmp_path / "images")
    exported = verbs.export(finished(gpt(own, tmp_path / "run", images)), tmp_path / "gpt")
    ranker = verbs.export(finished(clip(own, tmp_path / "clip")), tmp_path / "ranker")
    moved = shutil.copy(own.vocabulary, tmp_path / "moved.model")
    shutil.copy(other_vocabulary, own.vocabulary)
    assert generate.main(str(exported), "a red circle", 1, overrides=[f"data.text_tokenizer={moved}"])
    uses: list[Callable[[], Any]] = [
        lambda: generate.main(str(exported), "a red circle", 1),
        lambda: generate.main(str(exported), "a red circle", 1, overrides=[f"data.text_tokenizer={other_vocabulary}"]),
        lambda: evaluate.main(exported),
        lambda: evaluate.main(exported, ranker, overrides=[f"data.text_tokenizer={moved}"]),
        lambda: verbs.export(exported, tmp_path / "again"),
    ]
    for use in uses:
        with pytest.raises(ConfigError, match="was trained with another data.text_tokenizer"):
            use()


# ------------------------------------------------------------------------------------- what cannot be checked


def test_a_run_of_before_is_used_and_it_is_said_what_could_not_be_checked(
    own: Material, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = finished(electra(own, tmp_path / "run"))
    tree = json.loads((run / "config.json").read_text())
    del tree["fingerprints"]
    (run / "config.json").write_text(json.dumps(tree))
    assert evaluate.main(run)
    told = capsys.readouterr()
    assert (
        "has no fingerprints, as an older version wrote it: data.text_tokenizer" in told.err
        and "fingerprints" not in told.out
    )


def test_a_run_s_own_config_json_is_a_configuration(own: Material, tmp_path: Path) -> None:
    run = finished(electra(own, tmp_path / "run"))
    tree = json.loads((run / "config.json").read_text())
    assert check_settings(RunConfig, tree, "config.json") == check_settings(
        RunConfig, electra(own, tmp_path / "run"), "test"
    )


# ------------------------------------------------------------------------------------------- initial weights


def test_initial_weights_are_known_by_their_tensors(tmp_path: Path) -> None:
    config = check_settings(RunConfig, electra(Material(Path("d"), Path("v")), tmp_path), "test").model
    first, again, other = (
        export_model(tmp_path / name, config, model_of(seed).state_dict(), extra)
        for name, seed, extra in (
            ("a", 1, None),
            ("b", 1, {"fingerprints": {"data.text_tokenizer": "x"}}),
            ("c", 2, None),
        )
    )
    known = of_initial(first)
    assert known == of_initial(again) != of_initial(other)
    assert known is not None and of_initial(first, like=known) == known != of_initial(other, like=known)


@pytest.mark.slow
def test_initial_weights_of_a_run_are_those_of_the_step_that_was_taken(tmp_path: Path) -> None:
    write(tmp_path / "run", 4)
    known = of_initial(tmp_path / "run")
    assert known is not None and known.endswith("@step 4")
    write(tmp_path / "run", 8)
    assert of_initial(tmp_path / "run", like=known) == known
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000004.attempt-0")
    assert of_initial(tmp_path / "run", like=known) is None
    assert of_initial(tmp_path / "nowhere", like=known) is None
    shutil.rmtree(tmp_path / "run")
    save(ranks_of(tmp_path / "run" / "checkpoints", 2), 4, model_of(5))
    assert of_initial(tmp_path / "run", like=known) not in (None, known)


def test_weights_of_another_vocabulary_are_taken_as_a_start_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = check_settings(RunConfig, electra(Material(Path("d"), Path("v")), tmp_path), "test").model
    source = export_model(
        tmp_path / "a", config, model_of(1).state_dict(), {"fingerprints": {"data.text_tokenizer": "a" * 64}}
    )
    for now, warns in (("a" * 64, False), ("b" * 64, True)):
        warn_of_others(source, {"data.text_tokenizer": now})
        assert ("was trained with another data.text_tokenizer (aaaaaaaaaaaa)" in capsys.readouterr().out) == warns
    warn_of_others(source, {})
    assert capsys.readouterr().out == ""
