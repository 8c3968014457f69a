"""Classification accuracy over every sample of the evaluation data."""

import numpy as np
import torch
from torch import Tensor

from pretrain.evaluations import evaluated
from pretrain.evaluations.evaluated import Evaluated, Figures, reading

TOP = 5


def figures(given: Evaluated) -> Figures:
    """Return top-1 and top-5 accuracy, and the number of samples: each sample counts once, to the last."""
    right = torch.zeros(2, dtype=torch.int64)
    samples = given.stream.samples
    with torch.no_grad(), reading(given.stream, given.inputs(), given.folder) as usable:
        for start in range(0, samples, evaluated.BATCH):
            batch = usable.batch(usable.take(np.arange(start, min(start + evaluated.BATCH, samples))))
            right += hits(given.model(batch["pixels"]), batch["label"])
    top_1, top_5 = (right.double() / samples).tolist()
    return {"top_1": top_1, "top_5": top_5, "samples": samples}


def hits(logits: Tensor, labels: Tensor) -> Tensor:
    """logits [n, classes], labels int64 [n] -> int64 [2], the labels that are the likeliest, among the TOP likeliest.

    A class is likelier where its logit is larger, or equal and its number lower.
    """
    own = logits.gather(1, labels[:, None])
    equal = (logits == own) & (torch.arange(logits.shape[1]) < labels[:, None])
    rank = ((logits > own) | equal).sum(1)
    return torch.stack([(rank == 0).sum(), (rank < TOP).sum()])
