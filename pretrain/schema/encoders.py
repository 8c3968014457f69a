"""Schemas of the text encoders BERT and ELECTRA. Imports no torch."""

from typing import Literal

import pydantic
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from pretrain.schema.common import Activation, DropPathRate, ModelSettings, Reads, TextRead, check_heads


class EncoderConfig(ModelSettings):
    """The bidirectional encoder that BERT and ELECTRA share."""

    added = frozenset({"drop_path"})
    vocab_size: PositiveInt = 30522
    context: PositiveInt = 512
    layers: PositiveInt = 12
    width: PositiveInt = 768
    heads: PositiveInt = 12
    embedding_width: PositiveInt = 768
    type_vocab: PositiveInt = 2
    activation: Activation = "gelu"
    norm_eps: PositiveFloat = 1e-12
    dropout: NonNegativeFloat = Field(0.1, lt=1.0)
    drop_path: DropPathRate = 0.0

    @pydantic.model_validator(mode="after")
    def _shapes_fit(self) -> "EncoderConfig":
        check_heads(self.width, self.heads)
        return self

    @property
    def reads(self) -> Reads:
        """One text."""
        return Reads(text=TextRead(self.vocab_size, self.context))


class BertConfig(EncoderConfig):
    """BERT for pretraining (MLM + NSP), Devlin et al. 2018, arXiv:1810.04805."""

    kind: Literal["bert"] = "bert"


class ElectraConfig(EncoderConfig):
    """ELECTRA, Clark et al. 2020, arXiv:2003.10555: the encoder fields are the discriminator's."""

    kind: Literal["electra"] = "electra"
    generator_fraction: PositiveFloat = Field(0.25, le=1.0)

    @property
    def generator_size(self) -> tuple[int, int]:
        """Width and heads of the generator: `generator_fraction` of the width, with heads of 64, at least one head."""
        width = round(self.width * self.generator_fraction)
        return width, max(1, width // 64)

    @pydantic.model_validator(mode="after")
    def _generator_fits(self) -> "ElectraConfig":
        width, heads = self.generator_size
        if not width:
            raise ValueError(
                f"generator_fraction={self.generator_fraction:g} of width={self.width} leaves the generator no width; "
                f"use {1 / self.width:.2g} or more"
            )
        if width % heads:
            raise ValueError(
                f"generator_fraction={self.generator_fraction:g} of width={self.width} gives the generator {width} in "
                f"{heads} heads, which does not divide; use another one, for example {64 * heads / self.width:.4g}"
            )
        return self
