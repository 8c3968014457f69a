"""What the schemas of several families share: what a model reads, and rules of attention. Imports no torch."""

from dataclasses import dataclass
from typing import Literal

from data_pipeline.settings import Settings

MAIN = "main"
"""The role of all parameters that no other optimizer of a task has."""
Activation = Literal["gelu", "gelu_new", "relu"]
"""gelu is exact; gelu_new its approximation by tanh, as in GPT-2 and Google's BERT."""


@dataclass(frozen=True)
class TextRead:
    """Token ids below `vocab_size`, at most `context` of them; the names are those of the model's fields."""

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
    """`count` image codes a sample, each below `codebook`."""

    count: int
    codebook: int


@dataclass(frozen=True)
class Reads:
    """What a model takes from a sample; None where it takes nothing of that kind. classes: labels 0 to below it."""

    text: TextRead | None = None
    pixels: PixelsRead | None = None
    codes: CodesRead | None = None
    classes: int | None = None


class ModelSettings(Settings):
    """Base of every model's section, which has a `kind` of its own."""

    kind: str

    @property
    def reads(self) -> Reads:
        """What the model takes from a sample."""
        raise NotImplementedError

    @property
    def makes(self) -> CodesRead | None:
        """The codes that an image tokenizer makes of an image; None for any other model."""
        return None


def check_heads(width: int, heads: int, name: str = "width") -> None:
    """Raise ValueError where the heads of an attention do not share its width evenly."""
    if width % heads:
        near = [number for number in range(1, width + 1) if width % number == 0]
        best = min(near, key=lambda number: (abs(number - heads), number))
        raise ValueError(f"{name}={width} is not divisible by heads={heads}; use {best} heads, or another width")
