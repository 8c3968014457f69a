"""Where the time went: a run of three attempts told by hand; and the save-deadline contract."""

import json
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launchers.watch import metric_lines, run_status
from pretrain.runtime import deadline
from pretrain.runtime.goodput import (
    ATTEMPTS,
    METRICS,
    PhaseClock,
    append_line,
    goodput,
    lines_back,
    lines_of,
    raw_lines_back,
)
from pretrain.tracking import MetricsLog


def write(path: Path, rows: list[dict[str, Any]], rest: str = "") -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + rest)


def row(
    step: int, attempt: int, at_s: float, step_s: float, waited_s: float = 0.0, stepped_s: float = 0.0
) -> dict[str, Any]:
    times = {"time_ms": int(at_s * 1000), "step_s": step_s, "stepped_s": stepped_s, "waited_s": waited_s}
    return {"step": step, "attempt": attempt, "saved_s": 0.5} | times


def test_each_attempt_s_time_is_accounted_for(tmp_path: Path) -> None:
    """Attempt 0: steps 1 to 4 of 2 s, saved at 2. Killed; 10 s later attempt 1 starts at step 2, with steps 3 to 5."""
    first = [row(step, 0, 105 + 2 * step, 2, waited_s=step, stepped_s=2 * step) for step in (1, 2, 3, 4)]
    second = [row(step, 1, 131 + 2 * step, 2, stepped_s=2 * step - 4) for step in (3, 4, 5)]
    write(tmp_path / METRICS, first)
    began = (tmp_path / METRICS).stat().st_size
    write(tmp_path / METRICS, first + second, rest='{"step": 6')
    starts = [{"attempt": 0, "started": 100, "metrics_at": 0}, {"attempt": 1, "started": 123, "metrics_at": began}]
    never_stepped = {"attempt": 2, "started": 150, "metrics_at": (tmp_path / METRICS).stat().st_size}
    write(tmp_path / ATTEMPTS, [*starts, never_stepped])
    told = goodput(tmp_path)
    assert told["attempts"] == [
        {"attempt": 0, "from_step": 0, "to_step": 4, "lost_steps": 2, "end_ms": 113000, "wall_s": 13, "down_s": 0,
         "start_s": 5, "steps_s": 4, "lost_s": 4, "waited_s": 4, "saved_s": 0.5},
        {"attempt": 1, "from_step": 2, "to_step": 5, "lost_steps": 0, "end_ms": 141000, "wall_s": 28, "down_s": 10,
         "start_s": 12, "steps_s": 6, "lost_s": 0, "waited_s": 0, "saved_s": 0.5},
    ]  # fmt: skip
    assert told["goodput"] == pytest.approx((4 + 6) / (13 + 28))


