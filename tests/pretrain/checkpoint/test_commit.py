"""The manifest as commit, saves beside training, damage and fallback, attempts that fence each other."""

import json
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from data_pipeline.errors import ConfigError, DataError, NodeFault, Overtaken
from data_pipeline.storage import LocalStorage, open_storage
from pretrain.checkpoint import saver, verbs
from pretrain.checkpoint.catalog import Retention, Saved, claim_attempt, committed, put_once
from pretrain.checkpoint.layout import Slices
from pretrain.checkpoint.saver import Checkpoints
from pretrain.checkpoint.trained import load_trained
from tests.pretrain.checkpoint.simulated import (
    DAMAGES,
    Part,
    config_of,
    cut,
    flip_a_bit,
    folder_of,
    mesh_of,
    model_of,
    ranks_of,
    save,
    write,
)


def newest(run: Path) -> Saved | None:
    return Checkpoints(run / "checkpoints", mesh_of(), 1, Retention(9)).newest()


def full(*_: Any) -> dict[str, Any]:
    raise OSError(28, "No space left on device")


# ------------------------------------------------------------------------------------------------- commit


def test_a_folder_without_a_manifest_is_no_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, 4)
    write(tmp_path, 8)
    (folder_of(tmp_path, 1) / "MANIFEST.json").unlink()
    found = newest(tmp_path)
    assert found is not None and found.step == 4
    assert [row["step"] for row in verbs.list_(tmp_path)] == [4]


def test_the_manifest_is_written_after_every_other_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    original = LocalStorage.put_if_absent

    def noted(self: LocalStorage, name: str, data: bytes) -> bool:
        if name == "MANIFEST.json":
            seen.append(self.list())
            assert {entry["name"] for entry in json.loads(data)["files"]} == set(seen[-1])
        return original(self, name, data)

    monkeypatch.setattr(LocalStorage, "put_if_absent", noted)
    write(tmp_path, 4)
    assert seen == [["index.json", "r00000.safetensors", "r00001.safetensors", "state.json"]]


def test_a_checkpoint_holds_only_safetensors_and_json(tmp_path: Path) -> None:
    write(tmp_path, 4)
    folder = folder_of(tmp_path, 0)
    files = [path for path in folder.iterdir() if path.is_file()]
    for path in files:
        assert load_file(path) if path.suffix == ".safetensors" else json.loads(path.read_text())
    assert {path.suffix for path in files} == {".safetensors", ".json"}


def test_what_exists_is_never_overwritten(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    put_once(storage, "a", b"first")
    with pytest.raises(DataError, match="exists already"):
        put_once(storage, "a", b"second")
    assert storage.get("a") == b"first"
    write(tmp_path, 4)
    before = {path: path.read_bytes() for path in folder_of(tmp_path, 0).iterdir() if path.is_file()}
    with pytest.raises(DataError, match="exists already"):
        save(ranks_of(tmp_path / "checkpoints", 2), 4, model_of(5))
    assert {path: path.read_bytes() for path in before} == before


def test_two_attempts_at_the_same_step_stand_side_by_side_and_the_later_is_newer(tmp_path: Path) -> None:
    write(tmp_path, 4, attempt=9)
    verbs.name(tmp_path, "kept")
    write(tmp_path, 4, attempt=10)
    assert [saved.attempt for saved in committed(tmp_path / "checkpoints")] == [9, 10]


# --------------------------------------------------------------------------------------- beside training


def test_training_goes_on_while_a_save_is_written_and_what_is_saved_is_the_state_of_its_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    original = saver.write_shard
    monkeypatch.setattr(saver, "write_shard", lambda *given: (go_on.wait(30), original(*given))[1])
    (checkpoints,) = ranks_of(tmp_path / "checkpoints", 1)
    model = model_of(4)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    part: Any = Part(model, 0, 1)
    checkpoints.save(part, 4, {"step": 4})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)  # the next step
    assert committed(checkpoints.root) == []
    go_on.set()
    assert checkpoints.finish() == committed(checkpoints.root)[0]
    (tmp_path / "config.json").write_text(config_of(tmp_path).model_dump_json())
    loaded = load_trained(tmp_path)[0].state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())


