"""Parts shared by the schemas of several model families: model inputs and checks of attention. Imports no torch."""

from dataclasses import dataclass
from typing import Literal

from data_pipeline.settings import Settings

MAIN = "main"
"""Role of all parameters that no other optimizer of the task owns."""
Activation = Literal["gelu", "gelu_new", "relu"]
"""gelu is exact; gelu_new is its tanh approximation, as in GPT-2 and Google's BERT."""


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
    """`count` image codes per sample, each below `codebook`."""

    count: int
    codebook: int


@dataclass(frozen=True)
class Reads:
    """Inputs of a model by kind; None where it reads none. classes: number of labels, 0 to classes - 1."""

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
    def makes(self) -> CodesRead | None:
        """The codes that an image tokenizer produces from an image; None for any other model."""
        return None


def check_heads(width: int, heads: int, name: str = "width") -> None:
    """Raise ValueError when the width of an attention is not divisible by its heads."""
    if width % heads:
        near = [number for number in range(1, width + 1) if width % number == 0]
        best = min(near, key=lambda number: (abs(number - heads), number))
        raise ValueError(f"{name}={width} is not divisible by heads={heads}; use {best} heads, or another width")
