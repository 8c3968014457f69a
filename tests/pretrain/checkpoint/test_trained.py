"""What a checkpoint becomes elsewhere: an exported model, a public layout, the start of another run."""

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from data_pipeline.errors import ConfigError, DataError
from data_pipeline.foreign import LAYOUT_KINDS, foreign_model
from data_pipeline.shards.manifest import open_dataset
from pretrain.checkpoint import verbs
from pretrain.checkpoint.fingerprints import recorded
from pretrain.checkpoint.trained import load_trained, root_of, start_from, weights_in
from pretrain.interchange.folder import load_model
from pretrain.interchange.layouts import import_state
from pretrain.models import MODELS
from tests.disks import fill_up, mounted
from tests.pretrain.checkpoint.simulated import config_of, flip_a_bit, folder_of, model_of, write


def same(left: nn.Module, right: nn.Module) -> bool:
    mine, theirs = left.state_dict(), right.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_an_exported_model_has_the_checkpoint_s_weights(tmp_path: Path) -> None:
    model = write(tmp_path / "run", 3)
    exported, _ = load_model(verbs.export(tmp_path / "run", tmp_path / "exported"))
    assert same(exported, model)


def test_the_checkpoint_of_a_step_is_exported_where_that_is_asked(tmp_path: Path) -> None:
    early = write(tmp_path / "run", 4)
    write(tmp_path / "run", 8)
    exported, _ = load_model(verbs.export(tmp_path / "run", tmp_path / "exported", step=4))
    assert same(exported, early)
    flip_a_bit(folder_of(tmp_path / "run", 0) / "r00000.safetensors")
    with pytest.raises(DataError, match="no valid checkpoint of step 4"):
        load_trained(tmp_path / "run", 4)


def test_a_public_layout_comes_back_to_the_same_weights(tmp_path: Path) -> None:
    model = write(tmp_path / "run", 3)
    folder = verbs.export(tmp_path / "run", tmp_path / "public", form="transformers-electra")
    files = {part: load_file(folder / part / "model.safetensors") for part in ("discriminator", "generator")}
    theirs = {f"{part}.{name}": tensor for part, file in files.items() for name, tensor in file.items()}
    ours = import_state("transformers-electra", config_of(tmp_path).model, theirs)
    assert all(torch.equal(ours[name], tensor) for name, tensor in model.state_dict().items())


def test_a_format_that_does_not_exist_is_refused_with_those_that_do(tmp_path: Path) -> None:
    write(tmp_path / "run", 3)
    with pytest.raises(ConfigError, match="onnx is not known; use tessera, .*transformers-electra"):
        verbs.export(tmp_path / "run", tmp_path / "out", form="onnx")


def test_a_layout_of_another_family_is_refused_with_those_of_this_one(tmp_path: Path) -> None:
    write(tmp_path / "run", 3)
    with pytest.raises(ConfigError, match="is for clip, and the model is of kind electra; use transformers-electra"):
        verbs.export(tmp_path / "run", tmp_path / "out", form="openai-clip")


FORMS = ["tessera", "deepspeed", "transformers-electra"]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("form", FORMS)
def test_an_export_onto_a_run_or_any_used_folder_is_refused_and_changes_nothing(form: str, tmp_path: Path) -> None:
    run, first, theirs = tmp_path / "run", tmp_path / "first", tmp_path / "theirs"
    write(run, 3)
    verbs.export(run, first)
    theirs.mkdir()
    (theirs / "notes.txt").write_text("mine")
    before = contents(tmp_path)
    for used in (run, first, theirs, run / "checkpoints"):
        with pytest.raises(ConfigError, match=f"{used} is not empty"):
            verbs.export(run, used, form=form)
    with pytest.raises(DataError, match="notes.txt is not a folder"):
        verbs.export(run, theirs / "notes.txt", form=form)
    assert contents(tmp_path) == before


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_a_pipeline_that_is_started_again_finds_its_export_and_no_other(form: str, tmp_path: Path) -> None:
    write(tmp_path / "run", 4)
    folder = verbs.export(tmp_path / "run", tmp_path / "out", form=form, again=True)
    (folder / "evaluation.json").write_text("added by another command")
    before = contents(tmp_path)
    assert verbs.export(tmp_path / "run", folder, form=form, again=True) == folder
    assert contents(tmp_path) == before
    write(tmp_path / "run", 8)
    with pytest.raises(ConfigError, match="is not empty"):
        verbs.export(tmp_path / "run", folder, form=form, again=True)
    assert contents(folder) == {name.removeprefix("out/"): data for name, data in before.items() if "out/" in name}
    verbs.export(tmp_path / "run", folder, step=4, form=form, again=True)


