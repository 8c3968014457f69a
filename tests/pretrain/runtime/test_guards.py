"""The guards against a loop over all of a run's history, and whole runs whose numbers are made to blow up."""

import itertools
import json
import math
import statistics
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from data_pipeline.errors import NodeFault, TrainingFault
from pretrain.config import GuardsConfig
from pretrain.runtime.guards import Guards
from pretrain.train import Run

NAN, INF = math.nan, math.inf


def guards(**settings: Any) -> Guards:
    return Guards(GuardsConfig(**settings))


def by_hand(history: list[tuple[float, float]], window: int, sigmas: float) -> list[bool]:
    """Accepted or not, from the definition: each step against the accepted ones before it."""
    accepted: list[tuple[float, float]] = []
    verdicts = []
    for step in history:
        past = accepted[-window:]
        fine = all(map(math.isfinite, step))
        if fine and len(past) >= window / 2:
            for column in (0, 1):
                values = [pair[column] for pair in past]
                fine &= step[column] <= statistics.fmean(values) + sigmas * statistics.pstdev(values)
        verdicts.append(fine)
        if fine:
            accepted.append(step)
    return verdicts


@pytest.mark.parametrize(
    ("loss", "norm", "settings", "action"),
    [
        (1.0, 1.0, {}, "accept"),
        (NAN, 1.0, {}, "stop"),
        (1.0, INF, {}, "stop"),
        (-INF, 1.0, {"non_finite": "skip"}, "skip"),
        (1.0, NAN, {"non_finite": "roll_back"}, "roll_back"),
        (1e9, 1e9, {"spike": "skip"}, "accept"),  # nothing to compare it with yet
    ],
)
def test_the_first_step_is_judged_by_its_numbers_alone(
    loss: float, norm: float, settings: dict[str, Any], action: str
) -> None:
    judge = guards(**settings)
    assert judge.accepts(loss, norm) == (action == "accept")
    assert judge.action == action
    assert bool(judge.told()) == (action != "accept")


@pytest.mark.parametrize("seed", range(5))
def test_spikes_are_those_of_the_definition(seed: int) -> None:
    draw = np.random.default_rng(seed)
    history = [(float(a), float(b)) for a, b in draw.normal(5, 1, (300, 2))]
    for at in draw.integers(20, 300, 12):
        history[at] = (
            history[at][0] + float(draw.choice([0, 4, 30, NAN])),
            history[at][1] * float(draw.choice([1, 9])),
        )
    judge = guards(spike="skip", non_finite="skip", window_steps=32, spike_sigmas=4)
    assert [judge.accepts(*step) for step in history] == by_hand(history, 32, 4)
    assert judge.events == by_hand(history, 32, 4).count(False) > 0


def test_a_run_continued_from_any_step_judges_alike() -> None:
    history = [(math.sin(step) + (50 if step % 37 == 30 else 0), 1 + math.cos(step)) for step in range(150)]
    whole = guards(spike="skip", window_steps=16)
    expected = [whole.accepts(*step) for step in history]
    for stop in range(0, 150, 7):
        before = guards(spike="skip", window_steps=16)
        first = [before.accepts(*step) for step in history[:stop]]
        after = guards(spike="skip", window_steps=16)
        after.load(json.loads(json.dumps(before.state())))
        assert first + [after.accepts(*step) for step in history[stop:]] == expected
        assert after.state() == whole.state()


def test_too_many_refused_steps_in_a_row_stop_the_run() -> None:
    judge = guards(non_finite="skip", patience_steps=3)
    judge.accepts(1.0, 1.0)
    actions = []
    for _ in range(4):
        judge.accepts(NAN, 1.0)
        actions.append(judge.action)
    assert actions == ["skip", "skip", "skip", "stop"]
    with pytest.raises(
        TrainingFault, match=r"step 7: loss nan, 4 steps in a row were rejected.*guards\.non_finite=skip"
    ):
        judge.refuse_to_go_on(7)


