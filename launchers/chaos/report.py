"""Cost of the strikes of a campaign, and its JSON record."""

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launchers.chaos.campaign import MARKER, Campaign, Event
from pretrain.runtime.goodput import ATTEMPTS, goodput, lines_of, steps_of


def figures(campaign: Campaign) -> dict[str, Any]:
    """Return the cost of the strikes in seconds (median and longest) and steps, and their counts by kind."""
    rows = list(steps_of(campaign.struck))
    starts = {line["attempt"]: line["started"] for line in lines_of(campaign.struck / ATTEMPTS)}
    firsts: dict[int, dict[str, Any]] = {}
    for row in rows:
        firsts.setdefault(row["attempt"], row)
    ended = [event for event in campaign.events if event.code is not None]
    next_step = [after - event.struck_at for event in ended for after in _next(rows, event)]
    first_step = [row["time_ms"] / 1000 - starts[attempt] for attempt, row in firsts.items() if attempt in starts]
    noticed = [event.ended_at - event.struck_at for event in ended if event.strike.whom == "freeze"]
    named = {"kill_to_next_step": next_step, "start_to_first_step": first_step, "freeze_to_end": noticed}
    told: dict[str, Any] = {}
    for name, values in named.items():
        if values:
            told |= {f"{name}_median_s": sorted(values)[len(values) // 2], f"{name}_longest_s": max(values)}
    told["steps_made_again"] = len(rows) - len({row["step"] for row in rows})
    told["goodput"] = goodput(campaign.struck)["goodput"]
    told["goodput_undisturbed"] = goodput(campaign.reference)["goodput"]
    return {name: round(value, 3) for name, value in told.items()} | {"dealt": dealt(campaign)}


def _next(rows: list[dict[str, Any]], event: Event) -> Iterator[float]:
    """Yield the time of the first step after the end of a struck attempt, if there is one."""
    after = [row["time_ms"] / 1000 for row in rows if row["time_ms"] / 1000 > event.ended_at]
    yield from after[:1]


def dealt(campaign: Campaign) -> dict[str, int]:
    """Count the strikes by kind, point and damage."""
    strikes = [event.strike for event in campaign.events]
    counts: Counter[str] = Counter(strike.fault or strike.whom for strike in strikes)
    counts.update(f"at {strike.when}" for strike in strikes)
    counts.update(event.strike.damage for event in campaign.events if event.damaged)
    return dict(sorted(counts.items()))


def write_report(campaign: Campaign, told: dict[str, Any]) -> Path:
    """Write all events and figures as JSON and return the path."""
    path = campaign.struck.parent / MARKER
    events = [dataclasses.asdict(event) for event in campaign.events]
    path.write_text(json.dumps(told | {"events": events}, indent=1) + "\n", encoding="utf-8")
    return path
