"""Which evaluation in training was the best, and when training ends for want of a better one. Imports no torch."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from data_pipeline.errors import ConfigError
from pretrain.config import RunConfig
from pretrain.schema.tasks import parsed


@dataclasses.dataclass
class Progress:
    """The evaluations made so far. It is saved in checkpoints, so that a resumed run ends at the same step.

    watched: the figure that must improve, as `train.keep_best` names it; empty if there is none. step: of the newest
    evaluation; figures: its results. best, best_step: of `watched`. misses: evaluations since then.
    """

    watched: str = ""
    patience: int = 0
    step: int = -1
    figures: dict[str, float] = dataclasses.field(default_factory=dict)
    best: float | None = None
    best_step: int = -1
    misses: int = 0

    @classmethod
    def of(cls, config: RunConfig) -> "Progress":
        """Return that of a run that has not begun."""
        return cls(config.watched, config.train.patience)

    def note(self, step: int, figures: Mapping[str, float]) -> None:
        """Add the evaluation of a step. Raises ConfigError if it lacks the watched figure."""
        self.step, self.figures = step, dict(figures)
        if not self.watched:
            return
        name, direction = parsed(self.watched)
        if name not in figures:
            raise ConfigError(
                f"train.keep_best={self.watched!r}: the evaluation yields no such figure of these data, but "
                f"{', '.join(figures)}; name one of them"
            )
        value, sign = figures[name], -1 if direction == "max" else 1
        if math.isfinite(value) and (self.best is None or sign * value < sign * self.best):
            self.best, self.best_step, self.misses = value, step, 0
        else:
            self.misses += 1

    @property
    def exhausted(self) -> bool:
        """Whether the last `patience` evaluations brought nothing better."""
        return bool(self.patience) and self.misses >= self.patience

    def told(self) -> str:
        """Return the message of a run that ends here."""
        since = f"not better than {self.best:.6g} of step {self.best_step}" if self.best is not None else "not finite"
        return (
            f"step {self.step}: {parsed(self.watched)[0]} was {since} in {self.misses} evaluations "
            f"(train.patience={self.patience}); training ends here"
        )

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, as JSON."""
        kept = {"watched": self.watched, "step": self.step, "misses": self.misses}
        return kept | ({} if self.best is None else {"best": self.best, "best_step": self.best_step})

    def load(self, state: Mapping[str, Any], other_data: bool = False) -> None:
        """Restore the result of `state`. If another figure or other data are watched now, they count from here on."""
        self.step = state["step"]
        if state["watched"] == self.watched and not other_data:
            self.best, self.best_step = state.get("best"), state.get("best_step", -1)
            self.misses = state["misses"]
