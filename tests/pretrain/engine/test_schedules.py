"""Schedules with restarts, stable phases, inverse roots and pieces: tables, libraries, refusals, digests."""

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st
from torch import nn

from data_pipeline.errors import ConfigError
from data_pipeline.settings import check_settings, digest, override_settings
from pretrain.config import OptimConfig, RunConfig
from pretrain.engine.schedule import learning_rate

ROOT = math.sqrt(0.5)


def optim(**tree: object) -> OptimConfig:
    return check_settings(OptimConfig, {"lr": 1.0} | tree, "test")


def rates(steps: int, **tree: object) -> list[float]:
    return [learning_rate(step, steps, optim(**tree)) for step in range(steps)]


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        ({"schedule": "wsd", "decay_steps": 4, "decay_shape": "linear"}, [1, 1, 1, 1, 1, 0.75, 0.5, 0.25]),
        ({"schedule": "wsd", "decay_steps": 0.5, "decay_shape": "linear"}, [1, 1, 1, 1, 1, 0.75, 0.5, 0.25]),
        ({"schedule": "wsd", "decay_steps": 4}, [1, 1, 1, 1, 1, 0.5, 1 - ROOT, 1 - math.sqrt(0.75)]),
        (
            {"schedule": "wsd", "decay_steps": 4, "decay_shape": "cosine", "final_lr_fraction": 0.5, "warmup_steps": 2},
            [0.5, 1, 1, 1, 1, 0.75 + ROOT / 4, 0.75, 0.75 - ROOT / 4],
        ),
        ({"schedule": "wsd", "decay_steps": 1}, [1] * 8),
        ({"schedule": "cosine_restarts"}, [1, 0.5 + ROOT / 2, 0.5, 0.5 - ROOT / 2] * 2),
        (
            {"schedule": "cosine_restarts", "cycle_growth": 3, "lr": 2.0},
            [2, 1, 2, 1 + math.cos(math.pi / 6), 1.5, 1, 0.5, 1 + math.cos(5 * math.pi / 6)],
        ),
        ({"schedule": "inverse_sqrt", "warmup_steps": 2}, [0.5, 1, 1, *(math.sqrt(2 / step) for step in range(3, 8))]),
        ({"schedule": "inverse_sqrt", "timescale_steps": 4}, [1] * 5 + [math.sqrt(4 / step) for step in (5, 6, 7)]),
        (
            {"schedule": "inverse_sqrt", "timescale_steps": 1, "final_lr_fraction": 0.5},
            [1, 1, ROOT, math.sqrt(1 / 3), 0.5, 0.5, 0.5, 0.5],
        ),
        ({"schedule": "piecewise", "pieces": [[3, 0.5], [6, 2.0]], "lr": 10.0}, [10, 10, 10, 5, 5, 5, 20, 20]),
        ({"schedule": "piecewise", "pieces": [[2, 0.5]], "warmup_steps": 2}, [0.5, 1, *[0.5] * 6]),
    ],
)
def test_the_rate_of_each_of_eight_steps_is_the_tables(tree: dict[str, object], expected: list[float]) -> None:
    assert rates(8, **tree) == pytest.approx(expected, abs=1e-15)


# ------------------------------------------------------------------------------------------------ other libraries


