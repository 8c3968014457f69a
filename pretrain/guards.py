"""Numerical guards: a step whose loss or gradient is not finite, or far above its like, does not touch the weights.

The judgement is made between backward and update, from the mean loss and the global gradient norm, which are the same
numbers on every rank; so is what follows. The rule for a spike is OLMo-core's (SkipStepOptimizer): above the mean plus
`spike_sigmas` standard deviations of the last `window_steps` accepted steps, once half of them are there.
"""

import math
import statistics
from collections import deque
from typing import Any, Literal

from data_pipeline.errors import TrainingFault
from pretrain.config import GuardsConfig

Action = Literal["accept", "skip", "roll_back", "stop"]


class Guards:
    """Judges every step. What it remembers is part of a checkpoint, so that a continued run judges alike."""

    def __init__(self, config: GuardsConfig) -> None:
        self.config = config
        self.accepted: deque[tuple[float, float]] = deque(maxlen=config.window_steps)
        """(loss, gradient norm) of the last accepted steps."""
        self.events = 0
        """Refused steps in the whole run."""
        self.in_a_row = 0
        self.action: Action = "accept"
        self.reason = ""

    def accepts(self, loss: float, norm: float) -> bool:
        """May this step's gradient be applied? Sets `action` and `reason`."""
        self.action, self.reason = self._judge(loss, norm)
        if self.action == "accept":
            self.accepted.append((loss, norm))
            self.in_a_row = 0
            return True
        self.events += 1
        self.in_a_row += 1
        if self.in_a_row > self.config.patience_steps:
            self.action = "stop"
            self.reason += f", {self.in_a_row} steps in a row were refused"
        return False

    def _judge(self, loss: float, norm: float) -> tuple[Action, str]:
        values = {"loss": loss, "gradient norm": norm}
        for name, value in values.items():
            if not math.isfinite(value):
                return self.config.non_finite, f"{name} {value}"
        if self.config.spike == "ignore" or 2 * len(self.accepted) < self.config.window_steps:
            return "accept", ""
        for (name, value), past in zip(values.items(), zip(*self.accepted, strict=True), strict=True):
            limit = statistics.fmean(past) + self.config.spike_sigmas * statistics.pstdev(past)
            if value > limit:
                return self.config.spike, f"{name} {value:.6g} above {limit:.6g}"
        return "accept", ""

    def refuse_to_go_on(self, step: int) -> None:
        """Raises TrainingFault where the last judgement was to stop, before anything of that step was applied."""
        if self.action == "stop":
            raise TrainingFault(
                f"step {step}: {self.reason}; the weights are those of the step before. Go on from the last checkpoint "
                "with guards.non_finite=skip or guards.spike=skip (or roll_back), or start again with a lower optim.lr"
            )

    def told(self) -> dict[str, str]:
        """The last judgement for the step's line in metrics.jsonl; nothing where the step was accepted."""
        return {"guard": f"{self.action}: {self.reason}"} if self.reason else {}

    # ------------------------------------------------------------------------------------- its state

    def state(self) -> dict[str, Any]:
        """Plain JSON; floats come back bit for bit."""
        return {"accepted": [list(pair) for pair in self.accepted], "events": self.events, "in_a_row": self.in_a_row}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from `state()`."""
        self.remember(state)
        self.events, self.in_a_row = state["events"], state["in_a_row"]

    def remember(self, state: dict[str, Any]) -> None:
        """Only the accepted steps: what a roll-back takes over from a checkpoint, whose weights they belong to."""
        self.accepted.clear()
        self.accepted.extend((loss, norm) for loss, norm in state["accepted"])
