"""EVALUATIONS: kind of the task -> the figures of a model that it trained."""

from collections.abc import Callable
from typing import NamedTuple

from pretrain.evaluations import means, prompts, reconstruction, retrieval
from pretrain.evaluations.evaluated import Evaluated, Figures


class Evaluation(NamedTuple):
    """figures: computes them. draws: it draws images of captions, so that it reads no codes and --rerank has a use."""

    figures: Callable[[Evaluated], Figures]
    draws: bool = False


EVALUATIONS: dict[str, Evaluation] = {
    "contrastive": Evaluation(retrieval.figures),
    "mlm": Evaluation(means.figures),
    "rtd": Evaluation(means.figures),
    "autoregressive": Evaluation(prompts.figures, draws=True),
    "reconstruction": Evaluation(reconstruction.figures),
}
