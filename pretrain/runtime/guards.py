"""Numerical guards: a step whose loss or gradient is not finite, or far above its like, does not touch the weights.

The judgement is made between backward and update, from the mean loss and the global gradient norm, which are the same
numbers on every rank; so is what follows. Where several optimizers take turns in a step, each turn is judged against
its own past, and one that is refused refuses the whole step. The rule for a spike is OLMo-core's (SkipStepOptimizer):
above the mean plus `spike_sigmas` standard deviations of the last `window_steps` accepted steps, once half of them are
there.
"""

import math
import statistics
from collections import defaultdict, deque
from typing import Any, Literal

from data_pipeline.errors import TrainingFault
from pretrain.config import GuardsConfig
from pretrain.schema.common import MAIN

Action = Literal["accept", "skip", "roll_back", "stop"]
Past = deque[tuple[float, float]]


class Guards:
    """Judges every step. What it remembers is part of a checkpoint, so that a continued run judges alike."""

    def __init__(self, config: GuardsConfig) -> None:
        self.config = config
        self.accepted: dict[str, Past] = defaultdict(lambda: deque(maxlen=config.window_steps))
        """(loss, gradient norm) of the last accepted steps, by role."""
        self.events = 0
        """Refused steps in the whole run."""
        self.in_a_row = 0
        self.action: Action = "accept"
        self.reason = ""
        self._turns: dict[str, tuple[float, float]] = {}
        """What this step's turns so far have shown."""

    @property
    def may_skip(self) -> bool:
        """Can a step be left out and the run go on from what was before it?"""
        return "skip" in (self.config.non_finite, self.config.spike)

    def accepts(self, loss: float, norm: float, role: str = MAIN, last: bool = True) -> bool:
        """May this turn's gradient be applied? Sets `action` and `reason`; with the last turn they are the step's."""
        if not self._turns:
            self.action, self.reason = "accept", ""
        if self.action == "accept":
            self.action, self.reason = self._judge(loss, norm, role)
        self._turns[role] = (loss, norm)
        if last:
            self._conclude()
        return self.action == "accept"

    def _conclude(self) -> None:
        """Remember an accepted step, count a refused one."""
        turns, self._turns = self._turns, {}
        if self.action == "accept":
            for role, pair in turns.items():
                self.accepted[role].append(pair)
            self.in_a_row = 0
            return
        self.events += 1
        self.in_a_row += 1
        if self.in_a_row > self.config.patience_steps:
            self.action = "stop"
            self.reason += f", {self.in_a_row} steps in a row were refused"

    def _judge(self, loss: float, norm: float, role: str) -> tuple[Action, str]:
        values = {"loss": loss, "gradient norm": norm}
        whose = "" if role == MAIN else f"{role} "
        for name, value in values.items():
            if not math.isfinite(value):
                return self.config.non_finite, f"{whose}{name} {value}"
        accepted = self.accepted[role]
        if self.config.spike == "ignore" or 2 * len(accepted) < self.config.window_steps:
            return "accept", ""
        for (name, value), past in zip(values.items(), zip(*accepted, strict=True), strict=True):
            limit = statistics.fmean(past) + self.config.spike_sigmas * statistics.pstdev(past)
            if value > limit:
                return self.config.spike, f"{whose}{name} {value:.6g} above {limit:.6g}"
        return "accept", ""

    def refuse_to_go_on(self, step: int) -> None:
        """Raises TrainingFault where the last judgement was to stop, before anything of that step is saved."""
        if self.action == "stop":
            raise TrainingFault(
                f"step {step}: {self.reason}; the update was not made. Go on from the last checkpoint with "
                "guards.non_finite=skip or guards.spike=skip (or roll_back), or start again with a lower optim.lr"
            )

    def told(self) -> dict[str, str]:
        """The last judgement for the step's line in metrics.jsonl; nothing where the step was accepted."""
        return {"guard": f"{self.action}: {self.reason}"} if self.reason else {}

    # ------------------------------------------------------------------------------------- its state

    def state(self) -> dict[str, Any]:
        """Plain JSON; floats come back bit for bit."""
        accepted = {role: [list(pair) for pair in past] for role, past in self.accepted.items()}
        return {"accepted": accepted, "events": self.events, "in_a_row": self.in_a_row}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from `state()`."""
        self.remember(state)
        self.events, self.in_a_row = state["events"], state["in_a_row"]

    def remember(self, state: dict[str, Any]) -> None:
        """Only the accepted steps: what a roll-back takes over from a checkpoint, whose weights they belong to."""
        self.accepted.clear()
        for role, past in state["accepted"].items():
            self.accepted[role].extend((loss, norm) for loss, norm in past)