def test_a_rank_that_cannot_write_leaves_nothing_committed_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ranks, model, original = ranks_of(tmp_path / "checkpoints", 2), model_of(4), saver.write_shard
    monkeypatch.setattr(saver, "write_shard", lambda s, shard: (full if "r00001" in shard.file else original)(s, shard))
    with pytest.raises(DataError, match=r"was not committed: rank 1.*No space left.*untouched"):
        save(ranks, 4, model)
    assert "the run goes on" in capsys.readouterr().out
    assert committed(tmp_path / "checkpoints") == []
    monkeypatch.setattr(saver, "write_shard", original)
    save(ranks, 8, model)
    assert [path.name for path in (tmp_path / "checkpoints").glob("step-*")] == ["step-00000008.attempt-0"]


@pytest.mark.parametrize("world", [1, 2])
def test_a_save_that_meets_a_mistake_of_ours_is_no_checkpoint(
    world: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mistaken(*_: Any) -> None:
        raise TypeError("unhashable type")

    monkeypatch.setattr(saver, "write_shard", mistaken)
    with pytest.raises(DataError, match=r"was not committed: .*TypeError: unhashable type"):
        save(ranks_of(tmp_path / "checkpoints", world), 4, model_of(4))


def test_a_rank_that_never_reports_fails_the_save_at_the_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saver, "COMMIT_TIMEOUT_S", 0.2)
    ranks = ranks_of(tmp_path / "checkpoints", 2)
    part: Any = Part(model_of(4), 0, 2)
    ranks[0].save(part, 4, {})
    assert ranks[0]._save is not None and ranks[0]._save.ended(200)
    with pytest.raises(DataError, match=r"rank 1: no report within 0 s"):
        ranks[0].finish()


