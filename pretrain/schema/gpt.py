"""Autoregressive transformers over text and image codes. Imports no torch."""

from typing import Literal

import pydantic
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from pretrain.schema.common import Activation, CodesRead, DropPathRate, ModelSettings, Reads, TextRead, check_heads


class GptConfig(ModelSettings):
    """Autoregressive text-to-image transformer over text tokens and image codes (EasyNLP's pai-painter)."""

    added = frozenset({"drop_path"})
    kind: Literal["gpt"] = "gpt"
    text_vocab: PositiveInt = 21128
    image_vocab: PositiveInt = 16384
    text_tokens: PositiveInt = 32
    image_tokens: PositiveInt = 256
    layers: PositiveInt = 12
    width: PositiveInt = 768
    heads: PositiveInt = 12
    activation: Activation = "gelu"
    norm_eps: PositiveFloat = 1e-5
    dropout: NonNegativeFloat = Field(0.0, lt=1.0)
    drop_path: DropPathRate = 0.0

    @pydantic.model_validator(mode="after")
    def _shapes_fit(self) -> "GptConfig":
        check_heads(self.width, self.heads)
        return self

    @property
    def reads(self) -> Reads:
        """A text and the codes of its image."""
        text = TextRead(self.text_vocab, self.text_tokens, "text_vocab", "text_tokens")
        return Reads(text=text, codes=CodesRead(self.image_tokens, self.image_vocab))
