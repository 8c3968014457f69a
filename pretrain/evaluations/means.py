"""Evaluation by the task's own losses and metrics."""

import torch

from pretrain.evaluations.evaluated import Evaluated, Figures, batches, reading
from pretrain.tasks import TASKS
from pretrain.tasks.collectives import ONE_DEVICE


def figures(given: Evaluated) -> Figures:
    """Return the mean of each loss and metric over the batches of up to SAMPLES samples."""
    config = given.config
    task = TASKS[config.task.kind](given.model, config.task, ONE_DEVICE).eval()
    torch.manual_seed(config.seed)
    rows = []
    with torch.no_grad(), reading(given.stream, given.inputs(), given.folder) as usable:
        for batch in batches(usable):
            rows.append(task(batch | {"step": torch.tensor(0)}))
    return {name: float(torch.stack([row[name].double().reshape(()) for row in rows]).mean()) for name in rows[0]}
