"""Input of every evaluation, reading of its samples, and sums over them that ranks share.

An evaluation splits its samples into groups by their order. A group is computed by one rank, as one batch, and the
results are added in the order of the groups: the figures do not depend on the number of ranks, bit for bit.
"""

import contextlib
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data_pipeline.errors import TesseraError
from data_pipeline.sandbox import SandboxDecoder
from data_pipeline.schema import Sample
from data_pipeline.stream.mixture import Source
from data_pipeline.text.tokenizer import TextTokenizer
from pretrain.config import RunConfig
from pretrain.inputs.bad import FOLDER as BAD_SAMPLES
from pretrain.inputs.bad import Ledger, Replaced, Usable
from pretrain.inputs.lethal import Screened, remembered, screened
from pretrain.tasks.task import Task

SAMPLES = 512
"""Number of samples that are evaluated of training data, when no held-out data are named."""
BATCH = 64

Batch = dict[str, Tensor]
Figures = dict[str, float]


class StopAsked(TesseraError):
    """A rank was asked to stop during an evaluation; raised on every rank."""


@dataclass(frozen=True)
class EvaluationRanks:
    """The ranks that share an evaluation.

    sum: over ranks, of a float64 tensor. run: computes a function of a batch on this rank's device, in evaluation mode
    and without gradient; all ranks must call it equally often. asked: how often this rank was asked to stop.
    """

    rank: int
    world: int
    sum: Callable[[Tensor], Tensor]
    run: Callable[[Callable[[Batch], Batch], Batch], Batch]
    asked: Callable[[], int]


def _alone(compute: Callable[[Batch], Batch], batch: Batch) -> Batch:
    with torch.no_grad():
        return compute(batch)


ALONE = EvaluationRanks(0, 1, sum=lambda x: x, run=_alone, asked=lambda: 0)


@dataclass
class Evaluated:
    """A model as its task trained it, and the first `count` samples of the data that it is evaluated on.

    config: the run's, without augmentation. tokenizer: the text tokenizer, if the model reads text. folder: of the run
    or export. decoder: a sandbox, closed by whoever opened it. rerank, candidates: see `evaluate.main`. with_codes:
    whether image codes are read that the task may need. pictures: filled by the evaluation, by name. kept: what an
    evaluation keeps for the next one of the same data.
    """

    task: Task
    config: RunConfig
    stream: Source
    tokenizer: TextTokenizer | None
    folder: Path
    count: int
    decoder: SandboxDecoder
    ranks: EvaluationRanks = ALONE
    rerank: str | Path | None = None
    candidates: int = 1
    with_codes: bool = True
    pictures: dict[str, Image.Image] = field(default_factory=dict)
    kept: dict[str, Any] = field(default_factory=dict)
    replaced: list[Replaced] = field(default_factory=list)
    lethal: set[int] = field(default_factory=set)

    @property
    def model(self) -> Any:
        return self.task.model

    def inputs(self) -> Callable[[list[Sample]], Any]:
        """Return the task's inputs: samples -> batch."""
        made: Callable[[list[Sample]], Any] = self.task.inputs(self.config, self.stream, self.tokenizer)
        return made


def for_evaluation(config: RunConfig) -> RunConfig:
    """Return a copy without augmentation of images and without noise of the task's inputs."""
    return config.model_copy(update={"data": config.data.without_augmentation(), "task": config.task.without_noise()})


