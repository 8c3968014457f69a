"""Schema of the Vision Transformer. Imports no torch."""

from typing import Literal

import pydantic
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from pretrain.schema.common import (
    Activation,
    DropPathRate,
    ModelSettings,
    PixelsRead,
    Reads,
    check_heads,
    check_patches,
)


class VitConfig(ModelSettings):
    """ViT with a class token, Dosovitskiy et al. 2020, arXiv:2010.11929; the defaults are B/16 for ImageNet."""

    added = frozenset({"drop_path"})
    kind: Literal["vit"] = "vit"
    image_size: PositiveInt = 224
    patch_size: PositiveInt = 16
    width: PositiveInt = 768
    layers: PositiveInt = 12
    heads: PositiveInt = 12
    classes: PositiveInt = 1000
    activation: Activation = "gelu"
    norm_eps: PositiveFloat = 1e-12
    dropout: NonNegativeFloat = Field(0.0, lt=1.0)
    drop_path: DropPathRate = 0.0

    @pydantic.model_validator(mode="after")
    def _shapes_fit(self) -> "VitConfig":
        check_patches(self.image_size, self.patch_size)
        check_heads(self.width, self.heads)
        return self

    @property
    def reads(self) -> Reads:
        """An image; the label is its class."""
        return Reads(pixels=PixelsRead(self.image_size), classes=self.classes)
