"""What is done with a trained model of each family, from a run and from an export: evaluate, generate, export."""

import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import ConfigError, DataError
from data_pipeline.settings import check_settings
from data_pipeline.stream.reader import Stream
from launchers import cli, commands_run
from pretrain import evaluate, generate
from pretrain.checkpoint import verbs
from pretrain.checkpoint.trained import load_trained
from pretrain.config import RunConfig
from pretrain.evaluations import evaluated, prompts, retrieval
from pretrain.models import MODELS
from tests.disks import fill_up, make_read_only, mounted
from tests.families import PAIRS, Material, data_of
from tests.pretrain.checkpoint.simulated import Part, optimizer_of, ranks_of
from tests.pretrain.commands import clip, recipe

STEPS = (4, 8)


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
    material = dataclasses.replace(material, images=place.export("vqgan"))
    for name, family in PAIRS.items():
        run = place.run(name)
        config = check_settings(RunConfig, family.run(material, run), name)
        run.mkdir()
        (run / "config.json").write_text(config.model_dump_json())
        for step in STEPS:
            (rank,) = ranks_of(run / "checkpoints", 1)
            model = MODELS[config.model.kind](config.model)
            state = {"step": step, "optimizer": optimizer_of(model, step)}
            rank.save(Part(model, 0, 1), step, state)  # type: ignore[arg-type]
            rank.finish()
        verbs.export(run, place.export(name))
    verbs.name(place.run("clip"), "early", STEPS[0])
    return place


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "CANDIDATES", 8)
    monkeypatch.setattr(prompts, "PROMPTS", 4)
    monkeypatch.setattr(evaluated, "SAMPLES", 200)
    monkeypatch.setattr(evaluated, "BATCH", 16)


def figures(told: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in told.items() if isinstance(value, float) or name == "step"}


# ------------------------------------------------------------------------------------- exported folders


@pytest.mark.slow
@pytest.mark.parametrize("kind", PAIRS)
def test_an_exported_model_is_evaluated_as_its_run_is(kind: str, place: Place) -> None:
    of_run, of_export = evaluate.main(place.run(kind)), evaluate.main(place.export(kind))
    assert figures(of_run) == figures(of_export) and PAIRS[kind].figure in of_run
    assert json.loads((place.export(kind) / "evaluation.json").read_text()) == of_export