@given(words=st.lists(st.integers(0, 400)), start=st.integers(0, 20), torn=st.booleans(), block=st.integers(1, 300))
@settings(max_examples=200, deadline=None)
def test_lines_read_backwards_are_the_lines_read_forwards(
    words: list[int], start: int, torn: bool, block: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("lines") / "log"
    write(path, [{"word": "x" * length} for length in words], rest='{"st' if torn else "")
    lines = path.read_bytes().splitlines(keepends=True)
    at = sum(map(len, lines[:start]))
    with mock.patch("pretrain.runtime.goodput.BLOCK", block):
        assert list(raw_lines_back(path, at)) == lines[start:][::-1]
        rows = list(lines_of(path, at))
        assert list(lines_back(path, at)) == rows[::-1] and len(rows) == max(0, len(words) - start)


def test_a_long_run_is_looked_at_from_its_end(tmp_path: Path) -> None:
    """A million steps are hundreds of MB, which no start and no `status` may read."""
    lines = b"".join(json.dumps(row(step, 0, step, 1, stepped_s=step)).encode() + b"\n" for step in range(1, 2001))
    with (tmp_path / METRICS).open("wb") as file:
        for _ in range(200):
            file.write(lines)
        again = file.tell()
        file.write(json.dumps(row(1990, 1, 3000, 1, stepped_s=1)).encode() + b"\n" + b'{"torn')
    starts = [{"attempt": number, "started": 0, "metrics_at": at} for number, at in enumerate((0, again))]
    write(tmp_path / ATTEMPTS, starts)
    write(tmp_path / "config.json", [{"train": {"steps": 4000}}])
    before = bytes_read()
    assert run_status(tmp_path)["step"] == 1990
    assert [attempt["lost_steps"] for attempt in goodput(tmp_path)["attempts"]] == [11, 0]
    assert deadline.slowest_recent_step_s(tmp_path) == 1
    assert [json.loads(line)["step"] for line in metric_lines(tmp_path, 3, follow=False)] == [1999, 2000, 1990]
    MetricsLog(tmp_path).close()
    assert bytes_read() - before < 4 << 20 < again
    assert (tmp_path / METRICS).read_bytes().endswith(b"}\n")


def bytes_read() -> int:
    """By this process so far, from files whether cached or not."""
    return int(Path("/proc/self/io").read_text().split()[1])


@pytest.mark.parametrize("torn", ["", "{", '{"attempt": 1, "sta', '{"attempt": 1, "started": 2}'])
def test_a_line_appended_behind_a_torn_one_is_whole(torn: str, tmp_path: Path) -> None:
    """Killed, or out of room, in the middle of a write: only that line is lost, and no reader stumbles."""
    write(tmp_path / ATTEMPTS, [{"attempt": 0}], rest=torn)
    append_line(tmp_path / ATTEMPTS, {"attempt": 2})
    append_line(tmp_path / ATTEMPTS, {"attempt": 3})
    whole = [1] if torn.endswith("}") else []
    assert [line["attempt"] for line in lines_of(tmp_path / ATTEMPTS)] == [0, *whole, 2, 3]
    assert "\n\n" not in (tmp_path / ATTEMPTS).read_text()


def test_a_torn_line_that_another_was_appended_to_is_passed_over(tmp_path: Path) -> None:
    """As earlier versions left it."""
    write(tmp_path / ATTEMPTS, [{"attempt": 0}], rest='{"attempt": 1, "sta{"attempt": 2}\n{"attempt": 3}\n')
    assert [line["attempt"] for line in lines_of(tmp_path / ATTEMPTS)] == [0, 3]


def test_a_run_without_steps_has_none(tmp_path: Path) -> None:
    assert goodput(tmp_path) == {"goodput": 0.0, "attempts": []}


def test_the_clock_adds_up_what_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 5.0, 7.0, 8.0, 12.0])
    monkeypatch.setattr("pretrain.runtime.goodput.time.monotonic", lambda: next(now))
    clock = PhaseClock()
    for phase in ("step", "save", "step", "save"):
        clock.enter(phase)
    assert clock.seconds == {"start": 5.0, "step": 6.0, "save": 1.0}
    assert (clock.phase, clock.since, clock.spent("wait")) == ("save", 12.0, 0.0)


# -------------------------------------------------------------------------------------- the save-deadline contract


@pytest.mark.parametrize(
    ("lead", "step_s", "megabytes", "speed", "warned"),
    [
        (300, 5.0, 1000, 100e6, ""),
        (120, 5.0, 14000, 100e6, "120 s lead, a save needs about 210 s .*a step takes 5 s.* to 215 s"),
        (10, 0.0, 2000, 100e6, "a step's time is unknown yet"),
        (10, 20.0, 1, 100e6, "a step takes 20 s"),
        (float("inf"), 1e9, 10**9, 1.0, ""),
    ],
)
def test_the_warning_comes_when_step_and_save_do_not_fit(
    lead: float, step_s: float, megabytes: int, speed: float, warned: str
) -> None:
    import re

    text = deadline.warning(lead, step_s, megabytes * 10**6, speed)
    assert bool(text) == bool(warned)
    assert re.search(warned, text)


def test_the_lead_is_what_the_launcher_said() -> None:
    assert deadline.lead_s({deadline.LEAD_VARIABLE: "120"}) == 120
    assert deadline.lead_s({}) == float("inf")


def test_a_trial_write_leaves_nothing_behind(tmp_path: Path) -> None:
    assert deadline.write_speed(tmp_path / "run") > 0
    assert list((tmp_path / "run").iterdir()) == []


def test_the_slowest_of_the_recent_steps_counts(tmp_path: Path) -> None:
    assert deadline.slowest_recent_step_s(tmp_path) == 0
    write(tmp_path / METRICS, [row(step, 0, step, 100 if step == 1 else step / 10) for step in range(1, 70)])
    assert deadline.slowest_recent_step_s(tmp_path) == pytest.approx(6.9)


def test_a_line_of_many_blocks_is_read_in_time_that_grows_with_its_length(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [b"first\n", b"x" * (32 << 20) + b"\n", b"last\n"]
    path.write_bytes(b"".join(lines))
    began = time.process_time()
    assert list(raw_lines_back(path)) == lines[::-1]
    assert time.process_time() - began < 2  # joined anew at every block, it takes 8 s
