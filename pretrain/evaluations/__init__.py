"""EVALUATIONS: `task.kind` -> the evaluation of a model that the task trained."""

from collections.abc import Callable
from typing import NamedTuple

from pretrain.evaluations import classification, means, prompts, reconstruction, retrieval
from pretrain.evaluations.evaluated import Evaluated, Figures


class Evaluation(NamedTuple):
    """figures: computes the metrics. draws: whether it generates images; it then reads no codes and allows --rerank."""

    figures: Callable[[Evaluated], Figures]
    draws: bool = False


EVALUATIONS: dict[str, Evaluation] = {
    "contrastive": Evaluation(retrieval.figures),
    "sigmoid": Evaluation(retrieval.figures),
    "mlm": Evaluation(means.figures),
    "rtd": Evaluation(means.figures),
    "autoregressive": Evaluation(prompts.figures, draws=True),
    "reconstruction": Evaluation(reconstruction.figures),
    "classify": Evaluation(classification.figures),
}