@pytest.mark.parametrize("kind", PAIRS)
def test_an_exported_model_is_exported_again_byte_for_byte(kind: str, place: Place, tmp_path: Path) -> None:
    again = verbs.export(place.export(kind), tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (again / name).read_bytes() == (place.export(kind) / name).read_bytes()


def test_an_exported_model_is_exported_to_a_public_layout(place: Place, tmp_path: Path) -> None:
    of_run = verbs.export(place.run("clip"), tmp_path / "run", form="transformers-clip")
    of_export = verbs.export(place.export("clip"), tmp_path / "export", form="transformers-clip")
    for name in ("model.safetensors", "config.json", "tessera.json"):
        assert (of_run / name).read_bytes() == (of_export / name).read_bytes()


def test_an_exported_gpt_draws_what_its_run_draws(place: Place, tmp_path: Path) -> None:
    of_run = generate.main(str(place.run("gpt")), "a red circle", 2, str(tmp_path / "run"))
    of_export = generate.main(str(place.export("gpt")), "a red circle", 2, str(tmp_path / "export"))
    assert [path.name for path in of_run] == [path.name for path in of_export]
    assert (tmp_path / "run" / of_run[1].name).stat().st_size > 0


def test_an_exported_clip_picks_images(place: Place) -> None:
    told = [evaluate.main(place.run("gpt"), place_of("clip"), 2) for place_of in (place.run, place.export)]
    assert figures(told[0]) == figures(told[1]) and told[1]["reranked_by"] == str(place.export("clip"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", PAIRS)
def test_an_export_that_says_its_model_alone_takes_the_rest_as_overrides(
    kind: str, place: Place, material: Material, tmp_path: Path
) -> None:
    """Exports of before, and models made by `export_model`."""
    bare = tmp_path / "bare"
    shutil.copytree(place.export(kind), bare)
    tree = json.loads((bare / "config.json").read_text())
    (bare / "config.json").write_text(json.dumps({"model": tree["model"]}))
    (bare / "evaluation.json").unlink(missing_ok=True)
    reads = PAIRS[kind].reads
    text = [f"data.text_tokenizer={material.vocabulary}"] if reads.text else []
    images = [f"data.image_tokenizer={place.export('vqgan')}"] if reads.codes else []
    with pytest.raises(ConfigError, match=r"data.evaluation=DATASET|data.(text|image)_tokenizer is missing"):
        evaluate.main(bare)
    told = evaluate.main(bare, overrides=[*text, *images, f"data.evaluation={data_of(reads, material)['dataset']}"])
    assert PAIRS[kind].figure in told and "step" not in told
    verbs.export(bare, tmp_path / "again")
    assert load_trained(tmp_path / "again", overrides=[*text, *images]).step is None


@pytest.mark.parametrize("verb", [verbs.list_, verbs.verify, verbs.gc, lambda run: verbs.name(run, "best")])
def test_an_exported_model_has_no_checkpoints_and_is_told_so(verb: Callable[[Path], Any], place: Place) -> None:
    with pytest.raises(ConfigError, match="is an exported model and has no checkpoints"):
        verb(place.export("clip"))
    with pytest.raises(ConfigError, match="is an exported model"):
        verbs.export(place.export("clip"), place.folder / "universal", form="deepspeed")


# ---------------------------------------------------------------------------- which checkpoint, which data


@pytest.mark.slow
@pytest.mark.parametrize("kind", PAIRS)
def test_the_step_chooses_the_checkpoint_and_is_noted(kind: str, place: Place, tmp_path: Path) -> None:
    told = {step: evaluate.main(place.run(kind), step=step) for step in (*STEPS, None)}
    assert [told[step]["step"] for step in told] == [*STEPS, STEPS[-1]]
    assert figures(told[STEPS[-1]]) == figures(told[None])
    assert json.loads((place.run(kind) / "evaluation.json").read_text())["step"] == STEPS[-1]
    exported = verbs.export(place.run(kind), tmp_path / "early", STEPS[0])
    assert figures(evaluate.main(exported)) == figures(told[STEPS[0]])


@pytest.mark.slow
def test_a_name_chooses_the_checkpoint(place: Place, tmp_path: Path) -> None:
    assert evaluate.main(place.run("clip"), label="early")["step"] == STEPS[0]
    exported = verbs.export(place.run("clip"), tmp_path / "early", label="early")
    assert evaluate.main(exported)["step"] == STEPS[0]
    with pytest.raises(ConfigError, match="no checkpoint is named 'late'; there are early"):
        evaluate.main(place.run("clip"), label="late")
    with pytest.raises(DataError, match="no valid checkpoint of step 8 named 'early'"):
        evaluate.main(place.run("clip"), step=8, label="early")
    with pytest.raises(ConfigError, match="leave --step and --name out"):
        evaluate.main(place.export("clip"), step=4)


def test_drawn_images_are_of_the_chosen_step(place: Place, tmp_path: Path) -> None:
    drawn = [generate.main(str(place.run("gpt")), "a", 1, str(tmp_path), step=step) for step in (*STEPS, None)]
    assert drawn[0] != drawn[1] and drawn[1] == drawn[2] and len(list(tmp_path.iterdir())) == 4


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["clip", "gpt"])
def test_data_that_moved_are_named_anew_from_another_folder(
    kind: str, place: Place, material: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run was described by paths relative to where it was started."""
    run = tmp_path / "moved"
    shutil.copytree(place.run(kind), run)
    config = json.loads((run / "config.json").read_text())
    for name in ("dataset", "evaluation", "text_tokenizer", "image_tokenizer"):
        config["data"][name] = config["data"][name] and f"gone/{name}"
    config["train"]["checkpoints"] = "gone/checkpoints"
    (run / "config.json").write_text(json.dumps(config))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError):
        evaluate.main(run)
    told = [f"train.checkpoints={run / 'checkpoints'}", f"data.text_tokenizer={material.vocabulary}"]
    told += [f"data.evaluation={material.dataset}", f"data.image_tokenizer={place.export('vqgan')}"]
    assert figures(evaluate.main(run, overrides=told)) == figures(evaluate.main(place.run(kind)))
    assert figures(evaluate.main(verbs.export(run, tmp_path / "out", overrides=told))) != {}
    assert os.listdir(tmp_path) and not (tmp_path / "gone").exists()


@pytest.mark.parametrize("override", ["model.heads=4", "model={}", "task.kind=mlm", "data.nothing=1", "seed"])
def test_overrides_that_do_not_belong_are_refused(override: str, place: Place, tmp_path: Path) -> None:
    for source in (place.run("clip"), place.export("clip")):
        with pytest.raises(ConfigError):
            evaluate.main(source, overrides=[override])
        with pytest.raises(ConfigError):
            verbs.export(source, tmp_path / "out", overrides=[override])
    assert not (tmp_path / "out").exists()


# ----------------------------------------------------------------------- what the command line says of a place


def tessera(*words: str | Path) -> int:
    """Run the command line in this process -> its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["tessera", *map(str, words)])
        patch.setattr(commands_run, "trains", False)
        before = dict(os.environ)
        try:
            return cli.run()
        finally:  # a command that starts a process group names itself rank 0 there
            os.environ.clear()
            os.environ.update(before)


@pytest.fixture(params=["full disk", "read-only disk", "file", "below a file", "no place"])
def destination(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A folder that cannot be written."""
    if "disk" in request.param:
        with mounted(tmp_path / "disk", 64) as disk:
            fill_up(disk, 0)
            if request.param == "read-only disk":
                make_read_only(disk)
            yield disk / "out"
    elif request.param == "no place":
        yield Path("/proc/tessera/out")
    else:
        (tmp_path / "file").write_text("mine")
        yield tmp_path / ("file" if request.param == "file" else "file/out")
        assert (tmp_path / "file").read_text() == "mine"


COMMANDS: dict[str, Callable[[Place, Material, Path, Path], list[str | Path]]] = {
    "export": lambda place, _, out, __: ["checkpoint", "export", place.run("clip"), out],
    "export to DeepSpeed": lambda place, _, out, __: [
        "checkpoint", "export", place.run("electra"), out, "--format", "deepspeed",
    ],
    "export to a layout": lambda place, _, out, __: [
        "checkpoint", "export", place.export("electra"), out, "--format", "transformers-electra",
    ],
    "generate": lambda place, _, out, __: ["generate", place.run("gpt"), "--prompt", "a ring", "--out", out],
    "launch": lambda place, material, out, tmp: [
        "launch", "local", recipe(clip(material, out), tmp / "recipe.yaml"), "--procs-per-node", "1",
    ],
    "train": lambda place, material, out, tmp: ["train", recipe(clip(material, out), tmp / "recipe.yaml")],
    "vocab": lambda place, material, out, tmp: [
        "vocab", "train", recipe({"dataset": str(material.dataset), "size": 200, "output": str(out)}, tmp / "v.yaml"),
    ],
    "report": lambda place, material, out, tmp: ["data", "report", material.dataset, "--output", out],
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_a_place_that_cannot_be_written_is_one_line_and_74(
    command: str, destination: Path, place: Place, material: Material, tmp_path: Path, capsys: Any
) -> None:
    words = COMMANDS[command](place, material, destination, tmp_path)
    assert tessera(*words) == 74
    err = capsys.readouterr().err
    assert "Traceback" not in err and [line for line in err.splitlines() if line.startswith("error: ")] != []


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["clip", "gpt"])
@pytest.mark.parametrize("export", [False, True], ids=["run", "export"])
@pytest.mark.parametrize("room", ["full", "read-only"])
def test_figures_are_printed_though_they_cannot_be_written(
    kind: str, export: bool, room: str, place: Place, tmp_path: Path, capsys: Any
) -> None:
    with mounted(tmp_path / "disk", 20_000) as disk:
        there = disk / "there"
        shutil.copytree(place.export(kind) if export else place.run(kind), there)
        (there / "evaluation.json").unlink(missing_ok=True)
        fill_up(disk, 0)
        if room == "read-only":
            make_read_only(disk)
        assert tessera("evaluate", there, "--json") == 74
        out, err = capsys.readouterr()
        assert json.loads(out)["step"] == STEPS[-1] and PAIRS[kind].figure in json.loads(out)
        assert err.splitlines()[-1].startswith(f"error: {there}") and "Traceback" not in err
        assert not (there / "evaluation.json").exists()


@pytest.mark.parametrize("form", ["tessera", "transformers-clip"])
@pytest.mark.parametrize("words", [["train"], ["launch", "local"], ["launch", "local", "--dry-run"]], ids=" ".join)
def test_training_into_an_exported_folder_is_refused(
    words: list[str], form: str, place: Place, material: Material, tmp_path: Path, capsys: Any
) -> None:
    there = verbs.export(place.run("clip"), tmp_path / "there", form=form)
    before = {path.name: path.read_bytes() for path in there.iterdir()}
    assert tessera(*words, recipe(clip(material, there), tmp_path / "recipe.yaml")) == 64
    assert f"run={there} is the folder of an exported model" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in there.iterdir()} == before


DAMAGED = {
    "empty": b"",
    "cut": b'{"model": {"ki',
    "no UTF-8": b"\xff\xfe\x00",
    "a list": b"[1, 2]",
    "a number": b"7",
    "deep": b"[" * 100_000,
    "zeros": bytes(500),
    "nothing in it": b"{}",
    "no model": b'{"train": {}}',
    "model of text": b'{"model": "clip", "train": {}}',
    "a setting too many": b'{"model": {"kind": "clip"}, "train": {"stepps": 1}}',
}


@pytest.mark.parametrize("damage", DAMAGED)
@pytest.mark.parametrize("export", [False, True], ids=["run", "export"])
def test_a_damaged_configuration_is_one_error_from_every_command(
    damage: str, export: bool, place: Place, tmp_path: Path, capsys: Any
) -> None:
    there = tmp_path / "there"
    shutil.copytree(place.export("gpt") if export else place.run("gpt"), there)
    (there / "config.json").write_bytes(DAMAGED[damage])
    for words in (
        ["evaluate", there],
        ["generate", there, "--prompt", "a"],
        ["checkpoint", "export", there, tmp_path / "out"],
        ["checkpoint", "list", there],
    ):
        assert tessera(*words) == (64 if damage == "a setting too many" else 74)
        err = capsys.readouterr().err
        assert "error: " in err and "Traceback" not in err and str(there) in err
    assert not (tmp_path / "out").exists()


def test_a_number_of_the_configuration_that_the_weights_contradict_is_an_error_of_the_data(
    place: Place, tmp_path: Path, capsys: Any
) -> None:
    for source in (place.run("clip"), place.export("clip")):
        there = tmp_path / source.name
        shutil.copytree(source, there)
        config = (there / "config.json").read_text().replace('"embed_dim":16', '"embed_dim":8')
        (there / "config.json").write_text(config.replace('"embed_dim": 16', '"embed_dim": 8'))
        assert tessera("evaluate", there) == 74
        assert "Traceback" not in (err := capsys.readouterr().err) and len(err) < 3000


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--seed", str(2**64)], "--seed"),
        (["--seed", "-1"], "--seed"),
        (["--temperature", "nan"], "--temperature"),
        (["--guidance", "inf"], "--guidance"),
        (["--prompt", os.fsdecode(b"caf\xe9")], "is not UTF-8"),
        (["--step", "5"], "no valid checkpoint of step 5"),
        (["--name", "none"], "no checkpoint is named 'none'"),
        (["model.width=8"], "the weights in"),
    ],
)
def test_a_request_to_draw_that_cannot_be_met_is_one_clear_error(
    words: list[str], said: str, place: Place, capsys: Any
) -> None:
    assert tessera("generate", place.run("gpt"), "--prompt", "a ring", *words) in (64, 74)
    err = capsys.readouterr().err
    assert said in err and "Traceback" not in err


@pytest.mark.parametrize("prompt", ["𠀀𪜀𫝀" * 30, "龘", "🎈", "a\nring"])
def test_signs_that_are_rare_are_drawn(prompt: str, place: Place, tmp_path: Path, capsys: Any) -> None:
    assert tessera("generate", place.run("gpt"), "--prompt", prompt, "-n", "1", "--out", tmp_path / "out") == 0
    assert len(list((tmp_path / "out").iterdir())) == 2
