"""The save-deadline contract: one step and one save must fit between the stop signal and the kill that follows it.

The launcher passes this lead time in TESSERA_STOP_LEAD_S. A lead shorter than the step and save times measured in the
run is refused before anything starts. A warning may follow before the first step: it is estimated from a trial write
by all ranks at once and from recent step times.
"""

import itertools
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path

from pretrain.runtime.goodput import METRICS, lines_back

LEAD_VARIABLE = "TESSERA_STOP_LEAD_S"
TRIAL_BYTES = 16 * 2**20
RECENT_STEPS = 50
MARGIN = 1.5
"""Safety factor: disks are slower when all ranks write whole checkpoints, and signals may arrive late."""


def lead_s(environment: Mapping[str, str] = os.environ) -> float:
    """Return the seconds from the stop signal to the kill; infinite when TESSERA_STOP_LEAD_S is not set."""
    return float(environment.get(LEAD_VARIABLE, "inf"))


def write_speed(folder: Path) -> float:
    """Measure this process's current write speed to the disk of `folder`, in bytes per second."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f".trial-{os.getpid()}"
    block = os.urandom(2**20)
    began = time.monotonic()
    try:
        with path.open("wb") as file:
            for _ in range(TRIAL_BYTES // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
    finally:
        path.unlink(missing_ok=True)
    return TRIAL_BYTES / (time.monotonic() - began)


def slowest_recent_step_s(run: Path) -> float:
    """Return the longest of the last RECENT_STEPS step times in metrics.jsonl; 0 before the first step."""
    return _slowest(run, "step_s")


def refusal(lead: float, run: Path) -> str:
    """Return the error text if `lead` is shorter than a step and a save measured in `run`; otherwise empty."""
    step_s, save_s = slowest_recent_step_s(run), _slowest(run, "save_s")
    if not save_s or step_s + save_s <= lead:
        return ""
    return (
        f"{lead:g} s lead, but in {run} a step took {step_s:.3g} s and a save {save_s:.3g} s: the kill would come "
        f"before the save is done. Raise signal_lead_s or stop_timeout_s to {math.ceil(MARGIN * (step_s + save_s))}"
    )


def _slowest(run: Path, name: str) -> float:
    rows = itertools.islice(lines_back(run / METRICS), RECENT_STEPS)
    return max((float(row.get(name, 0.0)) for row in rows), default=0.0)


def warning(lead: float, step_s: float, save_bytes: int, speed: float) -> str:
    """Return the warning to print before the first step; empty when the lead is long enough."""
    save_s = MARGIN * save_bytes / speed
    if step_s + save_s <= lead:
        return ""
    known = f"a step takes {step_s:.3g} s" if step_s else "a step's time is unknown yet"
    return (
        f"warning: {lead:g} s lead, a save needs about {save_s:.3g} s ({save_bytes / 1e6:.3g} MB a rank at "
        f"{speed / 1e6:.3g} MB/s, times {MARGIN:g}) and {known}: a stop signal would be followed by a kill before the "
        f"save is done. Raise the lead to {math.ceil(step_s + save_s)} s: signal_lead_s or stop_timeout_s"
    )