def theirs(steps: int, make: Any, *args: Any, **kwargs: Any) -> list[float]:
    """Return the rates that a scheduler of another library sets at lr 1."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler, found = make(optimizer, *args, **kwargs), []
    for _ in range(steps):
        found.append(float(scheduler.get_last_lr()[0]))
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("shape", ["linear", "cosine", "1-sqrt"])
@pytest.mark.parametrize("final", [0.0, 0.2])
def test_wsd_is_that_of_transformers_after_the_warm_up(shape: str, final: float) -> None:
    from transformers.optimization import get_wsd_schedule

    expected = theirs(40, get_wsd_schedule, 5, 12, num_stable_steps=23, decay_type=shape, min_lr_ratio=final)
    tree = {"schedule": "wsd", "decay_steps": 12, "decay_shape": shape, "final_lr_fraction": final, "warmup_steps": 5}
    assert rates(40, **tree)[5:] == pytest.approx(expected[5:], abs=1e-12)


def test_the_warm_up_is_one_step_ahead_of_transformers_whose_first_rate_is_0() -> None:
    from transformers.optimization import get_wsd_schedule

    expected = theirs(9, get_wsd_schedule, 5, 1, num_stable_steps=3)
    assert expected[0] == 0 and rates(9, schedule="wsd", decay_steps=1, warmup_steps=5)[:5] == expected[1:6]


@pytest.mark.parametrize("cycles", [2, 3, 5])
def test_restarts_are_those_of_transformers_after_the_warm_up(cycles: int) -> None:
    from transformers.optimization import get_cosine_with_hard_restarts_schedule_with_warmup as restarts

    expected = theirs(64, restarts, 4, 64, num_cycles=cycles)
    found = rates(64, schedule="cosine_restarts", cycles=cycles, warmup_steps=4)
    assert found[4:] == pytest.approx(expected[4:], abs=1e-12)


@pytest.mark.parametrize(("cycles", "growth", "steps"), [(3, 1, 30), (3, 2, 35), (3, 3, 39), (1 + 1, 5, 12)])
def test_restarts_are_those_of_torch_where_the_first_cycle_is_a_whole_number_of_steps(
    cycles: int, growth: int, steps: int
) -> None:
    first = steps // sum(growth**n for n in range(cycles))
    make = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts
    expected = theirs(steps, make, T_0=first, T_mult=growth, eta_min=0.1)
    tree = {"schedule": "cosine_restarts", "cycles": cycles, "cycle_growth": growth, "final_lr_fraction": 0.1}
    assert rates(steps, **tree) == pytest.approx(expected, abs=1e-12)


def test_the_inverse_root_is_that_of_transformers_after_the_warm_up() -> None:
    from transformers.optimization import get_inverse_sqrt_schedule

    expected = theirs(50, get_inverse_sqrt_schedule, 7)
    assert rates(50, schedule="inverse_sqrt", warmup_steps=7)[7:] == pytest.approx(expected[7:], abs=1e-12)


def test_the_inverse_root_is_noam_s_and_t5_s() -> None:
    width, warmup, t5 = 512, 10, 20
    noam = [width**-0.5 * min(step**-0.5, step * warmup**-1.5) for step in range(1, 60)]
    peak = (width * warmup) ** -0.5
    found = [
        learning_rate(step, 60, optim(lr=peak, schedule="inverse_sqrt", warmup_steps=warmup)) for step in range(60)
    ]
    assert found[:warmup] == pytest.approx(noam[:warmup])  # whose steps count from 1
    assert found[warmup:] == pytest.approx(noam[warmup - 1 :])
    adafactor = [1 / math.sqrt(max(step, t5)) for step in range(60)]
    tree = {"lr": 1 / math.sqrt(t5), "schedule": "inverse_sqrt", "timescale_steps": t5}
    assert rates(60, **tree) == pytest.approx(adafactor)


def test_pieces_are_those_of_torch_s_milestones() -> None:
    expected = theirs(20, torch.optim.lr_scheduler.MultiStepLR, milestones=[6, 13], gamma=0.1)
    assert rates(20, schedule="piecewise", pieces=[[6, 0.1], [13, 0.01]]) == pytest.approx(expected)


# -------------------------------------------------------------------------------------------------- properties


@budget(max_examples=60, deadline=None)
@given(steps=st.integers(2, 400), data=st.data())
def test_every_cycle_begins_at_the_peak_and_falls(steps: int, data: st.DataObject) -> None:
    growth = data.draw(st.integers(1, 4))
    fitting = [n for n in range(2, 40) if sum(growth**k for k in range(n)) <= steps]
    if not fitting:
        return
    tree = {"schedule": "cosine_restarts", "cycles": data.draw(st.sampled_from(fitting)), "cycle_growth": growth}
    found = rates(steps, **tree)
    rises = sum(later > earlier for earlier, later in itertools.pairwise(found))
    assert rises <= tree["cycles"] - 1  # type: ignore[operator]
    assert found[0] == 1.0 and all(0 < rate <= 1 for rate in found)


@budget(max_examples=60, deadline=None)
@given(steps=st.integers(2, 300), data=st.data())
def test_a_stable_phase_is_stable_and_its_decay_falls(steps: int, data: st.DataObject) -> None:
    decay = data.draw(st.integers(1, steps))
    shape = data.draw(st.sampled_from(["linear", "cosine", "1-sqrt"]))
    found = rates(steps, schedule="wsd", decay_steps=decay, decay_shape=shape)
    assert found[: steps - decay + 1] == [1.0] * (steps - decay + 1)
    assert all(0 < later < earlier for earlier, later in itertools.pairwise(found[steps - decay :]))


# ---------------------------------------------------------------------------------------------------- refusals


def run(**optim: Any) -> RunConfig:
    tree = {
        "run": "r", "model": {"kind": "bert"}, "task": {"kind": "mlm"},
        "data": {"dataset": "d", "text_tokenizer": "v"}, "train": {"steps": 100, "global_batch": 8},
        "optim": {"lr": 1e-3} | optim,
    }  # fmt: skip
    return check_settings(RunConfig, tree, "test")


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"schedule": "wsd", "decay_steps": 101}, r"optim.decay_steps=101 must not exceed the 100 steps"),
        ({"schedule": "wsd", "decay_steps": 51, "warmup_steps": 50}, r"exceed the 50 steps after the warm-up; use at"),
        ({"schedule": "wsd", "decay_steps": 0.6, "warmup_steps": 50}, r"0.6 of train.steps=100 is 60 steps, which"),
        ({"schedule": "wsd", "decay_steps": 0}, r"optim.decay_steps = 0: give a whole number of steps"),
        ({"schedule": "wsd", "decay_steps": -1}, r"whole number of steps, from 1 on, or a share"),
        ({"schedule": "wsd", "decay_steps": 2.5}, r"whole number of steps, from 1 on, or a share"),
        ({"schedule": "wsd", "decay_steps": 1.0}, r"whole number of steps, from 1 on, or a share"),
        ({"schedule": "wsd", "decay_steps": True}, r"whole number of steps, from 1 on, or a share"),
        ({"schedule": "wsd", "decay_steps": "most"}, r"whole number of steps, from 1 on, or a share"),
        ({"schedule": "wsd", "decay_steps": math.inf}, r"whole number of steps, from 1 on, or a share"),
        ({"schedule": "wsd", "decay_shape": "sqrt"}, r"optim.decay_shape"),
        ({"schedule": "cosine_restarts", "cycles": 1}, r"optim.cycles=1 restarts nothing; use 2 or more"),
        ({"schedule": "cosine_restarts", "cycles": 101}, r"leave the first cycle less than one"),
        ({"schedule": "cosine_restarts", "cycles": 7, "cycle_growth": 2}, r"optim.cycles=7, optim.cycle_growth=2: 100"),
        ({"schedule": "cosine_restarts", "cycles": 10**9, "cycle_growth": 2}, r"use fewer cycles, a lower growth"),
        ({"schedule": "cosine_restarts", "cycles": 0}, r"optim.cycles = 0"),
        ({"schedule": "inverse_sqrt"}, r"needs optim.warmup_steps, or optim.timescale_steps"),
        (
            {"schedule": "inverse_sqrt", "timescale_steps": 100},
            r"optim.timescale_steps=100 must be .* below train.steps",
        ),
        ({"schedule": "inverse_sqrt", "timescale_steps": 5, "warmup_steps": 6}, r"at least warmup_steps=6"),
        ({"schedule": "piecewise"}, r"needs optim.pieces, for example \[\[50, 0.1\]\]"),
        ({"schedule": "piecewise", "pieces": [[100, 0.1]]}, r"optim.pieces begin at the steps \[100\]; each must be"),
        ({"schedule": "piecewise", "pieces": [[50, 0.1], [20, 0.01]]}, r"\[50, 20\]; order them"),
        ({"schedule": "piecewise", "pieces": [[50, 0.1], [50, 0.01]]}, r"\[50, 50\]; order them"),
        ({"schedule": "piecewise", "pieces": [[5, 0.1]], "warmup_steps": 6}, r"at least warmup_steps=6"),
        ({"schedule": "piecewise", "pieces": [[5, 0.0]]}, r"optim.pieces.0.1 = 0.0"),
        ({"schedule": "piecewise", "pieces": [[0, 0.1]]}, r"optim.pieces.0.0 = 0"),
        ({"schedule": "constant", "warmup_steps": 100}, r"optim.warmup_steps=100 must be below train.steps=100"),
        ({"schedule": "noam"}, r"optim.schedule = 'noam'"),
    ],
)
def test_a_schedule_that_does_not_fit_the_run_is_refused(tree: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(**tree)


def test_settings_of_another_schedule_are_not_checked() -> None:
    """A role inherits them, and a change of the schedule leaves them in the file."""
    assert run(schedule="cosine", decay_steps=1000, cycles=10**6, pieces=[[9, 1.0], [3, 1.0]]).optim.cycles == 10**6


def test_overrides_give_every_setting_of_a_schedule() -> None:
    words = ["lr=1", "schedule=wsd", "decay_steps=0.25", "decay_shape=1-sqrt", "pieces=[[3, 0.5]]", "cycles=3"]
    found = override_settings(OptimConfig, {}, words, "test")
    assert (found.decay_steps, found.decay_shape, found.pieces, found.cycles) == (0.25, "1-sqrt", ((3, 0.5),), 3)
    assert type(override_settings(OptimConfig, {}, ["lr=1", "decay_steps=20"], "test").decay_steps) is int


def test_a_run_that_does_not_use_the_new_settings_keeps_its_digest() -> None:
    """Roles included. The digest is that of this run before the settings existed."""
    plain = run(roles={})
    assert digest(plain) == "abc7461b1997cb60" == digest(run(decay_steps=0.1))
    assert digest(plain) != digest(run(decay_steps=0.2))
