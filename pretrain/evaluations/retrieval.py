"""Image-text retrieval."""

import itertools
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from data_pipeline.errors import ConfigError
from pretrain.evaluations.evaluated import Batch, Evaluated, Figures, reading, summed
from pretrain.inputs.bad import Usable

CANDIDATES = 64
READ_AT_ONCE = 256


def figures(given: Evaluated, means: Figures) -> Figures:
    """Return recall at 1, the mean of both directions, of every sample within its group.

    A group has up to CANDIDATES samples, of which no two share a caption. A sample that shares one with every other is
    left out.
    """

    def compute(batch: Batch) -> Batch:
        images, texts, *_ = given.model(batch["pixels"], batch["tokens"], batch["eot"])
        recall = retrieval_recall_at_1(images.float(), texts.float())
        return {"recall": torch.tensor(recall * len(images)), "samples": torch.tensor(float(len(images)))}

    with reading(given, "retrieval", given.inputs()) as usable:
        groups = given.kept["groups"] = given.kept.get("groups") or distinct_groups(usable, given.count)
        totals = summed(given.ranks, groups, lambda positions: usable.batch(usable.take(positions)), compute)
    recall = float(totals["recall"] / totals["samples"])
    return {"retrieval_r1": recall, "candidates": CANDIDATES, "groups": len(groups)}


def check(given: Evaluated, name: str) -> None:
    """Raise ConfigError if no two samples have distinct captions."""
    given.kept["groups"] = distinct_groups(Usable(given.stream, given.inputs()), given.count)


def retrieval_recall_at_1(images: Tensor, texts: Tensor) -> float:
    """images, texts float32 [n, D], unit length, row i of both a pair -> recall at 1, mean of both directions."""
    similarity = images @ texts.T
    right = torch.arange(len(images), device=images.device)
    return float(((similarity.argmax(0) == right).float().mean() + (similarity.argmax(1) == right).float().mean()) / 2)


def distinct_groups(usable: Usable, count: int) -> list[np.ndarray]:
    """Split the positions [0, count) into groups of up to CANDIDATES without a common caption, int64 [n] each.

    Every sample joins the first group that has room and none of its captions. Groups of a single sample are left out.
    Raises ConfigError if nothing is left.
    """
    groups: list[list[int]] = []
    having: dict[str, set[int]] = {}  # the groups that have a caption
    free: dict[str, int] = {}  # the first group without it
    roomy = 0  # all groups before this one are full
    for position, texts in _captions(usable, count):
        chosen = max([roomy, *(free.get(text, 0) for text in texts)])
        while chosen < len(groups) and not (_has_room(groups[chosen]) and _is_new(chosen, texts, having)):
            chosen += 1
        groups += [[] for _ in range(chosen + 1 - len(groups))]
        groups[chosen].append(position)
        for text in texts:
            having.setdefault(text, set()).add(chosen)
            free[text] = next(at for at in itertools.count(free.get(text, 0)) if at not in having[text])
        while roomy < len(groups) and not _has_room(groups[roomy]):
            roomy += 1
    found = [np.array(group, np.int64) for group in groups if len(group) > 1]
    if not found:
        raise ConfigError(
            f"{usable.stream.dataset} has no two samples with distinct captions; use another data.evaluation"
        )
    return found


def _captions(usable: Usable, count: int) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Yield the positions [0, count) with the captions of their samples."""
    for start in range(0, count, READ_AT_ONCE):
        positions = np.arange(start, min(start + READ_AT_ONCE, count))
        for position, sample in zip(positions.tolist(), usable.take(positions), strict=True):
            yield position, sample.texts


def _is_new(group: int, texts: tuple[str, ...], having: Mapping[str, set[int]]) -> bool:
    return all(group not in having.get(text, ()) for text in texts)


def _has_room(group: list[int]) -> bool:
    return len(group) < CANDIDATES
