"""What a process notes about its end, and as what the user sees it."""

import contextlib
import errno
import json
from pathlib import Path

import pytest

from data_pipeline.errors import ConfigError, DataError, NodeFault, Requeue, TrainingFault
from launchers.slurm_end import blamed_ranks
from pretrain import train
from pretrain.runtime.faults import ENDED, FAULTS, cause_of, faults_noted, faults_size, read_faults, record_fault
from pretrain.runtime.mesh import Mesh, peer_lost
from tests.pretrain.checkpoint.simulated import config_of

GLOO = "[/x/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1. This is typical"


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (ConfigError("x"), "configuration"),
        (NodeFault("x"), "node"),
        (DataError("x"), "storage"),
        (Requeue("x"), "preemption"),
        (TrainingFault("x"), "user code"),
        (ValueError("x"), "user code"),
        (MemoryError(), "user code"),
    ],
)
def test_every_error_has_a_cause(error: Exception, cause: str) -> None:
    assert cause_of(error) == cause


@pytest.mark.parametrize(
    ("error", "seen_as", "cause"),
    [
        (RuntimeError(GLOO), NodeFault, "node"),
        (RuntimeError("shapes do not fit"), RuntimeError, "user code"),
        (OSError(errno.ENOSPC, "No space left on device"), DataError, "storage"),
        (FileNotFoundError(errno.ENOENT, "no such file"), FileNotFoundError, "user code"),
        (TrainingFault("loss nan"), TrainingFault, "user code"),
    ],
)
def test_what_ends_a_block_is_noted_and_raised_as_what_it_is(
    error: Exception, seen_as: type[Exception], cause: str, tmp_path: Path
) -> None:
    with pytest.raises(seen_as) as raised, faults_noted(tmp_path, 3, peer_lost):
        raise error
    (line,) = read_faults(tmp_path)
    assert (line["cause"], line["rank"]) == (cause, 3)
    assert str(raised.value) in line["why"]
    assert "typical" not in str(raised.value)


def test_a_fault_noted_behind_a_torn_line_is_read(tmp_path: Path) -> None:
    (tmp_path / FAULTS).write_text('{"cause": "node", "rank": 0}\n{"cause": "sto')
    start = faults_size(tmp_path)
    record_fault(tmp_path, "storage", "the disk is full", 1)
    assert [line["why"] for line in read_faults(tmp_path, start)] == ["the disk is full"]
    assert [line["cause"] for line in read_faults(tmp_path)] == ["node", "storage"]


def test_ranks_that_do_not_come_are_noted_and_no_word_of_an_earlier_end_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ENDED).write_text('{"exit_code": 75}')

    def alone(*_: object) -> None:
        raise NodeFault("1 of 2 ranks did not come", blamed=(1,))

    monkeypatch.setattr(Mesh, "start", alone)
    with pytest.raises(NodeFault, match="did not come"):
        train.main(config_of(tmp_path))
    (line,) = read_faults(tmp_path)
    assert (line["cause"], line["blamed"]) == ("node", [1])
    assert blamed_ranks([line], 2) == [1]
    assert not (tmp_path / ENDED).exists()


def test_a_stop_that_was_asked_for_is_no_fault(tmp_path: Path) -> None:
    with contextlib.suppress(Requeue), faults_noted(tmp_path, 0, peer_lost):
        raise Requeue("saved")
    assert not (tmp_path / FAULTS).exists()
    assert json.loads((tmp_path / ENDED).read_text())["exit_code"] == Requeue.exit_code


def test_only_a_clean_end_leaves_its_marker(tmp_path: Path) -> None:
    with faults_noted(tmp_path, 0, peer_lost):
        pass
    assert json.loads((tmp_path / ENDED).read_text())["exit_code"] == 0
    with contextlib.suppress(NodeFault), faults_noted(tmp_path, 0, peer_lost):
        assert not (tmp_path / ENDED).exists()  # while it runs, and where it is killed, nothing says that it ended
        raise NodeFault("gone")
    assert not (tmp_path / ENDED).exists()


def test_nothing_is_written_where_there_is_no_run_yet(tmp_path: Path) -> None:
    record_fault(tmp_path / "run", "node", "gone", 0)
    assert not (tmp_path / "run").exists()


def test_an_attempt_reads_its_own_lines_only(tmp_path: Path) -> None:
    record_fault(tmp_path, "node", "first", 0)
    start = faults_size(tmp_path)
    record_fault(tmp_path, "storage", "second", 1, blamed=[1])
    with (tmp_path / FAULTS).open("a") as file:
        file.write(json.dumps({"cause": "node"})[:5])
    assert [line["why"] for line in read_faults(tmp_path, start)] == ["second"]