@pytest.mark.slow
def test_rank_0_whose_process_holds_the_store_stays_until_all_have_read_how_the_save_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the last save of a run, committed and whole, is a failed one to a rank that looks a moment later."""
    ranks, model = ranks_of(tmp_path / "checkpoints", 2), model_of(4)
    go_on, get = threading.Event(), saver._get

    def slow(store: Any, key: str, *rest: Any) -> dict[str, Any]:
        if threading.current_thread() is ranks[1]._save:
            go_on.wait(30)
        return get(store, key, *rest)

    monkeypatch.setattr(saver, "_get", slow)
    for rank, checkpoints in enumerate(ranks):
        part: Any = Part(model, rank, 2)
        checkpoints.save(part, 4, {"step": 4})
    first, second = (checkpoints._save for checkpoints in ranks)
    assert first is not None and second is not None
    deadline = time.monotonic() + 30
    while not committed(tmp_path / "checkpoints") and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not first.ended(0.5)  # committed, but rank 1 has not read it
    go_on.set()
    assert first.ended(30) and second.ended(30)
    assert ranks[0].finish() == ranks[1].finish() is not None


def test_a_save_that_loses_rank_0_is_a_fault_of_its_process_not_of_the_storage(tmp_path: Path) -> None:
    """It may even be committed: only the word of it did not come."""
    server = torch.distributed.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    store = torch.distributed.TCPStore("127.0.0.1", server.port, None, False)
    checkpoints = Checkpoints(tmp_path / "checkpoints", mesh_of(1, 2, store), 0, Retention(9))
    part: Any = Part(model_of(4), 1, 2)
    checkpoints.save(part, 4, {})
    assert checkpoints._save is not None
    server.wait([f"{checkpoints._save.key}/1"], timedelta(seconds=30))
    del server
    with pytest.raises(NodeFault, match=r"rank 0, .* is lost"):
        checkpoints.finish()


def test_a_save_is_abandoned_when_the_run_ends_without_its_peers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saver, "ABANDON_S", 0.2)
    ranks = ranks_of(tmp_path / "checkpoints", 2)
    part: Any = Part(model_of(4), 0, 2)
    ranks[0].save(part, 4, {})
    began = time.monotonic()
    ranks[0].close()
    assert time.monotonic() - began < saver.COMMIT_TIMEOUT_S / 10
    assert ranks[0]._save is not None and ranks[0]._save.ended(200)  # it looks up four times a second
    assert "ended before all parts" in ranks[0]._save.failure
    assert committed(tmp_path / "checkpoints") == []


def test_a_disk_that_never_answers_holds_up_neither_the_next_save_nor_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()
    monkeypatch.setattr(saver, "COMMIT_TIMEOUT_S", 0.3)
    monkeypatch.setattr(saver, "ABANDON_S", 0.1)
    monkeypatch.setattr(saver, "write_shard", lambda *_: release.wait(200) and full())
    (checkpoints,) = ranks_of(tmp_path / "checkpoints", 1)
    part: Any = Part(model_of(4), 0, 1)
    began = time.monotonic()
    checkpoints.save(part, 4, {})
    checkpoints.save(part, 8, {})
    assert checkpoints._save is not None and checkpoints._save.ended(100)
    with pytest.raises(DataError, match="the previous save is still being written"):
        checkpoints.finish()
    checkpoints.close()
    assert time.monotonic() - began < 100
    release.set()
    assert committed(tmp_path / "checkpoints") == []


def test_the_mean_of_a_metric_since_the_last_save_is_part_of_the_state(tmp_path: Path) -> None:
    ranks = ranks_of(tmp_path / "checkpoints", 1)
    for step, losses in ((2, (4.0, 2.0)), (4, (1.0, 2.0))):
        for loss in losses:
            ranks[0].note({"loss": loss})
        save(ranks, step, model_of(0))
    assert [saved.state["means"] for saved in committed(ranks[0].root)] == [{"loss": 3.0}, {"loss": 1.5}]


# ----------------------------------------------------------------------------------------------- attempts


def test_of_many_starters_each_gets_an_attempt_of_its_own(tmp_path: Path) -> None:
    taken: list[int] = []
    starters = [threading.Thread(target=lambda: taken.append(claim_attempt(tmp_path, 3, {}))) for _ in range(8)]
    for starter in starters:
        starter.start()
    for starter in starters:
        starter.join()
    assert sorted(taken) == list(range(3, 11))


def test_an_overtaken_attempt_cannot_commit_nor_remove(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    first = ranks_of(root, 1, claim_attempt(root, 0, {}), Retention(1))
    save(first, 4, model_of(4))
    second = ranks_of(root, 1, claim_attempt(root, 0, {}), Retention(1))
    with pytest.raises(Overtaken, match="attempt 1 has taken over the run from attempt 0"):
        save(first, 8, model_of(8))
    assert all(rank.overtaken for rank in first) and not any(rank.overtaken for rank in second)
    assert [saved.step for saved in committed(root)] == [4]
    save(second, 8, model_of(8))
    assert [(saved.step, saved.attempt) for saved in committed(root)] == [(8, 1)]
    assert [path.name for path in root.glob("step-*")] == ["step-00000008.attempt-1"]


# ------------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize(("damage", "word"), DAMAGES)
@pytest.mark.parametrize("file", ["r00001.safetensors", "index.json"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    damage: Callable[[Path], None], word: str, file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, 4)
    model = write(tmp_path, 8)
    write(tmp_path, 12)
    damage(folder_of(tmp_path, 2) / file)
    found = newest(tmp_path)
    assert found is not None and found.step == 8
    said = capsys.readouterr().out
    assert f"step-00000012.attempt-0 is skipped: {file}" in said and word in said
    loaded = load_trained(tmp_path)[0].state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())


def test_ranks_share_the_checking_and_all_pass_over_what_one_of_them_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 4, world=3)
    write(tmp_path, 8, world=3)
    flip_a_bit(folder_of(tmp_path, 1) / "r00002.safetensors")
    read: dict[str, int] = {}
    original = LocalStorage.get_range

    def counted(self: LocalStorage, name: str, start: int, stop: int) -> bytes:
        read[f"{self.root}/{name}"] = read.get(f"{self.root}/{name}", 0) + stop - start
        return original(self, name, start, stop)

    monkeypatch.setattr(LocalStorage, "get_range", counted)
    found: dict[int, Any] = {}
    threads = [
        threading.Thread(target=lambda rank=rank, mine=mine: found.update({rank: mine.newest()}))
        for rank, mine in enumerate(ranks_of(tmp_path / "checkpoints", 3))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert [found[rank].step for rank in range(3)] == [4, 4, 4]
    assert {name: size for name, size in read.items() if size != Path(name).stat().st_size} == {}  # each file once


def test_only_regular_checkpoints_are_looked_at_where_that_is_asked(tmp_path: Path) -> None:
    for step in (4, 8, 9):
        write(tmp_path, step)
    found = Checkpoints(tmp_path / "checkpoints", mesh_of(), 1, Retention(9)).newest(4)
    assert found is not None and found.step == 8


@pytest.mark.parametrize(("damage", "word"), DAMAGES)
def test_verify_names_every_file_that_is_off(damage: Callable[[Path], None], word: str, tmp_path: Path) -> None:
    write(tmp_path, 4)
    write(tmp_path, 8)
    assert verbs.verify(tmp_path) == {"checkpoints": 2, "newest_step": 8, "whole": True}
    for index in (0, 1):
        damage(folder_of(tmp_path, index) / "r00001.safetensors")
    with pytest.raises(DataError, match=f"2 damaged files(.|\n)*0004.*/r00001.*{word}(.|\n)*0008.*/r00001"):
        verbs.verify(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["MANIFEST.json", "state.json"])
def test_a_manifest_or_state_that_is_cut_off_is_passed_over_too(name: str, tmp_path: Path) -> None:
    write(tmp_path, 4)
    write(tmp_path, 8)
    cut(folder_of(tmp_path, 1) / name)
    found = newest(tmp_path)
    assert found is not None and found.step == 4
    with pytest.raises(DataError, match=name):
        verbs.verify(tmp_path)


@pytest.mark.parametrize("word", ["name", "bytes", "sha256", "files", "version", "[", '"'])
def test_a_manifest_with_a_flipped_bit_is_passed_over_and_listed(word: str, tmp_path: Path) -> None:
    """Wherever it is: what is left may be no JSON, or other keys, or a list in the place of a tree."""
    write(tmp_path, 4)
    write(tmp_path, 8)
    path = folder_of(tmp_path, 1) / "MANIFEST.json"
    data = path.read_bytes()
    at = data.index(word.encode())
    path.write_bytes(data[:at] + bytes([data[at] ^ 2]) + data[at + 1 :])
    found = newest(tmp_path)
    assert found is not None and found.step == 4
    with pytest.raises(DataError, match="0008.*/MANIFEST.json: "):
        verbs.verify(tmp_path)
    assert [row["step"] for row in verbs.list_(tmp_path)] == [4, 8]


def test_a_checkpoint_of_another_format_is_passed_over_with_both_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, 4)
    path = folder_of(tmp_path, 0) / "MANIFEST.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 1}))
    with pytest.raises(DataError, match="none of 1 checkpoints"):
        newest(tmp_path)
    assert "format 1, supported is 3" in capsys.readouterr().out


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_over(tmp_path: Path) -> None:
    write(tmp_path, 4)
    flip_a_bit(folder_of(tmp_path, 0) / "r00001.safetensors")
    with pytest.raises(DataError, match="none of 1 checkpoints is valid; restore one"):
        newest(tmp_path)


@pytest.mark.parametrize("verb", [verbs.verify, load_trained])
def test_a_run_without_checkpoints_is_refused(verb: Callable[[Path], Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(config_of(tmp_path).model_dump_json())
    with pytest.raises(DataError, match="train"):
        verb(tmp_path)


def test_an_overtaken_attempt_is_a_matter_of_configuration(tmp_path: Path) -> None:
    from pretrain.checkpoint.catalog import refuse_overtaken

    claim_attempt(tmp_path, 5, {})
    refuse_overtaken(tmp_path, 5)
    with pytest.raises(ConfigError, match="attempt 5 has taken over .* set another `run`"):
        refuse_overtaken(tmp_path, 4)


def test_checkpoints_of_two_places_do_not_take_each_other_s_words(tmp_path: Path) -> None:
    store = torch.distributed.HashStore()
    for place in ("a", "b"):
        ranks = [Checkpoints(tmp_path / place, mesh_of(rank, 2, store), 0, Retention(9)) for rank in range(2)]
        save(ranks, 4, model_of(4) if place == "a" else torch.nn.Linear(3, 5))
    (saved,) = committed(tmp_path / "b")
    assert set(Slices(saved.folder).shapes) == {"model.weight", "model.bias"} and not saved.faults()
