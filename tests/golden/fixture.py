"""A golden folder: what a reference implementation computed on weights of its own layout, and ours beside it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

TOLERANCE = 1e-5
"""Of float32, as a share of the largest value of an array, of 1 at least."""


@dataclass(frozen=True)
class Compared:
    """One array. allowed: what is tolerated.

    difference: the largest one; infinite where ours is missing, has another shape or other whole numbers.
    """

    name: str
    difference: float
    allowed: float

    @property
    def agrees(self) -> bool:
        """Within what is allowed?"""
        return self.difference <= self.allowed


class Golden:
    """One folder: weights, inputs, outputs and the configuration of the reference."""

    def __init__(self, folder: Path) -> None:
        self.name = folder.resolve().name
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.weights, self.inputs, self.outputs = (
            load_file(folder / f"{name}.safetensors") for name in ("weights", "inputs", "outputs")
        )

    def compare(self, found: dict[str, Tensor], gradients: dict[str, Tensor]) -> list[Compared]:
        """Compare every array that the reference wrote with ours of that name, in the order of the names.

        gradients: of the weights, by the reference's names: its `grad.NAME` is one whole, its `gradsum.NAME` the sum
        and the sum of squares.
        """
        ours = dict(found)
        for name, gradient in gradients.items():
            ours[f"grad.{name}"] = gradient
            ours[f"gradsum.{name}"] = torch.stack([gradient.sum(), gradient.square().sum()])
        return [compare(name, wanted, ours.get(name)) for name, wanted in sorted(self.outputs.items())]


def compare(name: str, wanted: Tensor, found: Tensor | None) -> Compared:
    """The largest difference of one array. Infinities agree with themselves, whole numbers are the same or are not."""
    allowed = 0.0 if not wanted.is_floating_point() else TOLERANCE * max(1.0, _largest(wanted))
    if found is None or found.shape != wanted.shape:
        return Compared(name, float("inf"), allowed)
    found = found.detach()
    if not wanted.is_floating_point():
        return Compared(name, 0.0 if torch.equal(found.to(wanted.dtype), wanted) else float("inf"), allowed)
    apart = torch.where(found == wanted, 0.0, (found.double() - wanted.double()).abs())
    worst = float(apart.max()) if apart.numel() else 0.0
    return Compared(name, worst if worst == worst else float("inf"), allowed)


def _largest(values: Tensor) -> float:
    finite = values[values.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    """Those that a backward left, by our names."""
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def waves(x: Tensor) -> Tensor:
    """The loss of fixtures without one of their own: sum of cos(i) x_i over sqrt(n)."""
    flat = x.flatten()
    return (torch.arange(len(flat), dtype=torch.float64).cos().float() * flat).sum() / len(flat) ** 0.5
