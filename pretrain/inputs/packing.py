"""Masked captions -> rows of the batch: one per row with trailing padding, or several per row with almost none.

Letters: b samples, R rows, S the model's context, M masked positions of a row.
"""

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pretrain.inputs.masking import mask_slots
from pretrain.schema.tasks import MaskingConfig


@dataclasses.dataclass(frozen=True)
class Example:
    """One masked sample. tokens, masked, types: int64 [length]; positions: int64 [n]; noise: its dropout key;
    uniforms: float32 [n] or more.
    """

    tokens: np.ndarray
    masked: np.ndarray
    types: np.ndarray
    positions: np.ndarray
    noise: int
    is_random: bool | None = None
    uniforms: np.ndarray | None = None


def rows_of(examples: list[Example], context: int, task: MaskingConfig, pad_id: int) -> dict[str, Tensor]:
    """Build the batch with one sample per row or, with `task.packing`, several per row."""
    if task.packing:
        return packed(examples, context, pad_id)
    return padded(examples, context, task.mask_rate, pad_id)


def padded(examples: list[Example], context: int, rate: float, pad_id: int) -> dict[str, Tensor]:
    """One sample per row: tokens, types, noise int64 [b, S]; attention bool [b, S]; positions, labels int64 [b, M];
    label_weights float32 [b, M], 0 where a slot is empty; is_random int64 [b] and uniforms float32 [b, M] where given.

    Tokens and labels are padded with `pad_id`, everything else with 0.
    """
    slots = mask_slots(rate, context)
    return stack([_row([example], context, slots, pad_id) for example in examples])


def packed(examples: list[Example], context: int, pad_id: int) -> dict[str, Tensor]:
    """Several samples per row: as `padded`, [R, ...], where M is the largest number of masked positions in a row, plus
    segments int64 [R, S], the index in the row of a token's sample, -1 for padding, and places int64 [R, S], the
    token's index in its sample. A token must attend to its own segment only.
    """
    rows = [[examples[i] for i in row] for row in fill([len(example.tokens) for example in examples], context)]
    slots = max(1, *(sum(len(example.positions) for example in row) for row in rows))
    return stack([_row(row, context, slots, pad_id) | _own(row, context) for row in rows])


def fill(lengths: list[int], room: int) -> list[list[int]]:
    """First fit, longest first: lengths of at most `room` -> indices by row, each row at most `room` long."""
    rows: list[list[int]] = []
    left = np.empty(0, np.int64)
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fits = np.flatnonzero(left >= lengths[index])
        chosen = int(fits[0]) if len(fits) else len(rows)
        if chosen == len(rows):
            rows.append([])
            left = np.append(left, room)
        rows[chosen].append(index)
        left[chosen] -= lengths[index]
    return rows


def _row(examples: list[Example], context: int, slots: int, pad_id: int) -> dict[str, Any]:
    firsts = np.cumsum([0, *(len(example.tokens) for example in examples)])
    tokens = np.concatenate([example.tokens for example in examples])
    positions = np.concatenate([e.positions + first for e, first in zip(examples, firsts[:-1], strict=True)])
    row: dict[str, Any] = {
        "tokens": pad(np.concatenate([example.masked for example in examples]), context, pad_id),
        "types": pad(np.concatenate([example.types for example in examples]), context),
        "noise": pad(np.repeat([example.noise for example in examples], np.diff(firsts)), context),
        "attention": np.arange(context) < len(tokens),
        "positions": pad(positions, slots),
        "labels": pad(tokens[positions], slots, pad_id),
        "label_weights": (np.arange(slots) < len(positions)).astype(np.float32),
    }
    if examples[0].is_random is not None:
        row["is_random"] = np.int64(examples[0].is_random)
    counts = [slots] if len(examples) == 1 else [len(example.positions) for example in examples]
    drawn = [e.uniforms[:n] for e, n in zip(examples, counts, strict=True) if e.uniforms is not None]
    if drawn:
        row["uniforms"] = pad(np.concatenate(drawn), slots)
    return row


def _own(examples: list[Example], context: int) -> dict[str, np.ndarray]:
    lengths = [len(example.tokens) for example in examples]
    segments = np.full(context, -1, np.int64)
    segments[: sum(lengths)] = np.repeat(np.arange(len(lengths)), lengths)
    return {"segments": segments, "places": pad(np.concatenate([np.arange(n) for n in lengths]), context)}


def pad(values: list[int] | np.ndarray, length: int, fill: int = 0) -> np.ndarray:
    """Pad at the end with `fill`: [n] -> [length] of the same dtype, int64 for a list."""
    array = np.asarray(values, None if isinstance(values, np.ndarray) else np.int64)
    whole = np.full(length, fill, array.dtype)
    whole[: len(array)] = array
    return whole


def stack(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Stack rows to a batch, with a new first dimension for every key."""
    return {key: torch.from_numpy(np.stack([one[key] for one in rows])) for key in rows[0]}