def balanced(count: int, size: int) -> list[np.ndarray]:
    """Split the positions [0, count) into groups of at most `size`, whose sizes differ by at most one, int64 [n] each.

    No group is much smaller than the others: a loss that compares the samples of a batch depends on their number.
    """
    return np.array_split(np.arange(count, dtype=np.int64), -(-count // size))


@contextlib.contextmanager
def reading(given: Evaluated, what: str, inputs: Callable[[list[Sample]], Any]) -> Iterator[Usable]:
    """Read samples as training does: unusable ones are replaced, and listed in FOLDER/bad_samples/evaluation.jsonl.

    Images are first decoded in the sandbox; a lethal image counts as unusable. what: name of the pass over the data;
    when it is made again, by the same ranks, its images were all decoded before.
    """
    decoder = None if given.kept.get(f"decoded by {what}") else given.decoder
    usable = Usable(given.stream, screened(inputs, remembered(given.folder) | given.lethal, decoder))
    yield usable
    given.kept[f"decoded by {what}"] = True
    if isinstance(usable.inputs, Screened):
        given.lethal |= usable.inputs.known
    if new := [entry for entry in usable.replaced if entry not in given.replaced]:
        given.replaced += new
        _list_replaced(given, new)


def _list_replaced(given: Evaluated, new: list[Replaced]) -> None:
    path = given.folder / BAD_SAMPLES / "evaluation.jsonl"
    told = f"{len(new)} samples of {given.stream.dataset} cannot be used and were replaced by others"
    try:
        Ledger(path).note(new, 0)
        print(f"{told}: {path}", file=sys.stderr)
    except OSError as error:  # the metrics do not depend on the list
        print(f"{told}; the list could not be written ({error})", file=sys.stderr)


def summed(
    ranks: EvaluationRanks,
    groups: Sequence[np.ndarray],
    prepare: Callable[[np.ndarray], Batch],
    compute: Callable[[Batch], Batch],
) -> Batch:
    """Return the sum of `compute(prepare(group))` over the groups of positions, by name, float64.

    Scalars are added in the order of the groups. A vector holds counts, which add up exactly in any order. A rank
    without a group in the last round computes the last one again, because all ranks must run the same modules.
    Raises StopAsked on all ranks after the round in which one was asked to stop.
    """
    totals: Batch = {}
    with contextlib.closing(_prepared(ranks, groups, prepare)) as batches:
        for first, batch in zip(range(0, len(groups), ranks.world), batches, strict=True):
            found = {name: value.double() for name, value in ranks.run(compute, batch).items()}
            if first + ranks.rank >= len(groups):
                found = {name: torch.zeros_like(value) for name, value in found.items()}
            for row in _rows(ranks, found)[: len(groups) - first]:
                totals |= {name: totals[name] + value if name in totals else value for name, value in row.items()}
    return totals


def _rows(ranks: EvaluationRanks, found: Batch) -> list[Batch]:
    """Exchange the results of one round -> those of each rank; vectors are summed, in the first row."""
    names = [name for name, value in found.items() if not value.ndim]
    table = torch.zeros(ranks.world, len(names) + 1, dtype=torch.float64)
    table[ranks.rank] = torch.stack([*(found[name] for name in names), torch.tensor(float(ranks.asked()))])
    table = ranks.sum(table)
    if table[:, -1].any():
        raise StopAsked("asked to stop during an evaluation")
    rows = [dict(zip(names, row[:-1].unbind(), strict=True)) for row in table]
    rows[0] |= {name: ranks.sum(value) for name, value in found.items() if value.ndim}
    return rows


def _prepared(
    ranks: EvaluationRanks, groups: Sequence[np.ndarray], prepare: Callable[[np.ndarray], Batch]
) -> Generator[Batch]:
    """Yield this rank's batch of each round; a thread prepares the next one meanwhile."""
    mine = [groups[min(at + ranks.rank, len(groups) - 1)] for at in range(0, len(groups), ranks.world)]
    with ThreadPoolExecutor(1, thread_name_prefix="evaluation") as pool:
        ahead = pool.submit(prepare, mine[0])
        for following in [*mine[1:], None]:
            batch = ahead.result()
            if following is not None:
                ahead = pool.submit(prepare, following)
            yield batch


def picture_name(name: str, key: str) -> str:
    """Return the file name, without step and ending, of a picture of an evaluation."""
    return "-".join(filter(None, ("evaluation", name, key)))
