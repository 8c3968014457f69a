"""Lethal images, which end the process that decodes them: found in a sandbox, recorded by content hash, replaced.

Training decodes in the rank's own process or in its data workers, so a lethal image would kill every attempt at the
same step. After an attempt that ended without recording a cause, the next one decodes in the sandbox all images that
the previous one may have been preparing. An image that kills its decoder there is a bad sample from then on, for every
rank, attempt and world size. No run ever got past it, so replacing it changes no step already made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import xxhash

from data_pipeline.config import ImageRules
from data_pipeline.errors import BadSample, NodeFault
from data_pipeline.images import MAX_PIXELS, Reject, encode
from data_pipeline.sandbox import LETHAL, SandboxDecoder
from data_pipeline.schema import Sample
from pretrain.inputs.bad import Usable
from pretrain.runtime.goodput import append_line, lines_of

if TYPE_CHECKING:
    from data_pipeline.stream.mixture import Source

LETHAL_IMAGES = "lethal_images.jsonl"
AT_ONCE = 64
SOUND = encode(np.zeros((8, 8, 3), np.uint8), "png", 0)

Maximum = Callable[[list[int]], list[int]]
"""Element-wise maximum over ranks."""


@runtime_checkable
class DecodesImages(Protocol):
    """Inputs that decode the samples' images, to a side of `image_size` pixels."""

    image_size: int


class Screened:
    """Inputs that refuse lethal images: the `known` ones and, with a `decoder`, those that it finds.

    known: numbers of images, see `image_number`. found: records for `remember` of the images found here.
    """

    def __init__(
        self, inputs: Callable[[list[Sample]], Any], known: Iterable[int] = (), decoder: SandboxDecoder | None = None
    ) -> None:
        self.inputs = inputs
        self.known = set(known)
        self.decoder = decoder
        self.found: list[dict[str, Any]] = []

    def __call__(self, samples: list[Sample]) -> Any:
        """Apply the inputs to the samples. Raises BadSample where they do, and for a lethal image."""
        if self.known or self.decoder:
            for sample in samples:
                self._refuse_lethal(sample)
        return self.inputs(samples)

    def _refuse_lethal(self, sample: Sample) -> None:
        if sample.image is None:
            return
        number = image_number(sample.image)
        if number not in self.known and self.decoder is not None and (why := _death(self.decoder, sample.image)):
            self.known.add(number)
            self.found.append({"image": number, "key": sample.key, "reason": why})
        if number in self.known:
            raise BadSample(f"sample {sample.key!r}: its image crashes the decoder")


def _death(decoder: SandboxDecoder, image: bytes) -> str:
    """Return how the image ends its decoder; empty if it does not. Raises NodeFault if every image does."""
    try:
        decoder.look(image)
    except Reject as reject:
        return str(reject) if reject.reason in LETHAL else ""
    except NodeFault as fault:  # the decoder died or exited repeatedly; raises again if a sound image ends it too
        decoder.look(SOUND)
        return str(fault)
    return ""


def screened(
    inputs: Callable[[list[Sample]], Any], known: Iterable[int] = (), decoder: SandboxDecoder | None = None
) -> Any:
    """Return the inputs, wrapped in `Screened` if they decode images."""
    return Screened(inputs, known, decoder) if isinstance(inputs, DecodesImages) else inputs


def image_number(data: bytes) -> int:
    """Return 63 bits of the hash of an image's bytes, which identify it in any dataset, order or world size."""
    return xxhash.xxh3_64_intdigest(data) >> 1


def looking_decoder(cpu_s: float) -> SandboxDecoder:
    """Return a sandbox that decodes as training does. cpu_s: CPU time per image in seconds."""
    return SandboxDecoder(ImageRules(max_pixels=MAX_PIXELS), stored=False, cpu_s=cpu_s)


def search(stream: Source, inputs: Screened, positions: np.ndarray, cpu_s: float, maximum: Maximum) -> None:
    """Decode in the sandbox the images at this rank's positions, int64 [n], and those drawn to replace bad ones.

    All ranks call it with equally many positions; afterwards every rank's `inputs` know the lethal images of all ranks.
    """
    looking = looking_decoder(cpu_s)
    sandboxed = Screened(inputs.inputs, inputs.known, looking)
    usable = Usable(stream, sandboxed)
    try:
        for at in range(0, len(positions), AT_ONCE):
            usable.checked(usable.take(positions[at : at + AT_ONCE]))
            sandboxed.known = known_to_all(sandboxed.known, maximum)  # often: all wait for a slow rank
    finally:
        looking.close()
    inputs.known, inputs.found = sandboxed.known, sandboxed.found


def remember(run: Path, found: Iterable[dict[str, Any]]) -> None:
    """Append the records to RUN/lethal_images.jsonl, and print each."""
    for line in found:
        append_line(run / LETHAL_IMAGES, line)
        told = f"sample {line['key']!r} crashes the image decoder ({line['reason']})"
        print(f"{told}; it is replaced from now on", flush=True)


def remembered(run: Path) -> set[int]:
    """Return the image numbers in RUN/lethal_images.jsonl; a line without a valid number counts as torn."""
    numbers = (line.get("image") for line in lines_of(run / LETHAL_IMAGES))
    return {number for number in numbers if type(number) is int and 0 <= number < 1 << 63}


def known_to_all(mine: set[int], maximum: Maximum) -> set[int]:
    """Return the union over ranks of sets of non-negative numbers."""
    union: set[int] = set()
    while (highest := maximum([max(mine - union, default=-1)])[0]) >= 0:
        union.add(highest)
    return union