def test_one_accepted_step_starts_the_count_again() -> None:
    judge = guards(non_finite="skip", patience_steps=2)
    for loss in itertools.islice(itertools.cycle([NAN, NAN, 1.0]), 30):
        judge.accepts(loss, 1.0)
        judge.refuse_to_go_on(1)
    assert judge.events == 20


def test_a_step_of_turns_is_refused_whole_and_each_turn_is_judged_by_its_own_past() -> None:
    judge = guards(spike="skip", window_steps=4, spike_sigmas=3)
    for loss in (10.0, 11.0, 10.5):
        assert judge.accepts(loss, 1.0, last=False) and judge.accepts(loss / 1000, 1.0, "judge")
    known = judge.state()
    assert judge.accepts(10.2, 1.0, last=False) and not judge.accepts(5.0, 1.0, "judge")  # 5 is no spike of main's
    assert judge.told()["guard"].startswith("skip: judge loss 5 above")
    assert not judge.accepts(500.0, 1.0, last=False) and not judge.accepts(0.0105, 1.0, "judge")
    assert judge.told()["guard"].startswith("skip: loss 500 above")
    assert (judge.events, judge.in_a_row) == (2, 2)
    assert judge.state()["accepted"] == known["accepted"]  # not even the turn that was fine is remembered
    assert judge.accepts(10.3, 1.0, last=False) and judge.accepts(0.0103, 1.0, "judge") and judge.in_a_row == 0


def test_ranks_that_do_not_judge_alike_end_the_run() -> None:
    """One of them computes wrongly, whatever it computed."""

    def agreed(mine: int, others: int) -> bool:
        judge = guards()
        judge.events = mine
        there = [0, others, -others, 0]
        mesh = SimpleNamespace(maximum=lambda here: [max(pair) for pair in zip(here, there, strict=True)])
        run: Any = SimpleNamespace(mesh=mesh, guards=judge, step=7, checkpoints=SimpleNamespace(overtaken=""))
        return Run.agree(run, 0)

    assert not agreed(3, 3)
    with pytest.raises(NodeFault, match="step 7: ranks rejected 2 to 3 steps"):
        agreed(2, 3)


def test_a_roll_back_takes_over_the_checkpoint_s_past_but_not_its_count() -> None:
    judge = guards(non_finite="roll_back", window_steps=4)
    judge.accepts(1.0, 2.0)
    saved = judge.state()
    judge.accepts(3.0, 4.0)
    judge.accepts(NAN, 1.0)
    judge.remember(saved)
    assert list(judge.accepted["main"]) == [(1.0, 2.0)]
    assert (judge.events, judge.in_a_row) == (1, 1)


@pytest.mark.parametrize(("window", "needed"), [(2, 1), (4, 2), (5, 3), (6, 3)])
def test_a_spike_is_one_from_half_a_window_of_accepted_steps_on(window: int, needed: int) -> None:
    judge = guards(spike="skip", window_steps=window, spike_sigmas=3)
    for _ in range(needed - 1):
        judge.accepts(1.0, 1.0)
    assert judge.accepts(1.0, 1.0) and not judge.accepts(1.5, 1.0) and not judge.accepts(1.0, 1.5)
    if needed > 1:
        fewer = guards(spike="skip", window_steps=window, spike_sigmas=3)
        for _ in range(needed - 1):
            fewer.accepts(1.0, 1.0)
        assert fewer.accepts(9.0, 9.0)


def test_a_step_at_the_limit_itself_is_accepted() -> None:
    """Past 1 and 3: mean 2, deviation 1; two sigmas above is 4."""
    for loss, fine in ((4.0, True), (math.nextafter(4.0, 5.0), False)):
        judge = guards(spike="skip", window_steps=2, spike_sigmas=2)
        judge.accepts(1.0, 1.0)
        judge.load({"accepted": {"main": [(1.0, 1.0), (3.0, 1.0)]}, "events": 0, "in_a_row": 0})
        assert judge.accepts(loss, 1.0) == fine
        assert (judge.events, judge.in_a_row) == (0 if fine else 1, 0 if fine else 1)


