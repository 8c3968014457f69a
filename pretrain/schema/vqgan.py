"""Schema of the image tokenizer, VQGAN. Imports no torch."""

from typing import Any, Literal

import pydantic
from pydantic import Field, PositiveInt

from pretrain.schema.common import CodesRead, ModelSettings, PixelsRead, Reads

NormGroups = PositiveInt | Literal["width/4"]


def group_count(channels: int, groups: "int | Literal['width/4']") -> int:
    """Return the number of groups of a GroupNorm over `channels` channels."""
    return min(32, channels // 4) if groups == "width/4" else groups


MIDDLE: Literal["middle"] = "middle"


def sides_of_levels(image_size: int, levels: int) -> list[int]:
    """Return the side of each level of a VQGAN in pixels, finest first."""
    return [image_size // 2**index for index in range(levels)]


class VqganConfig(ModelSettings):
    """VQGAN, Esser et al. 2021, arXiv:2012.09841 (taming f16-16384 by default).

    norm_groups: groups of every GroupNorm. The default is 32, as in all published weights, or "width/4" where 32 does
    not divide the widths (no published model): four channels per group, at most 32 groups. Set "width/4" for other
    narrow models too: a group of one channel loses that channel's mean, and with it the colours of flat areas.

    attention_at: sides of the levels with attention; the middle blocks then have it too. "middle": only those blocks,
    the default when no level has side 16. An empty list: no attention.

    local_encoder: make every code a function of its own patch and a few pixels around it. In the published encoder,
    normalisation and wide kernels carry information from the whole picture into each code; a small model cannot
    generate such codes in new combinations.
    """

    kind: Literal["vqgan"] = "vqgan"
    image_size: PositiveInt = 256
    channels: PositiveInt = 128
    multipliers: tuple[PositiveInt, ...] = Field((1, 1, 2, 2, 4), min_length=1)
    res_blocks: PositiveInt = 2
    attention_at: tuple[int | Literal["middle"], ...] = (16,)
    latent_channels: PositiveInt = 256
    codebook_size: int = Field(16384, ge=2, le=65536)
    code_width: PositiveInt = 256
    local_encoder: bool = False
    norm_groups: NormGroups = 32
    discriminator_channels: PositiveInt = 64
    discriminator_layers: PositiveInt = 3

    @property
    def sides(self) -> list[int]:
        """Side of each level in pixels, finest first."""
        return sides_of_levels(self.image_size, len(self.multipliers))

    @property
    def widths(self) -> list[int]:
        """Channels of each level, finest first."""
        return [self.channels * multiplier for multiplier in self.multipliers]

    def group_counts(self, groups: "int | Literal['width/4'] | None" = None) -> list[int]:
        """Return the norm groups of each width, finest first. groups: None for `norm_groups`."""
        return [group_count(width, groups or self.norm_groups) for width in (self.channels, *self.widths)]

    @pydantic.model_validator(mode="before")
    @classmethod
    def _groups_of_narrow_widths(cls, tree: Any) -> Any:
        """Default `norm_groups` to "width/4" where 32 groups are impossible."""
        channels = tree.get("channels", 128) if isinstance(tree, dict) else 128
        if not isinstance(channels, int) or channels % 32 == 0 or "norm_groups" in tree:
            return tree
        return tree | {"norm_groups": "width/4"}

    @pydantic.model_validator(mode="before")
    @classmethod
    def _attention_of_other_sides(cls, tree: Any) -> Any:
        """Default `attention_at` to "middle" where no level has side 16."""
        if not isinstance(tree, dict) or "attention_at" in tree:
            return tree
        defaults = {name: cls.model_fields[name].default for name in ("image_size", "multipliers")}
        side, multipliers = (tree.get(name, default) for name, default in defaults.items())
        if not isinstance(side, int) or not isinstance(multipliers, list | tuple):
            return tree
        return tree if 16 in sides_of_levels(side, len(multipliers)) else tree | {"attention_at": (MIDDLE,)}

    @pydantic.model_validator(mode="after")
    def _sides_halve(self) -> "VqganConfig":
        """Require a side that every level but the last can halve."""
        factor = 2 ** (len(self.multipliers) - 1)
        if self.image_size % factor:
            raise ValueError(
                f"image_size={self.image_size} is not divisible by {factor}, the pixels of a code with "
                f"{len(self.multipliers)} multipliers; use {max(factor, self.image_size // factor * factor)}"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _groups_divide(self) -> "VqganConfig":
        for width, groups in zip((self.channels, *self.widths), self.group_counts(), strict=True):
            if not groups or width % groups:
                raise ValueError(
                    f"norm_groups={self.norm_groups}: {width} channels are not divisible by {groups} groups; use "
                    "channels that are a multiple of 32, or of 4 with norm_groups=width/4"
                )
        if self.grid == 1 and self.group_counts()[-1] == self.widths[-1]:
            raise ValueError(
                f"norm_groups={self.norm_groups}: {self.widths[-1]} channels of one code form groups of one value, "
                "which GroupNorm makes 0; use fewer groups or a larger image"
            )
        return self

    @property
    def grid(self) -> int:
        """Codes per side."""
        return self.image_size // 2 ** (len(self.multipliers) - 1)

    @property
    def reads(self) -> Reads:
        """An image."""
        return Reads(pixels=PixelsRead(self.image_size))

    @property
    def makes(self) -> CodesRead:
        """A square of codes."""
        return CodesRead(self.grid**2, self.codebook_size)


def discriminator_widths(channels: int, layers: int) -> list[int]:
    """Return the channels of the discriminator's normalised layers."""
    return [channels * min(2**index, 8) for index in range(1, layers + 1)]
