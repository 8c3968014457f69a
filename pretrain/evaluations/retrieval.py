"""Image-text retrieval."""

import numpy as np
import torch
from torch import Tensor

from data_pipeline.errors import ConfigError
from data_pipeline.schema import Sample
from pretrain.evaluations.evaluated import Evaluated, Figures, reading
from pretrain.inputs.bad import Usable

CANDIDATES = 64


def figures(given: Evaluated) -> Figures:
    """Return recall at 1, the mean of both directions, averaged over groups of CANDIDATES pairs."""
    inputs, scores = given.inputs(), []
    with reading(given.stream, inputs, given.folder) as usable:
        groups = _distinct_groups(usable)
    for samples in groups:
        batch = inputs(samples)
        with torch.no_grad():
            images, texts, *_ = given.model(batch["pixels"], batch["tokens"], batch["eot"])
        scores.append(retrieval_recall_at_1(images.float(), texts.float()))
    return {"retrieval_r1": float(np.mean(scores)), "candidates": CANDIDATES, "groups": len(scores)}


def retrieval_recall_at_1(images: Tensor, texts: Tensor) -> float:
    """images, texts float32 [n, D], unit length, row i of both a pair -> recall at 1, mean of both directions."""
    similarity = images @ texts.T
    right = torch.arange(len(images))
    return float(((similarity.argmax(0) == right).float().mean() + (similarity.argmax(1) == right).float().mean()) / 2)


def _distinct_groups(usable: Usable, groups: int = 4) -> list[list[Sample]]:
    """Return up to `groups` groups of CANDIDATES samples, no two of a group sharing a caption."""
    found: list[list[Sample]] = [[]]
    seen: set[str] = set()
    for position in range(min(usable.stream.samples, 20 * groups * CANDIDATES)):
        (sample,) = usable.checked(usable.take(np.array([position])))
        if seen.isdisjoint(sample.texts):
            seen.update(sample.texts)
            found[-1].append(sample)
        if len(found[-1]) == CANDIDATES:
            if len(found) == groups:
                return found
            found.append([])
            seen = set()
    whole = [group for group in found if len(group) == CANDIDATES]
    if not whole:
        raise ConfigError(
            f"{usable.stream.dataset} has no {CANDIDATES} samples with distinct captions; use a larger data.evaluation"
        )
    return whole
