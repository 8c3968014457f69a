"""Evaluation of an image tokenizer's reconstructions."""

import torch
from torch import Tensor

from pretrain.evaluations.evaluated import Evaluated, Figures, batches, reading
from pretrain.runtime.show import grid


def figures(given: Evaluated) -> Figures:
    """Return the mean PSNR per image in dB, and the number of codes used."""
    errors: list[Tensor] = []
    used: set[int] = set()
    shown: list[Tensor] = []
    with torch.no_grad(), reading(given.stream, given.inputs(), given.folder) as usable:
        for pixels in (batch["pixels"] for batch in batches(usable)):
            codes = given.model.encode(pixels)
            drawn = given.model.decode(codes).float().clamp(-1, 1)
            errors.append((pixels - drawn).square().mean((1, 2, 3)) / 4)
            used.update(codes.flatten().tolist())
            shown = shown or [pixels[:16], drawn[:16]]
    given.pictures["evaluation-reconstructions.png"] = grid(torch.cat(shown))
    per_image = -10 * torch.log10(torch.cat(errors).clamp(min=1e-10))
    return {"reconstruction_psnr": float(per_image.mean()), "codes_used": len(used)}
