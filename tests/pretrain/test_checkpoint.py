"""The format of checkpoints: intervals, the manifest as commit, damage, retention; and nothing executable in it."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from data_pipeline.errors import ConfigError, DataError
from data_pipeline.settings import check_settings
from pretrain import checkpoint
from pretrain.checkpoint import (
    Checkpoints,
    Slices,
    check_identity,
    committed,
    create_only,
    identity,
    load_trained,
    tidy,
)
from pretrain.config import RunConfig
from pretrain.engine import Owned
from pretrain.interchange.folder import load_model
from pretrain.mesh import Mesh, Place
from pretrain.models import MODELS
from tests.pretrain.commands import Material, electra

KINDS = ("param", "exp_avg", "exp_avg_sq")


def config_of(run: Path) -> RunConfig:
    return check_settings(RunConfig, electra(Material(Path("data"), Path("vocab")), run), "test")


class Part:
    """Stands where the engine does: a model whose parameters this rank keeps in part."""

    stage = 3

    def __init__(self, module: torch.nn.Module, rank: int, world: int) -> None:
        self.model = module
        self.deepspeed = SimpleNamespace(module=torch.nn.ModuleDict({"model": module}))
        self.rank, self.world = rank, world

    def owned(self) -> list[Owned]:
        parts = []
        for name, parameter in self.model.named_parameters():
            size = parameter.numel()
            lo, hi = size * self.rank // self.world, size * (self.rank + 1) // self.world
            if lo < hi:
                flat = parameter.detach().flatten()[lo:hi]
                views = {"param": flat, "exp_avg": flat * 2, "exp_avg_sq": flat**2}
                parts.append(Owned(f"model.{name}", tuple(parameter.shape), lo, hi, views))
        return parts


def mesh_of(rank: int = 0, world: int = 1, store: Any = None) -> Mesh:
    return Mesh(Place(rank, rank, world, "", 0, "0"), torch.device("cpu"), store or torch.distributed.HashStore())


def write(run: Path, step: int, attempt: int = 0, keep: int = 9, world: int = 2) -> torch.nn.Module:
    """A committed checkpoint as `world` ranks would write it, one after the other -> the model in it."""
    torch.manual_seed(step)
    config = config_of(run)
    model = MODELS["electra"](config.model)
    store = torch.distributed.HashStore()
    for rank in reversed(range(world)):
        checkpoints = Checkpoints(run, mesh_of(rank, world, store), attempt, keep)
        folder = checkpoints.folder / f"step-{step:08d}.attempt-{attempt}"
        part: Any = Part(model, rank, world)
        if rank:
            checkpoints._reported(folder, partial(checkpoint._write_slices, folder, checkpoints.mesh, part))
        else:
            checkpoints.save(part, step, {"step": step, "updates": step, "identity": identity(config)})
    (run / "config.json").write_text(config.model_dump_json())
    return model


def shard_of(run: Path, index: int) -> Path:
    return committed(run / "checkpoints")[index].folder / "r00001.safetensors"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-50] ^= 4
    path.write_bytes(data)


DAMAGES = [(cut, "the manifest says"), (flip_a_bit, "sha256"), (Path.unlink, "missing")]

# ------------------------------------------------------------------------------------------------- slices


def test_any_interval_is_what_a_loop_over_the_whole_array_gives(tmp_path: Path) -> None:
    values = np.arange(23, dtype=np.float32) ** 2
    for rank, (lo, hi) in enumerate([(0, 7), (7, 8), (8, 23)]):
        tensors = {f"{kind}/w": torch.from_numpy(values[lo:hi] + i) for i, kind in enumerate(KINDS)}
        header = {"slices": json.dumps({"w": [[23], lo, hi]})}
        save_file(tensors, tmp_path / f"r{rank:05d}.safetensors", metadata=header)
    slices = Slices(tmp_path)
    for lo in range(23):
        for hi in range(lo + 1, 24):
            for i, kind in enumerate(KINDS):
                expected = [float(values[at]) + i for at in range(lo, hi)]
                assert slices.interval(kind, "w", lo, hi).tolist() == expected


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_the_weights_are_the_same_whatever_world_wrote_them(world: int, tmp_path: Path) -> None:
    model = write(tmp_path, 3, world=world)
    loaded, config = load_trained(tmp_path)
    assert config == config_of(tmp_path)
    assert not loaded.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_a_missing_part_is_named_and_not_filled_in(tmp_path: Path) -> None:
    write(tmp_path, 3)
    folder = committed(tmp_path / "checkpoints")[0].folder
    slices = Slices(folder)
    name = max(slices.shapes, key=lambda key: torch.Size(slices.shapes[key]).numel())
    (folder / "r00001.safetensors").unlink()
    with pytest.raises(DataError, match=f"{name} only up to element"):
        Slices(folder).whole("param", name)


def test_an_exported_model_has_the_checkpoint_s_weights(tmp_path: Path) -> None:
    model = write(tmp_path / "run", 3)
    exported, _ = load_model(checkpoint.export(tmp_path / "run", tmp_path / "exported"))
    for name, tensor in model.state_dict().items():
        assert torch.equal(exported.state_dict()[name], tensor), name


# ------------------------------------------------------------------------------------------------- commit


def test_a_folder_without_a_manifest_is_no_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, 4)
    write(tmp_path, 8)
    (committed(tmp_path / "checkpoints")[1].folder / "MANIFEST.json").unlink()
    newest = Checkpoints(tmp_path, mesh_of(), 1, 9).newest()
    assert newest is not None and newest.step == 4
    assert [row["step"] for row in checkpoint.list_(tmp_path)] == [4]


def test_the_manifest_is_written_after_every_other_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def note(path: Path, data: bytes) -> None:
        seen.append(sorted(file.name for file in path.parent.iterdir()))
        assert {entry["name"] for entry in json.loads(data)["files"]} == set(seen[-1])

    monkeypatch.setattr(checkpoint, "create_only", note)
    write(tmp_path, 4)
    assert seen == [["r00000.safetensors", "r00001.safetensors", "state.json"]]


def test_a_rank_that_cannot_write_leaves_nothing_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> dict[str, Any]:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_write_slices", full)
    with pytest.raises(DataError, match=r"was not committed: rank 0.*No space left.*untouched"):
        write(tmp_path, 4)
    assert committed(tmp_path / "checkpoints") == []


def test_a_checkpoint_holds_only_safetensors_and_json(tmp_path: Path) -> None:
    write(tmp_path, 4)
    folder = committed(tmp_path / "checkpoints")[0].folder
    for path in folder.iterdir():
        assert load_file(path) if path.suffix == ".safetensors" else json.loads(path.read_text())
    assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".json"}


def test_what_exists_is_never_overwritten(tmp_path: Path) -> None:
    create_only(tmp_path / "a", b"first")
    with pytest.raises(DataError, match="exists already"):
        create_only(tmp_path / "a", b"second")
    assert (tmp_path / "a").read_bytes() == b"first"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_two_attempts_at_the_same_step_stand_side_by_side_and_the_later_is_newer(tmp_path: Path) -> None:
    write(tmp_path, 4, attempt=9)
    write(tmp_path, 4, attempt=10)
    assert [saved.attempt for saved in committed(tmp_path / "checkpoints")] == [9, 10]


# ------------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize(("damage", "word"), DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    damage: Callable[[Path], None], word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, 4)
    model = write(tmp_path, 8)
    write(tmp_path, 12)
    damage(shard_of(tmp_path, 2))
    newest = Checkpoints(tmp_path, mesh_of(), 1, 9).newest()
    assert newest is not None and newest.step == 8
    said = capsys.readouterr().out
    assert "step-00000012.attempt-0 is passed over: r00001.safetensors" in said and word in said
    loaded = load_trained(tmp_path)[0].state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(("damage", "word"), DAMAGES)
def test_verify_names_every_file_that_is_off(damage: Callable[[Path], None], word: str, tmp_path: Path) -> None:
    write(tmp_path, 4)
    write(tmp_path, 8)
    assert checkpoint.verify(tmp_path) == {"checkpoints": 2, "newest_step": 8, "whole": True}
    damage(shard_of(tmp_path, 0))
    damage(shard_of(tmp_path, 1))
    with pytest.raises(DataError, match=f"2 files are off(.|\n)*0004.*/r00001.*{word}(.|\n)*0008.*/r00001"):
        checkpoint.verify(tmp_path)


@pytest.mark.parametrize("name", ["MANIFEST.json", "state.json"])
def test_a_manifest_or_state_that_is_cut_off_is_passed_over_too(name: str, tmp_path: Path) -> None:
    write(tmp_path, 4)
    write(tmp_path, 8)
    cut(committed(tmp_path / "checkpoints")[1].folder / name)
    newest = Checkpoints(tmp_path, mesh_of(), 1, 9).newest()
    assert newest is not None and newest.step == 4
    with pytest.raises(DataError, match=name):
        checkpoint.verify(tmp_path)


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_over(tmp_path: Path) -> None:
    write(tmp_path, 4)
    flip_a_bit(shard_of(tmp_path, 0))
    with pytest.raises(DataError, match="none of 1 checkpoints is whole; restore one"):
        Checkpoints(tmp_path, mesh_of(), 1, 9).newest()


@pytest.mark.parametrize("verb", [checkpoint.verify, checkpoint.load_trained])
def test_a_run_without_checkpoints_is_refused(verb: Callable[[Path], Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(config_of(tmp_path).model_dump_json())
    with pytest.raises(DataError, match="train"):
        verb(tmp_path)


# ---------------------------------------------------------------------------------------------- retention


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_k_are_kept_as_new_ones_come(keep: int, tmp_path: Path) -> None:
    for step in (4, 8, 12, 16):
        write(tmp_path, step, keep=keep)
    assert [saved.step for saved in committed(tmp_path / "checkpoints")] == [4, 8, 12, 16][-keep:]
    assert len(list((tmp_path / "checkpoints").iterdir())) == keep


def test_gc_removes_what_is_too_many_or_was_never_committed_but_not_what_may_be_being_written(tmp_path: Path) -> None:
    for step in (4, 8, 12):
        write(tmp_path, step)
    for step in (6, 16):
        (tmp_path / "checkpoints" / f"step-{step:08d}.attempt-0").mkdir()
    removed = checkpoint.gc(tmp_path, keep=1)["removed"]
    assert [int(name[5:13]) for name in removed] == [4, 6, 8]
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert [int(name[5:13]) for name in left] == [12, 16]


def test_removal_takes_the_manifest_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 4)
    write(tmp_path, 8)

    def stopped(_: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.shutil, "rmtree", stopped)
    with pytest.raises(KeyboardInterrupt):
        tidy(tmp_path / "checkpoints", 1)
    assert [saved.step for saved in committed(tmp_path / "checkpoints")] == [8]


# ----------------------------------------------------------------------------------------------- identity


@pytest.mark.parametrize(
    ("section", "key", "value", "differs"),
    [
        ("optim", "lr", 0.5, True),
        ("model", "layers", 3, True),
        ("train", "steps", 99, True),
        ("train", "global_batch", 99, True),
        ("train", "precision", "fp32", True),
        ("train", "zero_stage", 1, False),
        ("train", "micro_batch", 2, False),
        ("data", "dataset", "elsewhere", False),
        ("tracking", "uri", "elsewhere", False),
    ],
)
def test_only_settings_that_decide_what_is_computed_bind_a_checkpoint(
    section: str, key: str, value: Any, differs: bool, tmp_path: Path
) -> None:
    before = config_of(tmp_path)
    after = before.model_copy(update={section: getattr(before, section).model_copy(update={key: value})})
    if differs:
        with pytest.raises(ConfigError, match=f"{section}.{key}: .* saved, .* now"):
            check_identity(identity(before), identity(after), "there")
    else:
        check_identity(identity(before), identity(after), "there")
