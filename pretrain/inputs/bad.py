"""Replacement of unusable samples. Training, previews and evaluation all read samples through `Usable`.

A sample that cannot be used is replaced by another of its dataset and recorded in a ledger; positions do not shift. The
replacement is drawn from (seed, epoch, sample id): every world size, worker and restart chooses the same one.
Only `BadSample` leads to a replacement; a storage error is not a fault of a sample, and ends the run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_pipeline.errors import BadSample, DataError
from data_pipeline.schema import Sample
from data_pipeline.stream.order import sample_generator
from pretrain.runtime.goodput import append_line

if TYPE_CHECKING:
    from data_pipeline.stream.mixture import Source

TRIES = 16
FOLDER = "bad_samples"
FREE = 8  # bad samples allowed at any rate; otherwise a short run would stop at its first one
SHOWN = 20


@dataclasses.dataclass(frozen=True)
class Replaced:
    """One line of the ledger: the omitted sample, its replacement, and the reason."""

    position: int
    epoch: int
    sample: int
    replacement: int
    reason: str


class Usable:
    """Reads samples that `inputs` can turn into tensors; `replaced` collects the replacements."""

    def __init__(self, stream: Source, inputs: Callable[[list[Sample]], Any]) -> None:
        self.stream = stream
        self.inputs = inputs
        self.replaced: list[Replaced] = []

    def take(self, positions: np.ndarray) -> list[Sample]:
        """Read the samples at `positions`, int64 [n]; replace those that cannot be read."""
        try:
            return self.stream.take(positions)
        except BadSample:
            return [self._read(position) for position in positions.tolist()]

    def batch(self, samples: list[Sample]) -> Any:
        """Return the tensors of the samples, in their order; replace samples that cannot be converted."""
        try:
            return self.inputs(samples)
        except BadSample:
            return self.inputs(self.checked(samples))

    def checked(self, samples: Sequence[Sample]) -> list[Sample]:
        """Return the samples; replace those that cannot be converted to tensors."""
        return [self._check(sample) for sample in samples]

    def _read(self, position: int) -> Sample:
        try:
            return self.stream.read(position, position + 1)[0]
        except BadSample as fault:
            return self._replacement(position, str(fault))

    def _check(self, sample: Sample) -> Sample:
        try:
            self.inputs([sample])
        except BadSample as fault:
            return self._replacement(sample.position, str(fault))
        return sample

    def _replacement(self, position: int, reason: str) -> Sample:
        epoch, sample_id, ids = self.stream.locate(position)
        drawn = sample_generator(self.stream.seed, epoch, sample_id, "replacement").integers(len(ids), size=TRIES)
        for candidate in (ids[int(number)] for number in drawn):
            try:
                sample = dataclasses.replace(self.stream.fetch(candidate), epoch=epoch, position=position)
                self.inputs([sample])
            except BadSample:
                continue
            self.replaced.append(Replaced(position, epoch, sample_id, candidate, reason))
            return sample
        raise DataError(
            f"position {position}: sample {sample_id} cannot be used ({reason}), nor can {TRIES} "
            "replacements; the dataset does not fit this task, see `tessera data verify`"
        )


class Ledger:
    """Record of a rank's replaced samples, one line each in a file; stops the run above `max_rate` of all samples.

    path: None keeps them in memory only. max_rate: 1 never stops.
    """

    def __init__(self, path: Path | None, max_rate: float = 1.0) -> None:
        self.path = path
        self.max_rate = max_rate
        self.entries: list[Replaced] = []
        self.samples = 0

    def note(self, replaced: Sequence[Replaced], samples: int) -> None:
        """Add `samples` consumed samples and their replacements. Raises DataError with the list above `max_rate`."""
        self.samples += samples
        if not replaced:
            return
        self.entries += replaced
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            for entry in replaced:
                append_line(self.path, dataclasses.asdict(entry))
        if len(self.entries) > max(FREE, self.max_rate * self.samples):
            raise DataError(
                f"{len(self.entries)} of {self.samples} samples cannot be used, more than "
                f"data.max_bad_rate={self.max_rate}; build the dataset again without them, or allow more"
                + "".join(f"\n  position {e.position}, sample {e.sample}: {e.reason}" for e in self.entries[-SHOWN:])
                + ("" if self.path is None else f"\n  all of them: {self.path}")
            )
