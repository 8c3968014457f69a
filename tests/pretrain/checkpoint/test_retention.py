"""Which checkpoints stay and why; what is removed, in which order; folders that were never committed."""

from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import ConfigError, DataError
from pretrain.checkpoint import verbs
from pretrain.checkpoint.catalog import Retention, claim_attempt, committed, tidy
from tests.pretrain.checkpoint.simulated import config_of, flip_a_bit, folder_of, model_of, ranks_of, save, write


def steps_in(run: Path) -> list[int]:
    return [saved.step for saved in committed(run / "checkpoints")]


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_k_are_kept_as_new_ones_come(keep: int, tmp_path: Path) -> None:
    for step in (4, 8, 12, 16):
        write(tmp_path, step, keep=keep)
    assert steps_in(tmp_path) == [4, 8, 12, 16][-keep:]
    assert len(list((tmp_path / "checkpoints").iterdir())) == keep


def test_saves_of_stop_signals_push_out_none_that_a_roll_back_needs(tmp_path: Path) -> None:
    """A run that saves every 8 steps and was stopped four times: the newest and the last regular ones are there."""
    for step in (8, 13, 14, 16, 17, 19):
        write(tmp_path, step, retention=Retention(1, regular=8))
        assert steps_in(tmp_path)[-1] == step
    assert steps_in(tmp_path) == [16, 19]
    (checkpoints,) = ranks_of(tmp_path / "checkpoints", 1)
    newest = checkpoints.newest(8)
    assert newest is not None and newest.step == 16
    assert [row["kept"] for row in verbs.list_(tmp_path)] != []


def test_a_save_behind_damaged_ones_stays_and_these_do_not_count(tmp_path: Path) -> None:
    """Attempt 1 found that of step 24 damaged, started at 16, was stopped at 19, and goes on."""
    keep = Retention(2, regular=8)
    for step in (8, 16, 24):
        write(tmp_path, step, retention=keep)
    flip_a_bit(folder_of(tmp_path, 1) / "r00001.safetensors")
    write(tmp_path, 19, attempt=1, retention=keep)
    assert steps_in(tmp_path) == [16, 19]
    write(tmp_path, 24, attempt=2, retention=keep)
    assert steps_in(tmp_path) == [16, 24]


@pytest.mark.slow
def test_the_one_just_saved_stays_although_later_steps_of_its_attempt_lie_there(tmp_path: Path) -> None:
    """A roll back passed over a damaged one, then the run was stopped."""
    for step in (8, 16, 11):
        write(tmp_path, step, retention=Retention(1, regular=8))
    assert steps_in(tmp_path) == [11, 16]


LOSSES = {4: 3.0, 8: 1.0, 12: 2.0, 16: 4.0, 20: 5.0}


@pytest.mark.parametrize(
    ("retention", "left"),
    [
        (Retention(1), [20]),
        (Retention(2), [16, 20]),
        (Retention(1, every_steps=8), [8, 16, 20]),
        (Retention(1, best="loss"), [8, 20]),
        (Retention(1, every_steps=12, best="loss"), [8, 12, 20]),
        (Retention(1, best="no such metric"), [20]),
    ],
)
def test_the_last_the_regular_and_the_best_stay(retention: Retention, left: list[int], tmp_path: Path) -> None:
    ranks = ranks_of(tmp_path / "checkpoints", 1, retention=retention)
    for step, loss in LOSSES.items():
        ranks[0].note({"loss": loss})
        save(ranks, step, model_of(0))
    assert steps_in(tmp_path) == left


@pytest.mark.parametrize(
    ("best", "kept"),
    [("mlm_accuracy", 20), ("max:mlm_accuracy", 20), ("min:mlm_accuracy", 8), ("max:loss", 20), ("min:loss", 8)],
)
def test_the_best_is_the_highest_of_an_accuracy_and_what_is_not_finite_is_none(
    best: str, kept: int, tmp_path: Path
) -> None:
    keep = Retention(1, best=best)
    ranks = ranks_of(tmp_path / "checkpoints", 1, retention=keep)
    for step, value in ({2: float("nan"), 3: float("inf"), 6: float("-inf")} | LOSSES).items():
        ranks[0].note({"loss": value, "mlm_accuracy": value})
        save(ranks, step, model_of(0))
    ranks[0].note({"loss": 2.5, "mlm_accuracy": 2.5})
    save(ranks, 24, model_of(0))
    assert steps_in(tmp_path) == [kept, 24]
    why = keep.reasons(tmp_path / "checkpoints", committed(tmp_path / "checkpoints"))
    assert f"best {best.removeprefix('max:').removeprefix('min:')}={LOSSES[kept]:g}" in sum(why.values(), [])


