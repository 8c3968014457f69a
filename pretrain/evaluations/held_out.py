"""The evaluations that a run makes in training, on all of its `data.evaluation`."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipeline.errors import ConfigError, DataError
from data_pipeline.shards.codes import DECODE_S
from pretrain.config import RunConfig
from pretrain.evaluations.evaluated import Evaluated, EvaluationRanks, Figures, for_evaluation, picture_name, reading
from pretrain.inputs.lethal import looking_decoder
from pretrain.inputs.source import open_data
from pretrain.schema.tasks import figure_name
from pretrain.tasks.task import Task

LOOKED_AT = 4
"""Samples of every held-out dataset that are read before the first step."""


class HeldOut:
    """The held-out datasets of a run, by name.

    compute: returns the figures of one of them. check: raises ConfigError for data that `compute` cannot use.
    Raises ConfigError or DataError, naming the dataset, for one that is not there, empty, smaller than the number of
    ranks or of another kind than the task reads.
    """

    def __init__(
        self,
        config: RunConfig,
        task: Task,
        ranks: EvaluationRanks,
        compute: Callable[[Evaluated], Figures],
        check: Callable[[Evaluated, str], None],
    ) -> None:
        self.compute, self.check = compute, check
        self.decoder = looking_decoder(DECODE_S)
        self.given = {name: self._opened(config, name, path, task, ranks) for name, path in _chosen(config)}

    def _opened(self, config: RunConfig, name: str, path: str, task: Task, ranks: EvaluationRanks) -> Evaluated:
        try:
            stream, tokenizer = open_data(config, path)
            if stream.samples < ranks.world:
                raise ConfigError(f"{stream.samples} samples are fewer than {ranks.world} ranks; name a larger dataset")
            given = Evaluated(
                task, for_evaluation(config), stream, tokenizer, Path(config.run), stream.samples, self.decoder, ranks
            )
            with reading(given, "check", given.inputs()) as usable:
                usable.batch(usable.take(np.arange(min(LOOKED_AT, stream.samples))))
            self.check(given, name)
        except (ConfigError, DataError) as error:
            raise type(error)(f"{figure_setting(name)}={path}: {error}") from None
        return given

    def use(self, task: Task, ranks: EvaluationRanks) -> None:
        """Evaluate another task object, and its engine, from now on."""
        for given in self.given.values():
            given.task, given.ranks = task, ranks

    def figures(self, asked: Callable[[], int]) -> Figures:
        """Evaluate on all datasets -> the figures by their names in metrics.jsonl, equal on all ranks.

        Raises StopAsked on all ranks if one was asked to stop.
        """
        found: Figures = {}
        for name, given in self.given.items():
            given.ranks = dataclasses.replace(given.ranks, asked=asked)
            found |= {figure_name(name, key): value for key, value in self.compute(given).items()}
        self.close()
        return found

    def close(self) -> None:
        """End the sandbox's process; after the first evaluation it has seen all images."""
        self.decoder.close()

    def pictures(self) -> Iterator[tuple[str, Image.Image]]:
        """Yield the pictures of the newest evaluation on this rank, with their names."""
        for name, given in self.given.items():
            for key, picture in given.pictures.items():
                yield picture_name(name, key), picture


def _chosen(config: RunConfig) -> list[tuple[str, str]]:
    return [(name, config.data.evaluations[name]) for name in config.evaluated]


def figure_setting(name: str) -> str:
    """Return the setting that names a held-out dataset."""
    return f"data.evaluation.{name}" if name else "data.evaluation"
