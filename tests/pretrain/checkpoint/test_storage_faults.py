"""Checkpoints on a disk that is full and on a real S3 server: what fails is said, what was committed stays."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from data_pipeline import remote
from data_pipeline.errors import DataError, Overtaken
from data_pipeline.storage import open_storage
from launchers.chaos.proxy import CLEAN, fault_proxy
from pretrain.checkpoint import saver
from pretrain.checkpoint.catalog import Retention, Saved, claim_attempt, committed
from pretrain.checkpoint.layout import Slices
from pretrain.checkpoint.saver import Checkpoints
from tests.gateway import Gateway
from tests.pretrain.checkpoint.simulated import mesh_of, model_of, ranks_of, save

pytestmark = [pytest.mark.slow, pytest.mark.real]


def weights(saved: Saved) -> dict[str, torch.Tensor]:
    slices = Slices(saved.folder)
    return {name: slices.whole("param", name) for name in slices.shapes}


def holds(saved: Saved, model: torch.nn.Module) -> bool:
    found = weights(saved)
    return all(torch.equal(found[f"model.{name}"], parameter) for name, parameter in model.named_parameters())


# ---------------------------------------------------------------------------------------------- a full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with room for three checkpoints of the tiny model and a half."""
    disk = tmp_path / "disk"
    disk.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], capture_output=True)
    if made.returncode:
        pytest.skip(f"a file system can only be mounted as root: {made.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk_fails_the_save_by_name_and_room_is_all_it_needs_to_go_on(
    small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ranks, step = ranks_of(small_disk / "checkpoints", 2, retention=Retention(9)), 0
    with pytest.raises(DataError, match=r"rank \d: .*No space left on device.*before it are untouched"):
        while step < 100:
            step += 1
            save(ranks, step, model_of(step))
    whole = committed(ranks[0].root)
    assert [saved.step for saved in whole] == list(range(1, step)) and step > 1
    assert all(not saved.faults() for saved in whole) and holds(whole[-1], model_of(step - 1))
    assert "the run goes on" in capsys.readouterr().out
    assert not (small_disk / "checkpoints" / f"step-{step:08d}.attempt-0").exists()  # its remains are not in the way
    oldest = whole[0].folder
    del whole  # with its open files, which would keep the room taken
    shutil.rmtree(oldest)
    save(ranks, step + 1, model_of(step + 1))
    newest = Checkpoints(ranks[0].root, mesh_of(), 0, Retention(9)).newest()
    assert newest is not None and holds(newest, model_of(step + 1))


# ------------------------------------------------------------------------------------------------------ S3


def test_the_whole_life_of_a_checkpoint_on_s3(bucket: str) -> None:
    root = f"{bucket}/runs/a"
    assert claim_attempt(root, 0, {}) == 0
    ranks = ranks_of(root, 3, 0, Retention(2))
    for step in (4, 8, 12):
        save(ranks, step, model_of(step))
    assert [saved.step for saved in committed(root)] == [8, 12]
    newest = Checkpoints(root, mesh_of(), 0, Retention(2)).newest()
    assert newest is not None and newest.step == 12 and holds(newest, model_of(12))
    with pytest.raises(DataError, match="exists already"):
        save(ranks_of(root, 3, 0, Retention(2)), 12, model_of(13))
    assert holds(newest, model_of(12))


def test_a_rank_s_part_of_a_big_model_is_several_objects(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saver, "PART", 20_000)
    root = f"{bucket}/runs/f"
    save(ranks_of(root, 2), 4, model_of(4))
    (saved,) = committed(root)
    names = [entry["name"] for entry in saved.manifest["files"]]
    assert {"r00000.safetensors", "r00000.part-00001.safetensors", "r00001.part-00001.safetensors"} <= set(names)
    newest = Checkpoints(root, mesh_of(), 0, Retention(2)).newest()
    assert newest is not None and holds(newest, model_of(4))
    saved.storage.remove("r00001.part-00001.safetensors")
    assert saved.faults() == ["r00001.part-00001.safetensors: missing"]


@pytest.mark.parametrize("damage", [lambda data: data[:-100], lambda data: data[:-50] + b"\x00" + data[-49:]])
def test_a_damaged_object_on_s3_is_passed_over(damage, bucket: str, capsys: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    root = f"{bucket}/runs/b"
    ranks = ranks_of(root, 2)
    for step in (4, 8):
        save(ranks, step, model_of(step))
    storage = open_storage(committed(root)[1].folder)
    storage.replace("r00001.safetensors", damage(storage.get("r00001.safetensors")))
    newest = Checkpoints(root, mesh_of(), 0, Retention(2)).newest()
    assert newest is not None and newest.step == 4
    assert "step-00000008.attempt-0 is skipped: r00001.safetensors" in capsys.readouterr().out


def test_an_overtaken_attempt_on_s3_cannot_commit(bucket: str) -> None:
    root = f"{bucket}/runs/c"
    first = ranks_of(root, 1, claim_attempt(root, 0, {}))
    second = ranks_of(root, 1, claim_attempt(root, 0, {}))
    with pytest.raises(Overtaken, match="attempt 1 has taken over"):
        save(first, 4, model_of(4))
    save(second, 4, model_of(4))
    assert [(saved.step, saved.attempt) for saved in committed(root)] == [(4, 1)]


def test_a_save_rides_out_short_faults_of_s3(bucket: str, gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    faults = ("503", "refuse", "503", "clean", "refuse", "clean", "clean")
    with fault_proxy(gateway.port, lambda n, _: (faults[n % len(faults)], 0)) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
        save(ranks_of(f"{bucket}/runs/d", 2), 4, model_of(4))
    assert proxy.happened["503"] > 0 and proxy.happened["refuse"] > 0
    monkeypatch.setenv("AWS_ENDPOINT_URL", gateway.endpoint)
    (saved,) = committed(f"{bucket}/runs/d")
    assert not saved.faults() and holds(saved, model_of(4))


def test_an_outage_of_s3_fails_one_save_and_the_next_one_commits(
    bucket: str, gateway: Gateway, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root, ranks, patience = f"{bucket}/runs/e", ranks_of(f"{bucket}/runs/e", 2), remote.PATIENCE_S
    monkeypatch.setattr(remote, "PATIENCE_S", 1.0)
    down = True
    with fault_proxy(gateway.port, lambda *_: ("503", 0) if down else CLEAN) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
        with pytest.raises(DataError, match="was not committed: rank 0: .*rank 1: "):
            save(ranks, 4, model_of(4))
        down = False
        monkeypatch.setattr(remote, "PATIENCE_S", patience)
        save(ranks, 8, model_of(8))
        assert [saved.step for saved in committed(root)] == [8]
    assert "the run goes on" in capsys.readouterr().out
