"""Parts shared by the schemas of all families: bases of models and tasks, model inputs, checks. Imports no torch."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field

from data_pipeline.settings import Settings

MAIN = "main"
"""Role of all parameters that no other optimizer of the task owns."""
DropPathRate = Annotated[float, Field(ge=0, lt=1)]
"""Probability that a sample skips the attention or the MLP of the last block; it rises evenly from 0 in the first."""
Activation = Literal["gelu", "gelu_new", "relu"]
"""gelu is exact; gelu_new is its tanh approximation, as in GPT-2 and Google's BERT."""
Direction = Literal["min", "max"]
Metrics = dict[str, Direction | None]
"""Metric name in metrics.jsonl -> whether lower or higher is better; None: neither."""

Special = Literal["pad", "unk", "cls", "sep", "mask"]
"""Special ids by their names in `data_pipeline.text.tokenizer.TextTokenizer`."""

OF_UPDATE: Metrics = {"grad_norm": None, "lr": None}
"""Metrics of the update, which an evaluation does not have."""
STEP: Metrics = {"loss": "min", **OF_UPDATE}
"""Metrics of every task, as the loop reports them."""


@dataclass(frozen=True)
class TextRead:
    """At most `context` token ids below `vocab_size`; `*_field` are the names of the model's fields for them."""

    vocab_size: int
    context: int
    vocab_field: str = "vocab_size"
    context_field: str = "context"


@dataclass(frozen=True)
class PixelsRead:
    """Square images of `side` pixels."""

    side: int


@dataclass(frozen=True)
class CodesRead:
    """`count` image codes per sample, each below `codebook`; `*_field` are the names of the model's fields for them."""

    count: int
    codebook: int
    count_field: str = dataclasses.field(default="image_tokens", compare=False)
    codebook_field: str = dataclasses.field(default="image_vocab", compare=False)


@dataclass(frozen=True)
class Reads:
    """Inputs of a model by kind; None where it reads none. classes: number of labels, 0 to classes - 1.

    Labels are what a model predicts: `classes` is the size of its output.
    """

    text: TextRead | None = None
    pixels: PixelsRead | None = None
    codes: CodesRead | None = None
    classes: int | None = None


class ModelSettings(Settings):
    """Base of every model's section; each subclass has its own `kind`."""

    kind: str

    @property
    def reads(self) -> Reads:
        """What the model reads of a sample."""
        raise NotImplementedError

    @property
    def drop_paths(self) -> bool:
        """Whether training drops paths, for which a batch needs each sample's noise."""
        return False

    @property
    def draws_noise(self) -> bool:
        """Whether its layers can draw each sample's noise: for a field `dropout`, or drop paths."""
        return "dropout" in type(self).model_fields or self.drop_paths

    @property
    def makes(self) -> CodesRead | None:
        """The codes that an image tokenizer produces from an image; None for any other model."""
        return None


class TaskSettings(Settings):
    """Base of every task's section; each subclass has its own `kind`."""

    kind: str
    trains: ClassVar[tuple[type[ModelSettings], ...]] = ()
    """The models that the task trains."""
    roles: ClassVar[tuple[str, ...]] = (MAIN,)
    """Names of the optimizers, the model's first."""
    replicated: ClassVar[bool] = False
    """Whether every rank needs the full weights (ZeRO stage 0)."""
    specials: ClassVar[tuple[Special, ...]] = ()
    """Special ids that the task needs of its text tokenizer."""
    metrics: ClassVar[Metrics] = STEP
    """Metrics that a row of metrics.jsonl may hold."""
    model_defaults: ClassVar[Mapping[str, Any]] = {}
    """Fields of the model whose default is another one under this task."""
    evaluated: ClassVar[Metrics] = {}
    """Metrics of the task's evaluation besides the means of those of its steps."""

    def figures(self) -> Metrics:
        """Return what an evaluation of the task may report: the means of its metrics, and `evaluated`."""
        means = {name: way for name, way in self.metrics.items() if name not in OF_UPDATE and self.yields(name, 0)}
        return means | self.evaluated

    def without_noise(self) -> Self:
        """Return a copy for evaluation, without what only training does to the inputs."""
        return self

    def yields(self, metric: str, steps: int) -> bool:
        """Return whether a run of `steps` steps ever reports `metric`, one of `metrics`."""
        return True

    def shortest_row(self) -> str:
        """Return the shortest usable row of text, pieces separated by spaces; empty if any length works."""
        return ""

    def check(self, model: ModelSettings, global_batch: int) -> None:
        """Raise ValueError when the task cannot train this model, an instance of `trains`."""


def check_patches(image_size: int, patch_size: int) -> None:
    """Raise ValueError when an image does not divide into patches."""
    if image_size % patch_size:
        fits = image_size // patch_size * patch_size or patch_size
        raise ValueError(
            f"image_size={image_size} is not divisible by patch_size={patch_size}; use {fits} pixels, or another patch"
        )


def check_heads(width: int, heads: int, name: str = "width") -> None:
    """Raise ValueError when the width of an attention is not divisible by its heads."""
    if width % heads:
        near = [number for number in range(1, width + 1) if width % number == 0]
        best = min(near, key=lambda number: (abs(number - heads), number))
        raise ValueError(f"{name}={width} is not divisible by heads={heads}; use {best} heads, or another width")
