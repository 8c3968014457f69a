"""Evaluation by the task's own losses and metrics."""

from pretrain.evaluations import evaluated
from pretrain.evaluations.evaluated import Evaluated, Figures, balanced, reading, summed


def figures(given: Evaluated) -> Figures:
    """Return the mean of each loss and metric over the data."""
    groups = balanced(given.count, evaluated.BATCH)
    with reading(given, "means", given.inputs()) as usable:
        totals = summed(given.ranks, groups, lambda positions: usable.batch(usable.take(positions)), given.task.totals)
    return given.task.means(totals)
