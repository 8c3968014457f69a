"""What is done with a trained model of each family, from a run and from an export: evaluate, generate, export."""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import ConfigError, DataError
from data_pipeline.settings import check_settings
from data_pipeline.stream.reader import Stream
from pretrain import evaluate, generate
from pretrain.checkpoint import verbs
from pretrain.checkpoint.trained import load_trained
from pretrain.config import RunConfig
from pretrain.models import MODELS
from tests.pretrain.checkpoint.simulated import Part, ranks_of
from tests.pretrain.commands import Material, clip, electra, vqgan

STEPS = (4, 8)
FIGURE = {
    "clip": "retrieval_r1",
    "bert": "mlm_accuracy",
    "electra": "rtd_accuracy",
    "vqgan": "reconstruction_psnr",
    "gpt": "prompt_accuracy",
}


def bert(material: Material, run: Path) -> dict[str, Any]:
    """A run of a tiny BERT."""
    sizes = {"vocab_size": 200, "context": 24, "layers": 1, "width": 32, "heads": 2, "embedding_width": 32}
    return electra(material, run) | {"model": {"kind": "bert", **sizes}, "objective": {"kind": "mlm"}}


def gpt(material: Material, run: Path) -> dict[str, Any]:
    """A run of a tiny text-to-image GPT, which draws with the exported VQGAN beside it."""
    sizes = {"text_vocab": 200, "image_vocab": 32, "text_tokens": 8, "image_tokens": 64}
    tree = clip(material, run) | {"model": {"kind": "gpt", "layers": 1, "width": 32, "heads": 2, **sizes}}
    tree["data"] = tree["data"] | {"tokenizer": str(run.parent / "vqgan-export"), "evaluation": str(material.dataset)}
    return tree | {"objective": {"kind": "autoregressive"}}


RUNS: dict[str, Callable[[Material, Path], dict[str, Any]]] = {
    "clip": clip,
    "bert": bert,
    "electra": electra,
    "vqgan": vqgan,
    "gpt": gpt,
}


@dataclasses.dataclass(frozen=True)
class Place:
    """NAME is the run of a family with checkpoints of STEPS, NAME-export what was exported of its newest."""

    folder: Path

    def run(self, kind: str) -> Path:
        return self.folder / kind

    def export(self, kind: str) -> Path:
        return self.folder / f"{kind}-export"


@pytest.fixture(scope="module")
def place(material: Material, tmp_path_factory: pytest.TempPathFactory) -> Place:
    place = Place(tmp_path_factory.mktemp("trained"))
    for kind, describe in RUNS.items():
        run = place.run(kind)
        config = check_settings(RunConfig, describe(material, run), kind)
        run.mkdir()
        (run / "config.json").write_text(config.model_dump_json())
        for step in STEPS:
            (rank,) = ranks_of(run / "checkpoints", 1)
            rank.save(Part(MODELS[kind](config.model), 0, 1), step, {"step": step})  # type: ignore[arg-type]
            rank.finish()
        verbs.export(run, place.export(kind))
    verbs.name(place.run("clip"), "early", STEPS[0])
    return place


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"CANDIDATES": 8, "PROMPTS": 4, "SAMPLES": 32, "BATCH": 16}.items():
        monkeypatch.setattr(evaluate, name, value)


def figures(told: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in told.items() if isinstance(value, float) or name == "step"}


# ------------------------------------------------------------------------------------- exported folders


@pytest.mark.parametrize("kind", RUNS)
def test_an_exported_model_is_evaluated_as_its_run_is(kind: str, place: Place) -> None:
    of_run, of_export = evaluate.main(place.run(kind)), evaluate.main(place.export(kind))
    assert figures(of_run) == figures(of_export) and FIGURE[kind] in of_run
    assert json.loads((place.export(kind) / "evaluation.json").read_text()) == of_export