def test_a_named_checkpoint_stays_until_its_name_is_taken_away(tmp_path: Path) -> None:
    write(tmp_path, 4)
    write(tmp_path, 8)
    assert verbs.name(tmp_path, "before-warm-down", step=4)["folder"] == str(folder_of(tmp_path, 0))
    write(tmp_path, 12, keep=1)
    assert steps_in(tmp_path) == [4, 12]
    assert [row["kept"] for row in verbs.list_(tmp_path)] == ["last, named before-warm-down", "last"]
    with pytest.raises(ConfigError, match="named 'before-warm-down' already"):
        verbs.name(tmp_path, "before-warm-down")
    with pytest.raises(ConfigError, match=r"named 'warm-down'; there are before-warm-down"):
        verbs.name(tmp_path, "warm-down", remove=True)
    verbs.name(tmp_path, "before-warm-down", remove=True)
    write(tmp_path, 16, keep=1)
    assert steps_in(tmp_path) == [16]


@pytest.mark.parametrize("label", ["", "a b", "../up", "x/y"])
def test_a_name_that_would_be_a_path_is_refused(label: str, tmp_path: Path) -> None:
    write(tmp_path, 4)
    with pytest.raises(ConfigError, match="letters, digits"):
        verbs.name(tmp_path, label)


def test_a_step_that_is_not_there_cannot_be_named(tmp_path: Path) -> None:
    write(tmp_path, 4)
    with pytest.raises(DataError, match="no valid checkpoint of step 5"):
        verbs.name(tmp_path, "five", step=5)


def test_gc_removes_what_is_too_many_or_was_never_committed_but_not_what_may_be_being_written(tmp_path: Path) -> None:
    for step in (4, 8, 12):
        write(tmp_path, step)
    for step in (6, 16):
        (tmp_path / "checkpoints" / f"step-{step:08d}.attempt-0").mkdir()
    removed = verbs.gc(tmp_path, keep=1)["removed"]
    assert [int(name[5:13]) for name in removed] == [4, 6, 8]
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert [int(name[5:13]) for name in left] == [12, 16]


def test_gc_removes_every_folder_of_an_attempt_that_was_overtaken(tmp_path: Path) -> None:
    write(tmp_path, 4)
    root = tmp_path / "checkpoints"
    dead, live = claim_attempt(root, 0, {}), claim_attempt(root, 0, {})
    for attempt in (dead, live):
        (root / f"step-{8:08d}.attempt-{attempt}").mkdir()
    assert verbs.gc(tmp_path)["removed"] == ["step-00000008.attempt-0"]


def test_a_commit_reaps_what_earlier_attempts_and_failed_saves_left(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    for name in ("step-00000012.attempt-0", "step-00000006.attempt-1", "step-00000012.attempt-1", "notes"):
        (root / name).mkdir(parents=True)
    write(tmp_path, 8, attempt=1)
    left = sorted(path.name for path in root.iterdir())
    assert left == ["notes", "step-00000008.attempt-1", "step-00000012.attempt-1"]


def test_removal_takes_the_manifest_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 4)
    write(tmp_path, 8)

    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("data_pipeline.storage.LocalStorage.remove_all", stopped)
    with pytest.raises(KeyboardInterrupt):
        tidy(tmp_path / "checkpoints", Retention(1), lambda *_: False)
    assert steps_in(tmp_path) == [8]


def test_a_run_may_keep_its_checkpoints_elsewhere(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(config_of(tmp_path, checkpoints=str(elsewhere)).model_dump_json())
    save(ranks_of(elsewhere, 2), 4, model_of(4))
    assert [row["folder"] for row in verbs.list_(tmp_path / "run")] == [f"{elsewhere}/step-00000004.attempt-0"]
    assert verbs.verify(tmp_path / "run")["newest_step"] == 4