@pytest.mark.parametrize("form", FORMS)
def test_an_export_onto_a_full_disk_leaves_nothing_and_spares_the_one_before(form: str, tmp_path: Path) -> None:
    write(tmp_path / "run", 3)
    with mounted(tmp_path / "disk", 4000) as disk:
        verbs.export(tmp_path / "run", disk / "first")
        fill_up(disk, 40_000)
        before = contents(disk)
        with pytest.raises(DataError, match="free space"):
            verbs.export(tmp_path / "run", disk / "second", form=form)
        assert contents(disk) == before and not (disk / "second").exists()


@pytest.mark.parametrize("form", FORMS)
def test_exported_files_follow_the_umask(form: str, tmp_path: Path) -> None:
    write(tmp_path / "run", 3)
    before = os.umask(0o027)
    try:
        folder = verbs.export(tmp_path / "run", tmp_path / "out", form=form)
    finally:
        os.umask(before)
    for path in [folder, *folder.rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o750 if path.is_dir() else 0o640), path


@pytest.mark.slow
@pytest.mark.parametrize("form", ["deepspeed", "transformers-electra"])
def test_what_a_model_depends_on_is_noted_beside_every_format(form: str, tmp_path: Path) -> None:
    write(tmp_path / "run", 3)
    note_fingerprints(tmp_path / "run", {"data.text_tokenizer": "ab" * 32})
    folder = verbs.export(tmp_path / "run", tmp_path / "out", form=form)
    noted = json.loads((folder / "tessera.json").read_text())
    plain = verbs.export(tmp_path / "run", tmp_path / "plain")
    assert noted == json.loads((plain / "config.json").read_text()) and noted["step"] == 3
    assert recorded(folder) == {"data.text_tokenizer": "ab" * 32}


def test_a_public_layout_that_is_imported_again_says_what_it_was_trained_with(tmp_path: Path) -> None:
    write(tmp_path / "run", 3)
    note_fingerprints(tmp_path / "run", {"data.text_tokenizer": "ab" * 32})
    public = verbs.export(tmp_path / "run", tmp_path / "public", form="transformers-electra")
    back = verbs.import_(public, tmp_path / "back", "transformers-electra")
    assert (back / "config.json").read_bytes() == (
        verbs.export(tmp_path / "run", tmp_path / "x") / "config.json"
    ).read_bytes()
    for broken in ("", "[]", "{", '{"model": 3, "fingerprints": {"data.text_tokenizer": 7}}', '{"fingerprints": []}'):
        (public / "tessera.json").write_text(broken)
        again = verbs.import_(public, tmp_path / f"again-{len(broken)}", "transformers-electra")
        assert recorded(again) is None and load_model(again)


def note_fingerprints(run: Path, fingerprints: dict[str, str]) -> None:
    tree = config_of(run).model_dump(mode="json") | {"fingerprints": fingerprints}
    (run / "config.json").write_text(json.dumps(tree))


# ------------------------------------------------------------------------------- folders of other programs


