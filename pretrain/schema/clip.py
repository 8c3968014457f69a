"""Schema of CLIP and its towers. Imports no torch."""

from typing import Literal

import pydantic
from pydantic import Field, PositiveFloat, PositiveInt

from data_pipeline.settings import Settings
from pretrain.schema.common import (
    DropPathRate,
    ModelSettings,
    PixelsRead,
    Reads,
    TextRead,
    check_heads,
    check_patches,
)


class VisionTower(Settings):
    """CLIP's ViT: patches -> one embedding."""

    added = frozenset({"drop_path"})
    image_size: PositiveInt = 224
    patch_size: PositiveInt = 32
    width: PositiveInt = 768
    layers: PositiveInt = 12
    heads: PositiveInt = 12
    drop_path: DropPathRate = 0.0

    @pydantic.model_validator(mode="after")
    def _shapes_fit(self) -> "VisionTower":
        check_patches(self.image_size, self.patch_size)
        check_heads(self.width, self.heads)
        return self


class TextTower(Settings):
    """CLIP's causal text transformer, pooled at the end-of-text token."""

    added = frozenset({"drop_path"})
    vocab_size: PositiveInt = 49408
    context: PositiveInt = 77
    width: PositiveInt = 512
    layers: PositiveInt = 12
    heads: PositiveInt = 8
    drop_path: DropPathRate = 0.0

    @pydantic.model_validator(mode="after")
    def _shapes_fit(self) -> "TextTower":
        check_heads(self.width, self.heads)
        return self


class ClipConfig(ModelSettings):
    """CLIP, Radford et al. 2021, arXiv:2103.00020.

    logit_scale, logit_bias: initial values of the factor and of the summand that make logits of similarities; both are
    trained. The softmax has no bias (None); the sigmoid loss has one.
    """

    kind: Literal["clip"] = "clip"
    vision: VisionTower = VisionTower()
    text: TextTower = TextTower()
    embed_dim: PositiveInt = 512
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    norm_eps: PositiveFloat = 1e-5
    logit_scale: PositiveFloat = Field(1 / 0.07, le=100.0)
    logit_bias: float | None = Field(None, allow_inf_nan=False)

    @property
    def drop_paths(self) -> bool:
        """Whether either tower does."""
        return max(self.vision.drop_path, self.text.drop_path) > 0

    @property
    def reads(self) -> Reads:
        """A text and an image."""
        text = TextRead(self.text.vocab_size, self.text.context, "text.vocab_size", "text.context")
        return Reads(text=text, pixels=PixelsRead(self.vision.image_size))