@pytest.mark.parametrize("kind", RUNS)
def test_an_exported_model_is_exported_again_byte_for_byte(kind: str, place: Place, tmp_path: Path) -> None:
    again = verbs.export(place.export(kind), tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (again / name).read_bytes() == (place.export(kind) / name).read_bytes()


@pytest.mark.parametrize("form", ["transformers-clip", "openai-clip"])
def test_an_exported_model_is_exported_to_a_public_layout(form: str, place: Place, tmp_path: Path) -> None:
    of_run = verbs.export(place.run("clip"), tmp_path / "run", form=form)
    of_export = verbs.export(place.export("clip"), tmp_path / "export", form=form)
    assert (of_run / "model.safetensors").read_bytes() == (of_export / "model.safetensors").read_bytes()


def test_an_exported_gpt_draws_what_its_run_draws(place: Place, tmp_path: Path) -> None:
    of_run = generate.main(str(place.run("gpt")), "a red circle", 2, str(tmp_path / "run"))
    of_export = generate.main(str(place.export("gpt")), "a red circle", 2, str(tmp_path / "export"))
    assert [path.name for path in of_run] == [path.name for path in of_export]
    assert (tmp_path / "run" / of_run[1].name).stat().st_size > 0


def test_an_exported_clip_picks_images(place: Place) -> None:
    told = [evaluate.main(place.run("gpt"), place_of("clip"), 2) for place_of in (place.run, place.export)]
    assert figures(told[0]) == figures(told[1]) and told[1]["reranked_by"] == str(place.export("clip"))


@pytest.mark.parametrize("kind", RUNS)
def test_an_export_that_says_its_model_alone_takes_the_rest_as_overrides(
    kind: str, place: Place, material: Material, tmp_path: Path
) -> None:
    """Exports of before, and models made by `export_model`."""
    bare = tmp_path / "bare"
    shutil.copytree(place.export(kind), bare)
    tree = json.loads((bare / "config.json").read_text())
    (bare / "config.json").write_text(json.dumps({"model": tree["model"]}))
    (bare / "evaluation.json").unlink(missing_ok=True)
    text = [] if kind == "vqgan" else [f"data.vocabulary={material.vocabulary}"]
    images = [f"data.tokenizer={place.export('vqgan')}"] if kind == "gpt" else []
    with pytest.raises(ConfigError, match=r"data.evaluation=DATASET|data.vocabulary is missing|data.tokenizer is miss"):
        evaluate.main(bare)
    told = evaluate.main(bare, overrides=[*text, *images, f"data.evaluation={material.dataset}"])
    assert FIGURE[kind] in told and "step" not in told
    verbs.export(bare, tmp_path / "again")
    assert load_trained(tmp_path / "again", overrides=[*text, *images]).step is None


@pytest.mark.parametrize("verb", [verbs.list_, verbs.verify, verbs.gc, lambda run: verbs.name(run, "best")])
def test_an_exported_model_has_no_checkpoints_and_is_told_so(verb: Callable[[Path], Any], place: Place) -> None:
    with pytest.raises(ConfigError, match="is an exported model and has no checkpoints"):
        verb(place.export("clip"))
    with pytest.raises(ConfigError, match="is an exported model"):
        verbs.export(place.export("clip"), place.folder / "universal", form="deepspeed")


# ---------------------------------------------------------------------------- which checkpoint, which data


@pytest.mark.parametrize("kind", RUNS)
def test_the_step_chooses_the_checkpoint_and_is_noted(kind: str, place: Place, tmp_path: Path) -> None:
    told = {step: evaluate.main(place.run(kind), step=step) for step in (*STEPS, None)}
    assert [told[step]["step"] for step in told] == [*STEPS, STEPS[-1]]
    assert figures(told[STEPS[-1]]) == figures(told[None])
    assert json.loads((place.run(kind) / "evaluation.json").read_text())["step"] == STEPS[-1]
    exported = verbs.export(place.run(kind), tmp_path / "early", STEPS[0])
    assert figures(evaluate.main(exported)) == figures(told[STEPS[0]])


def test_a_name_chooses_the_checkpoint(place: Place, tmp_path: Path) -> None:
    assert evaluate.main(place.run("clip"), label="early")["step"] == STEPS[0]
    exported = verbs.export(place.run("clip"), tmp_path / "early", label="early")
    assert evaluate.main(exported)["step"] == STEPS[0]
    with pytest.raises(ConfigError, match="no checkpoint is named 'late'; there are early"):
        evaluate.main(place.run("clip"), label="late")
    with pytest.raises(DataError, match="no whole checkpoint of step 8 named 'early'"):
        evaluate.main(place.run("clip"), step=8, label="early")
    with pytest.raises(ConfigError, match="leave --step and --name out"):
        evaluate.main(place.export("clip"), step=4)


def test_drawn_images_are_of_the_chosen_step(place: Place, tmp_path: Path) -> None:
    drawn = [generate.main(str(place.run("gpt")), "a", 1, str(tmp_path), step=step) for step in (*STEPS, None)]
    assert drawn[0] != drawn[1] and drawn[1] == drawn[2] and len(list(tmp_path.iterdir())) == 4


def test_figures_say_which_data_they_are_of(
    place: Place, material: Material, build_scenes: Any, tmp_path: Path
) -> None:
    told = evaluate.main(place.run("clip"))
    assert (told["data"], told["held_out"]) == (str(material.dataset), False)
    other = build_scenes(tmp_path / "other", 60, 7)
    fingerprint = Stream(other, 0).fingerprint
    told = evaluate.main(place.run("clip"), overrides=[f"data.evaluation={other}"])
    assert (told["data"], told["data_fingerprint"], told["held_out"]) == (str(other), fingerprint[:12], True)
    assert json.loads((place.run("clip") / "evaluation.json").read_text())["data"] == str(other)


@pytest.mark.parametrize("kind", ["clip", "gpt"])
def test_data_that_moved_are_named_anew_from_another_folder(
    kind: str, place: Place, material: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run was described by paths relative to where it was started."""
    run = tmp_path / "moved"
    shutil.copytree(place.run(kind), run)
    config = json.loads((run / "config.json").read_text())
    for name in ("dataset", "evaluation", "vocabulary", "tokenizer"):
        config["data"][name] = config["data"][name] and f"gone/{name}"
    config["train"]["checkpoints"] = "gone/checkpoints"
    (run / "config.json").write_text(json.dumps(config))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError):
        evaluate.main(run)
    told = [f"train.checkpoints={run / 'checkpoints'}", f"data.vocabulary={material.vocabulary}"]
    told += [f"data.evaluation={material.dataset}", f"data.tokenizer={place.export('vqgan')}"]
    assert figures(evaluate.main(run, overrides=told)) == figures(evaluate.main(place.run(kind)))
    assert figures(evaluate.main(verbs.export(run, tmp_path / "out", overrides=told))) != {}
    assert os.listdir(tmp_path) and not (tmp_path / "gone").exists()


@pytest.mark.parametrize("override", ["model.heads=4", "model={}", "objective.kind=mlm", "data.nothing=1", "seed"])
def test_overrides_that_do_not_belong_are_refused(override: str, place: Place, tmp_path: Path) -> None:
    for source in (place.run("clip"), place.export("clip")):
        with pytest.raises(ConfigError):
            evaluate.main(source, overrides=[override])
        with pytest.raises(ConfigError):
            verbs.export(source, tmp_path / "out", overrides=[override])
    assert not (tmp_path / "out").exists()
