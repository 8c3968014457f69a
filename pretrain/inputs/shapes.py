"""Shapes of one micro-batch without data, for computations before there are any.

SHAPES has one entry per key that several tasks read; a task declares those of its own keys (`Task.shapes`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from pydantic import BaseModel

from pretrain.inputs.masking import mask_slots

if TYPE_CHECKING:
    from pretrain.config import RunConfig


class Shape(NamedTuple):
    """Sizes and dtype of one tensor of a batch."""

    sizes: tuple[int, ...]
    dtype: torch.dtype


ShapeOf = Callable[["RunConfig", int], Shape]
"""Configuration, rows -> the shape of one key."""


def batch_shapes(
    config: RunConfig, keys: Sequence[str], rows: int, own: Mapping[str, ShapeOf] | None = None
) -> dict[str, Shape]:
    """Return the largest shapes that the run's inputs make of `rows` samples; with packing, of one sample per row.

    keys: those that the task reads; "step" and "turn" come from the loop. own: the task's `shapes`.
    """
    known = SHAPES | dict(own or {})
    return {key: known[key](config, rows) for key in (*keys, *_beside(config)) if key not in ("step", "turn")}


def _beside(config: RunConfig) -> list[str]:
    """Return the keys beyond the task's own: noise of dropout and drop path and, with packing, segments and places."""
    packs = bool(_said(config.task, "packing"))
    return ["noise"] * config.model.draws_noise + ["segments", "places"] * packs


def _said(settings: BaseModel, name: str) -> Any:
    """Return the field `name` of these settings or of a nested section; None if there is none."""
    if name in type(settings).model_fields:
        return getattr(settings, name)
    parts = (getattr(settings, field) for field in type(settings).model_fields)
    found = (_said(part, name) for part in parts if isinstance(part, BaseModel))
    return next((value for value in found if value is not None), None)


def _pixels(config: RunConfig, rows: int) -> Shape:
    reads = config.model.reads.pixels
    assert reads
    return Shape((rows, 3, reads.side, reads.side), torch.float32)


def _context(config: RunConfig) -> int:
    reads = config.model.reads.text
    assert reads
    return reads.context


def _a_row(dtype: torch.dtype = torch.int64) -> ShapeOf:
    return lambda config, rows: Shape((rows, _context(config)), dtype)


def _a_slot(dtype: torch.dtype = torch.int64) -> ShapeOf:
    return lambda config, rows: Shape((rows, mask_slots(_said(config.task, "mask_rate"), _context(config))), dtype)


def _codes(config: RunConfig, rows: int) -> Shape:
    reads = config.model.reads.codes
    assert reads
    return Shape((rows, reads.count), torch.int64)


def _noise(config: RunConfig, rows: int) -> Shape:
    """One key per token of a model that reads text alone, whose rows may be packed; else one per sample."""
    reads = config.model.reads
    alone = reads.text and not reads.codes and not reads.pixels
    return Shape((rows, _context(config) if alone else 1), torch.int64)


def a_number(config: RunConfig, rows: int) -> Shape:
    """One integer per sample."""
    return Shape((rows,), torch.int64)


SHAPES: dict[str, ShapeOf] = {
    "pixels": _pixels,
    "tokens": _a_row(),
    "types": _a_row(),
    "attention": _a_row(torch.bool),
    "noise": _noise,
    "segments": _a_row(),
    "places": _a_row(),
    "positions": _a_slot(),
    "labels": _a_slot(),
    "label_weights": _a_slot(torch.float32),
    "uniforms": _a_slot(torch.float32),
    "eot": a_number,
    "is_random": a_number,
    "text": _a_row(),
    "codes": _codes,
}
