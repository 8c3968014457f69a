"""Classification accuracy over every sample of the evaluation data."""

import torch
from torch import Tensor

from pretrain.evaluations import evaluated
from pretrain.evaluations.evaluated import Batch, Evaluated, Figures, balanced, reading, summed

TOP = 5


def figures(given: Evaluated, means: Figures) -> Figures:
    """Return top-1 and top-5 accuracy, and the number of samples: each sample counts once, to the last."""

    def compute(batch: Batch) -> Batch:
        return {"right": hits(given.model(batch["pixels"]), batch["label"])}

    groups = balanced(given.count, evaluated.BATCH)
    with reading(given, "classification", given.inputs()) as usable:
        totals = summed(given.ranks, groups, lambda positions: usable.batch(usable.take(positions)), compute)
    top_1, top_5 = (totals["right"] / given.count).tolist()
    return {"top_1": top_1, "top_5": top_5, "samples": given.count}


def hits(logits: Tensor, labels: Tensor) -> Tensor:
    """logits [n, classes], labels int64 [n] -> int64 [2], the labels that are the likeliest, among the TOP likeliest.

    A class is likelier where its logit is larger, or equal and its number lower.
    """
    own = logits.gather(1, labels[:, None])
    equal = (logits == own) & (torch.arange(logits.shape[1], device=logits.device) < labels[:, None])
    rank = ((logits > own) | equal).sum(1)
    return torch.stack([(rank == 0).sum(), (rank < TOP).sum()])