@pytest.mark.parametrize(
    ("settings", "may"),
    [
        ({}, False), ({"non_finite": "skip"}, True), ({"spike": "skip"}, True),
        ({"non_finite": "roll_back", "spike": "stop"}, False),
    ],
)  # fmt: skip
def test_a_step_may_be_left_out_where_a_guard_skips(settings: dict[str, Any], may: bool) -> None:
    assert guards(**settings).may_skip == may


def test_nothing_was_judged_yet() -> None:
    judge = guards()
    assert (judge.action, judge.reason, judge.told()) == ("accept", "", {})
    assert judge.state() == {"accepted": {}, "events": 0, "in_a_row": 0}
    judge.refuse_to_go_on(1)


@pytest.mark.parametrize(
    ("settings", "turns", "told"),
    [
        ({}, [(NAN, 1.0, "main")], "stop: loss nan"),
        ({}, [(1.0, -INF, "main")], "stop: gradient norm -inf"),
        ({"non_finite": "skip"}, [(NAN, INF, "judge")], "skip: judge loss nan"),
        ({"non_finite": "roll_back"}, [(1.0, 1.0, "main"), (1.0, INF, "judge")], "roll_back: judge gradient norm inf"),
        ({"non_finite": "skip"}, [(INF, 1.0, "main"), (NAN, 1.0, "judge"), (1.0, 1.0, "third")], "skip: loss inf"),
        ({"spike": "stop"}, [(2.5, 1.0, "main")], "stop: loss 2.5 above 2"),
        ({"spike": "roll_back"}, [(2.0, 1.0 + 2e-9, "main")], "roll_back: gradient norm 1 above 1"),
        ({"spike": "skip"}, [(1.0, 1234567.0, "main")], "skip: gradient norm 1.23457e+06 above 1"),
        ({"spike": "ignore"}, [(99.0, 99.0, "main")], None),
        ({"spike": "skip"}, [(99.0, 99.0, "judge")], None),  # which has no past
    ],
)
def test_a_refusal_names_the_role_the_number_and_the_limit(
    settings: dict[str, Any], turns: list[tuple[float, float, str]], told: str | None
) -> None:
    """The past of main: losses 2, norms 1."""
    judge = guards(window_steps=4, **settings)
    judge.load({"accepted": {"main": [[2.0, 1.0]] * 3}, "events": 5, "in_a_row": 0})
    for number, (loss, norm, role) in enumerate(turns, 1):
        judge.accepts(loss, norm, role, last=number == len(turns))
    assert judge.told() == ({"guard": told} if told else {})
    assert (judge.events, judge.in_a_row) == ((6, 1) if told else (5, 0))
    assert judge.accepts(1.5, 0.5) and judge.told() == {} and judge.in_a_row == 0


def test_only_a_stop_ends_the_run_and_says_what_to_do() -> None:
    for action in ("skip", "roll_back"):
        judge = guards(non_finite=action)
        judge.accepts(NAN, 1.0)
        judge.refuse_to_go_on(3)
    judge = guards()
    judge.accepts(NAN, 1.0)
    with pytest.raises(TrainingFault) as caught:
        judge.refuse_to_go_on(3)
    assert str(caught.value) == (
        "step 3: loss nan; the update was not applied. Resume from the last checkpoint with guards.non_finite=skip or "
        "guards.spike=skip (or roll_back), or start again with a lower optim.lr"
    )


def test_a_window_of_steps_is_remembered_for_each_role() -> None:
    judge = guards(window_steps=3)
    for step in range(5):
        judge.accepts(step, 10.0 * step, last=False)
        judge.accepts(-step, 0.5, "judge")
    past = {"main": [[2, 20.0], [3, 30.0], [4, 40.0]], "judge": [[-2, 0.5], [-3, 0.5], [-4, 0.5]]}
    assert judge.state() == {"accepted": past, "events": 0, "in_a_row": 0}
    judge.load({"accepted": {"judge": [[9.0, 9.0]] * 4}, "events": 7, "in_a_row": 2})
    assert judge.state() == {"accepted": {"judge": [[9.0, 9.0]] * 3}, "events": 7, "in_a_row": 2}
