"""Shapes of one micro-batch without data, for computations before there are any.

SHAPES has one entry per key, whichever tasks read it.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel

from pretrain.config import RunConfig
from pretrain.inputs.masking import mask_slots


class Shape(NamedTuple):
    """Sizes and dtype of one tensor of a batch."""

    sizes: tuple[int, ...]
    dtype: torch.dtype


def batch_shapes(config: RunConfig, keys: Iterable[str], rows: int) -> dict[str, Shape]:
    """Return the largest shapes that the run's inputs make of `rows` samples; with packing, of one sample per row.

    keys: those that the task reads.
    """
    return {key: SHAPES[key](config, rows) for key in (*keys, *_beside(config)) if key in SHAPES}


def _beside(config: RunConfig) -> list[str]:
    """Return the keys beyond the task's own: dropout noise and, with packing, segments and places."""
    drops, packs = _said(config.model, "dropout") is not None, bool(_said(config.task, "packing"))
    return ["noise"] * drops + ["segments", "places"] * packs


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


def _a_row(dtype: torch.dtype = torch.int64) -> Callable[[RunConfig, int], Shape]:
    return lambda config, rows: Shape((rows, _context(config)), dtype)


def _a_slot(dtype: torch.dtype = torch.int64) -> Callable[[RunConfig, int], Shape]:
    return lambda config, rows: Shape((rows, mask_slots(_said(config.task, "mask_rate"), _context(config))), dtype)


def _codes(config: RunConfig, rows: int) -> Shape:
    reads = config.model.reads.codes
    assert reads
    return Shape((rows, reads.count), torch.int64)


def _noise(config: RunConfig, rows: int) -> Shape:
    """One key per token, or one per sample where the model reads codes after its text."""
    return Shape((rows, 1 if config.model.reads.codes else _context(config)), torch.int64)


def _a_sample(config: RunConfig, rows: int) -> Shape:
    return Shape((rows,), torch.int64)


SHAPES: dict[str, Callable[[RunConfig, int], Shape]] = {
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
    "eot": _a_sample,
    "is_random": _a_sample,
    "text": _a_row(),
    "codes": _codes,
}
