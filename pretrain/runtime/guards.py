"""Numerical guards: a step with a non-finite or unusually large loss or gradient norm does not change the weights.

Each step is judged between backward and update, from the mean loss and the global gradient norm. Both are equal on all
ranks, so all ranks decide alike. With several turns in a step, each turn is judged against its own role's history, and
one refused turn refuses the whole step. The spike rule is OLMo-core's (SkipStepOptimizer): a value above the mean plus
`spike_sigmas` standard deviations of the last `window_steps` accepted steps, once half of that window is filled.
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
    """Judges every step. Its history is saved in checkpoints, so that a resumed run makes the same decisions."""

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
        """(loss, gradient norm) of this step's turns so far, by role."""

    @property
    def may_skip(self) -> bool:
        """Whether a step may be skipped, so that the run continues from the state before it."""
        return "skip" in (self.config.non_finite, self.config.spike)

    def accepts(self, loss: float, norm: float, role: str = MAIN, last: bool = True) -> bool:
        """Return whether this turn's gradient may be applied. Sets `action` and `reason`, final after the last turn."""
        if not self._turns:
            self.action, self.reason = "accept", ""
        if self.action == "accept":
            self.action, self.reason = self._judge(loss, norm, role)
        self._turns[role] = (loss, norm)
        if last:
            self._conclude()
        return self.action == "accept"

    def _conclude(self) -> None:
        """Add an accepted step to the history, or count a refused one."""
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
            self.reason += f", {self.in_a_row} steps in a row were rejected"

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
        """Raise TrainingFault if the last decision was to stop, before anything of that step is saved."""
        if self.action == "stop":
            raise TrainingFault(
                f"step {step}: {self.reason}; the update was not applied. Resume from the last checkpoint with "
                "guards.non_finite=skip or guards.spike=skip (or roll_back), or start again with a lower optim.lr"
            )

    def told(self) -> dict[str, str]:
        """Return the last decision for the step's line in metrics.jsonl; empty if the step was accepted."""
        return {"guard": f"{self.action}: {self.reason}"} if self.reason else {}

    # ----------------------------------------------------------------------------------------- state

    def state(self) -> dict[str, Any]:
        """Return the state as plain JSON; floats are restored bit for bit."""
        accepted = {role: [list(pair) for pair in past] for role, past in self.accepted.items()}
        return {"accepted": accepted, "events": self.events, "in_a_row": self.in_a_row}

    def load(self, state: dict[str, Any]) -> None:
        """Restore everything that `state()` returned."""
        self.remember(state)
        self.events, self.in_a_row = state["events"], state["in_a_row"]

    def remember(self, state: dict[str, Any]) -> None:
        """Restore only the accepted steps. A roll-back takes these from a checkpoint, as they belong to its weights."""
        self.accepted.clear()
        for role, past in state["accepted"].items():
            self.accepted[role].extend((loss, norm) for loss, norm in past)