FOREIGN: dict[str, dict[str, str]] = {
    "bert": {"config.json": '{"model_type": "bert", "architectures": ["BertModel"]}', "model.safetensors": ""},
    "clip": {"config.json": '{"model_type": "clip"}', "pytorch_model.bin": ""},
    "other": {"config.json": '{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}'},
    "electra": {"discriminator/config.json": '{"model_type": "electra"}', "generator/config.json": "{}"},
    "weights": {"model.safetensors": ""},
    "sharded": {"model.safetensors.index.json": "{}", "config.json": "{}"},
    "open_clip": {"open_clip_config.json": "{}", "open_clip_pytorch_model.bin": ""},
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_folder_of_another_program_is_told_with_the_way_to_import_it(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    for name, text in FOREIGN[kind].items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    wanted = f"tessera checkpoint import {folder} OUT --format transformers-" + (
        kind if kind in LAYOUT_KINDS else "{bert,clip,electra,vit}"
    )
    uses = {
        "run": load_trained, "image_tokenizer": load_model, "root": root_of, "dataset": open_dataset,
        "export": lambda path: verbs.export(path, tmp_path / "out"), "list": verbs.list_, "initial": weights_in,
    }  # fmt: skip
    for name, use in uses.items():
        if name == "initial" and "model.safetensors" in FOREIGN[kind]:
            continue
        with pytest.raises((ConfigError, DataError)) as told:
            use(folder)
        assert wanted in str(told.value), (name, str(told.value))


def test_a_folder_of_ours_is_not_taken_for_one_of_another_program(tmp_path: Path) -> None:
    write(tmp_path / "run", 3)
    assert foreign_model(tmp_path / "run") == "" == foreign_model(tmp_path / "nowhere") == foreign_model(tmp_path)
    assert foreign_model(verbs.export(tmp_path / "run", tmp_path / "out")) == ""


# ------------------------------------------------------------------------------------------- partial load


@pytest.mark.parametrize("exported", [False, True])
@pytest.mark.parametrize(("field", "value"), [("heads", 4), ("activation", "relu"), ("norm_eps", 1e-3)])
def test_weights_that_compute_something_else_here_are_refused_by_name(
    field: str, value: Any, exported: bool, tmp_path: Path
) -> None:
    write(tmp_path / "run", 3)
    note_fingerprints(tmp_path / "run", {})
    place = verbs.export(tmp_path / "run", tmp_path / "exported") if exported else tmp_path / "run"
    config = config_of(Path("unused")).model
    changed = config.model_copy(update={field: value})
    other = MODELS["electra"](changed)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(
        ConfigError, match=rf"model\.{field}: {getattr(config, field)} in the source, {value} in this run"
    ):
        start_from(other, place, changed)
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())


def test_heads_of_another_width_are_no_matter(tmp_path: Path) -> None:
    write(tmp_path / "run", 3)
    config = config_of(Path("unused")).model
    wider = config.model_copy(update={"width": 64, "heads": 4})
    note_fingerprints(tmp_path / "run", {})
    assert "tensors start from" in start_from(MODELS["electra"](wider), tmp_path / "run", wider)


def other_model(layers: int = 2, vocabulary: int = 200) -> nn.Module:
    torch.manual_seed(99)
    config = config_of(Path("unused")).model
    return MODELS["electra"](config.model_copy(update={"layers": layers, "vocab_size": vocabulary}))


@pytest.mark.parametrize("exported", [False, True])
def test_a_model_starts_from_what_fits_and_the_table_names_every_tensor(exported: bool, tmp_path: Path) -> None:
    source = write(tmp_path / "run", 3)
    place = verbs.export(tmp_path / "run", tmp_path / "exported") if exported else tmp_path / "run"
    model = other_model(layers=3, vocabulary=300)
    fresh = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    lines = start_from(model, place).splitlines()
    theirs, verdicts = source.state_dict(), {line.split()[1]: line for line in lines[1:]}
    taken = 0
    for name, tensor in model.state_dict().items():
        if name in theirs and theirs[name].shape == tensor.shape:
            assert torch.equal(tensor, theirs[name]) and verdicts[name].startswith("  taken ")
            taken += 1
        else:
            assert torch.equal(tensor, fresh[name]) and verdicts[name].startswith("  new ")
    assert verdicts["embeddings.word.weight"].endswith("[300, 32]: [200, 32] in the source")
    assert "not in the source" in verdicts["discriminator.blocks.2.norm1.weight"]
    assert verdicts.keys() == theirs.keys() | fresh.keys()
    assert lines[0].startswith(f"{taken} of {len(fresh)} tensors start from {place}")


def test_tensors_of_the_source_that_the_model_lacks_are_left_out_by_name(tmp_path: Path) -> None:
    write(tmp_path / "run", 3)
    table = start_from(other_model(layers=1), tmp_path / "run")
    assert "left out  discriminator.blocks.1.norm1.weight [32]: not in this model" in table


def test_a_source_of_which_nothing_fits_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "run", 3)
    with pytest.raises(DataError, match="no tensor fits this model"):
        start_from(nn.Linear(2, 2), tmp_path / "run")


def test_a_source_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no committed checkpoint; train the run first"):
        start_from(model_of(3), tmp_path)
