"""EVALUATIONS: `task.kind` -> the evaluation of a model that the task trained."""

from collections.abc import Callable
from typing import NamedTuple

from pretrain.evaluations import classification, means, prompts, reconstruction, retrieval
from pretrain.evaluations.evaluated import Evaluated, Figures


def _none(given: Evaluated, means: Figures) -> Figures:
    """Compute nothing beside the means."""
    return {}


def _fits(given: Evaluated, name: str) -> None:
    """Accept any data that the task can read."""


class Evaluation(NamedTuple):
    """What is evaluated of a task, besides the means of its losses and metrics.

    own: computes further figures, given the means. check: raises ConfigError, before the first step, for data that
    `own` cannot use; it gets the name of the data. draws: whether it generates images; without image codes only the
    means are left out, and --rerank is allowed.
    """

    own: Callable[[Evaluated, Figures], Figures] = _none
    check: Callable[[Evaluated, str], None] = _fits
    draws: bool = False

    def figures(self, given: Evaluated) -> Figures:
        """Return all figures of a model on the given data."""
        found = means.figures(given) if given.with_codes else {}
        return found | self.own(given, found)


EVALUATIONS: dict[str, Evaluation] = {
    "contrastive": Evaluation(retrieval.figures, retrieval.check),
    "sigmoid": Evaluation(retrieval.figures, retrieval.check),
    "mlm": Evaluation(),
    "rtd": Evaluation(),
    "autoregressive": Evaluation(prompts.figures, prompts.check, draws=True),
    "reconstruction": Evaluation(reconstruction.figures),
    "classify": Evaluation(classification.figures),
}
