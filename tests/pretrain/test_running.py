"""Whole runs by the public command that hang, are asked to stop, or whose numbers go wrong: what they say and do."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.pretrain.commands import (
    TRACEBACK,
    Material,
    ask_to_stop,
    child_of_rank,
    command,
    electra,
    environment,
    finish,
    interrupted,
    kill_rank_1,
    loss_bits,
    recipe,
    rows_of,
    steps_of,
    two_ranks,
    vqgan,
)
from tests.pretrain.processes import ROOT, TIMEOUT_S, run_ranks, start_ranks
from tests.pretrain.runtime.test_guards import by_hand
from tests.pretrain.test_training import assert_every_position_once, assert_same_state, final

HANG_WORKER = Path(__file__).with_name("hang_worker.py")
REFUSAL_WORKER = Path(__file__).with_name("refusal_worker.py")
pytestmark = [pytest.mark.slow, pytest.mark.real]


def faults_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "faults.jsonl").read_text().splitlines()]


# -------------------------------------------------------------------------------------------------- hangs


@pytest.fixture(scope="module")
def undisturbed(material: Material, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 steps of ELECTRA, 2 ranks, stage 3."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    done = finish(two_ranks(recipe(electra(material, run), run.with_suffix(".yaml"))))
    assert done.returncode == 0, done.stdout[-3000:]
    return run


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_stopped_is_blamed_and_the_run_starts_again_by_itself(
    rank: int, undisturbed: Path, material: Material, tmp_path: Path
) -> None:
    """Rank 0 holds the store through which the ranks talk: its silence is noticed too."""
    run = tmp_path / "run"
    config = recipe(electra(material, run), tmp_path / "run.yaml")
    argv = two_ranks(config, "train.collective_timeout_s=15", "--restarts", "1")
    code, output = interrupted(argv, run, 6, lambda pid: os.kill(child_of_rank(pid, rank), signal.SIGSTOP))
    assert code == 0, output[-3000:]
    blaming = [fault for fault in faults_of(run) if "blamed" in fault]
    assert [fault["blamed"] for fault in blaming] == [[rank]]
    assert "its state is T (stopped)" in blaming[0]["why"]
    assert f"cause node: rank {rank} (host" in output and "restarting" in output
    for number in (0, 1):
        stacks = (run / "faults" / f"attempt-00000.rank-{number:05d}.txt").read_text()
        assert "most recent call first" in stacks and "in train" in stacks
    assert not list((run / "faults").glob("attempt-00001*"))
    assert loss_bits(run) == loss_bits(undisturbed)
    assert_same_state(run, undisturbed)
    assert {row["attempt"] for row in rows_of(run)} == {0, 1}


def test_a_rank_that_the_others_wait_for_in_a_collective_is_blamed_though_it_lives(
    material: Material, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    config = recipe(electra(material, run, collective_timeout_s=20), tmp_path / "run.yaml")
    with start_ranks(HANG_WORKER, [str(config)], world=2) as ranks:
        output, _ = ranks[0].communicate(timeout=TIMEOUT_S)
        assert ranks[0].returncode == 70 and ranks[1].wait(timeout=60) in (70, -signal.SIGKILL), output[-3000:]
    (told,) = [fault for fault in faults_of(run) if fault["rank"] == 0 and "blamed" in fault]
    assert told["blamed"] == [1] and "1 of 2 ranks wait in a collective" in told["why"] and "stands" in told["why"]
    assert "in stands" in (run / "faults" / "attempt-00000.rank-00001.txt").read_text()


# ---------------------------------------------------------------------------- two attempts on one folder


def test_an_attempt_that_another_one_overtook_ends_at_its_first_refused_commit(
    material: Material, tmp_path: Path
) -> None:
    run, tree = tmp_path / "run", vqgan(material, tmp_path / "run")
    tree["train"] |= {"steps": 100_000, "checkpoint_every_steps": 4}
    argv, log = command("train", recipe(tree, tmp_path / "run.yaml")), tmp_path / "overtaken.log"
    with log.open("w") as output:
        first = subprocess.Popen(argv, env=environment(), cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + TIMEOUT_S
    while not steps_of(run):
        assert first.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.02)

    def stop_the_later(launcher: int) -> None:
        first.wait(TIMEOUT_S)
        ask_to_stop(launcher)

    try:
        code, told = interrupted(argv, run, 4, stop_the_later, hold=False)
    finally:
        first.kill()
    said = log.read_text()
    assert (first.returncode, code) == (64, 75), said[-3000:] + told[-3000:]
    assert said.count("has taken over the run") <= 2 and "the run goes on" not in said and TRACEBACK not in said
    assert not (run / "faults.jsonl").exists() and json.loads((run / "ended.json").read_text())["exit_code"] == 75


# ---------------------------------------------------------------------------------------- asked to stop


def test_what_a_scheduler_sends_is_one_request_and_the_save_is_finished(material: Material, tmp_path: Path) -> None:
    """SIGUSR1, SIGUSR1 again, and SIGTERM when time is up."""
    run = tmp_path / "run"
    config = recipe(electra(material, run, checkpoint_every_steps=1000), tmp_path / "run.yaml")

    def scheduler(launcher: int) -> None:
        for rank in (0, 1):
            for number in (signal.SIGUSR1, signal.SIGUSR1, signal.SIGTERM):
                os.kill(child_of_rank(launcher, rank), number)

    code, output = interrupted(two_ranks(config), run, 3, scheduler)
    assert code == 75, output[-3000:]
    assert TRACEBACK not in output
    assert final(run).step == max(steps_of(run)) < 24


def test_a_lead_too_short_for_a_save_is_said_before_the_first_step(material: Material, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = recipe(electra(material, run, steps=3), tmp_path / "run.yaml")
    cluster = recipe({"kind": "local", "env": {"TESSERA_STOP_LEAD_S": "0.0001"}}, tmp_path / "cluster.yaml")
    done = finish([*two_ranks(config), "--cluster", str(cluster)])
    assert done.returncode == 0, done.stdout[-3000:]
    assert done.stdout.count("warning: 0.0001 s lead, a save needs about") == 1
    assert done.stdout.index("warning:") < done.stdout.index("3/3")


# ----------------------------------------------------------------------------------------- refused steps

TOUCHY = {"spike_sigmas": 0.5, "window_steps": 4, "patience_steps": 20}


def guarded(material: Material, run: Path, **guards: Any) -> dict[str, Any]:
    """A run whose guards take a little noise for a spike."""
    return electra(material, run) | {"guards": TOUCHY | guards}


def refused(run: Path) -> dict[int, str]:
    """Step -> what the guards said."""
    return {step: row["guard"] for step, row in steps_of(run).items() if "guard" in row}


def test_refused_steps_are_skipped_recorded_and_those_of_the_definition(material: Material, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = finish(two_ranks(recipe(guarded(material, run, spike="skip"), tmp_path / "run.yaml")))
    assert done.returncode == 0, done.stdout[-3000:]
    rows = [row for _, row in sorted(steps_of(run).items())]
    accepted = by_hand([(row["loss"], row["grad_norm"]) for row in rows], window=4, sigmas=0.5)
    assert [step - 1 for step in refused(run)] == [at for at, fine in enumerate(accepted) if not fine] != []
    assert final(run).state["guards"]["events"] == len(refused(run))
    assert all(text.startswith("skip: ") for text in refused(run).values())
    assert_every_position_once(run, 24, 16)


def test_a_step_whose_second_optimizer_is_refused_changes_nothing_of_the_first(
    material: Material, tmp_path: Path
) -> None:
    tree = vqgan(material, tmp_path / "run") | {"guards": {"non_finite": "skip"}}
    tree["task"] |= {"revive_after_steps": 0}
    tree["train"] |= {"steps": 11}
    (found,) = run_ranks(REFUSAL_WORKER, [str(recipe(tree, tmp_path / "run.yaml"))], world=1)
    same = [step for step in range(11) if found["digests"][step] == found["digests"][step + 1]]
    assert same == [8]
    assert found["told"][9] == {"guard": "skip: discriminator gradient norm nan"}
    assert final(tmp_path / "run").state["optimizer"]["groups"]["decay"]["updates"] == 10


def test_a_run_that_rolls_back_and_is_killed_is_the_one_that_only_rolls_back(
    material: Material, tmp_path: Path
) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    done = finish(two_ranks(recipe(guarded(material, whole, spike="roll_back"), tmp_path / "whole.yaml")))
    assert done.returncode == 0, done.stdout[-3000:]
    late = [step for step in refused(whole) if step > 6]
    assert late, refused(whole)
    argv = two_ranks(recipe(guarded(material, run, spike="roll_back"), tmp_path / "run.yaml"))
    code, output = interrupted(argv, run, late[0], kill_rank_1)
    assert code == 70, output[-3000:]
    assert finish(argv).returncode == 0
    assert refused(run) == refused(whole)
    assert loss_bits(run) == loss_bits(whole)
    assert_same_state(run, whole)


def test_numbers_that_blow_up_stop_the_run_and_no_other_attempt_is_made(material: Material, tmp_path: Path) -> None:
    run = tmp_path / "run"
    tree = electra(material, run)
    tree["optim"] |= {"lr": 1e30}
    done = finish(two_ranks(recipe(tree, tmp_path / "run.yaml"), "--restarts", "3"))
    assert done.returncode == 70, done.stdout[-3000:]
    assert TRACEBACK not in done.stdout
    assert "cause user code: TrainingFault: step" in done.stdout and "restarting" not in done.stdout
    assert {row["attempt"] for row in rows_of(run)} == {0}
    assert {fault["cause"] for fault in faults_of(run)} <= {"user code", "node"}
