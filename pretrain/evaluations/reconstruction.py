"""Evaluation of an image tokenizer's reconstructions."""

import torch
from torch import Tensor

from pretrain.evaluations.evaluated import Batch, Evaluated, Figures, balanced, reading
from pretrain.runtime.show import grid

SHOWN = 16


def figures(given: Evaluated, means: Figures) -> Figures:
    """Return the mean PSNR per image in dB under its own name; draw the first images."""
    given.pictures["reconstructions"] = grid(_first(given))
    return {"reconstruction_psnr": means["psnr"]}


def _first(given: Evaluated) -> Tensor:
    """Return the first images and their reconstructions, float32 [2 n, 3, S, S] in [-1, 1]."""
    [positions, *_] = balanced(min(given.count, SHOWN), SHOWN)
    with reading(given, "pictures", given.inputs()) as usable:
        batch = usable.batch(usable.take(positions))

    def drawn(batch: Batch) -> Batch:
        return {"drawn": given.model(batch["pixels"])[0].float().clamp(-1, 1)}

    return torch.cat([batch["pixels"], given.ranks.run(drawn, batch)["drawn"]])
