"""Input of every evaluation, and reading of its samples."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from data_pipeline.schema import Sample
from data_pipeline.shards.codes import DECODE_S
from data_pipeline.stream.mixture import Source
from data_pipeline.text.tokenizer import TextTokenizer
from pretrain.config import RunConfig
from pretrain.inputs.bad import FOLDER as BAD_SAMPLES
from pretrain.inputs.bad import Ledger, Usable
from pretrain.inputs.lethal import looking_decoder, remembered, screened
from pretrain.tasks import TASKS

SAMPLES = 512
BATCH = 64

Figures = dict[str, float]


@dataclass(frozen=True)
class Evaluated:
    """A trained model in evaluation mode on one device, and the data that it is evaluated on.

    config: the run's, without augmentation. tokenizer: the text tokenizer, if the model reads text. folder: of the run
    or export. rerank, candidates: see `evaluate.main`. pictures: filled by the evaluation, by file name.
    """

    model: Any
    config: RunConfig
    stream: Source
    tokenizer: TextTokenizer | None
    folder: Path
    rerank: str | Path | None = None
    candidates: int = 1
    pictures: dict[str, Image.Image] = field(default_factory=dict)

    def inputs(self) -> Callable[[list[Sample]], Any]:
        """Return the task's inputs: samples -> batch."""
        made: Callable[[list[Sample]], Any] = TASKS[self.config.task.kind].inputs(
            self.config, self.stream, self.tokenizer
        )
        return made


@contextlib.contextmanager
def reading(stream: Source, inputs: Callable[[list[Sample]], Any], folder: Path) -> Iterator[Usable]:
    """Read samples as training does: unusable ones are replaced, and listed in FOLDER/bad_samples/evaluation.jsonl.

    Images are first decoded in the sandbox; a lethal image counts as unusable.
    """
    with contextlib.closing(looking_decoder(DECODE_S)) as decoder:
        usable = Usable(stream, screened(inputs, remembered(folder), decoder))
        yield usable
    if usable.replaced:
        path = folder / BAD_SAMPLES / "evaluation.jsonl"
        told = f"{len(usable.replaced)} samples of {stream.dataset} cannot be used and were replaced by others"
        try:
            Ledger(path).note(usable.replaced, 0)
            print(f"{told}: {path}", file=sys.stderr)
        except OSError as error:  # the metrics do not depend on the list
            print(f"{told}; the list could not be written ({error})", file=sys.stderr)


def batches(usable: Usable) -> Iterator[dict[str, Tensor]]:
    """Yield full batches of the first epoch, up to SAMPLES samples; one short batch if the dataset is smaller."""
    count = min(usable.stream.samples, SAMPLES)
    size = min(BATCH, count)
    for start in range(0, count - size + 1, size):
        yield usable.batch(usable.take(np.arange(start, start + size)))
