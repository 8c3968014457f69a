"""VQGAN: image <-> grid of codes. Esser et al. 2021, arXiv:2012.09841; module names match the public weights.

Letters: B batch, C channels, S image side, G grid side (codes per side), Z latent channels, E code width, N codebook.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.models.layers import Block, attend
from pretrain.schema.vqgan import group_count

if TYPE_CHECKING:
    from pretrain.schema.vqgan import NormGroups, VqganConfig


class Quantised(NamedTuple):
    """Result of quantising latents."""

    codes: Tensor  # int64 [B, G*G], row by row
    latents: Tensor  # float32 [B*G*G, E], before quantisation
    nearest: Tensor  # float32 [B*G*G, E], codebook rows, with gradient to the codebook
    output: Tensor  # [B, E, G, G], value of `nearest`, straight-through gradient to the latents


class Vqgan(nn.Module):
    """Encoder, codebook and decoder; the discriminator belongs to the task."""

    def __init__(self, config: VqganConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = Codebook(config.codebook_size, config.code_width)
        self.quant_conv = nn.Conv2d(config.latent_channels, config.code_width, 1)
        self.post_quant_conv = nn.Conv2d(config.code_width, config.latent_channels, 1)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Quantised]:
        """float [B, 3, S, S] in [-1, 1] -> (reconstruction [B, 3, S, S], quantised latents)."""
        quantised = self.quantize(self.quant_conv(self.encoder(pixels)))
        return self.decoder(self.post_quant_conv(quantised.output)), quantised

    def encode(self, pixels: Tensor) -> Tensor:
        """float [B, 3, S, S] in [-1, 1] -> codes int64 [B, G*G]."""
        return self.quantize(self.quant_conv(self.encoder(pixels))).codes

    def decode(self, codes: Tensor) -> Tensor:
        """codes int64 [B, G*G] -> [B, 3, S, S], roughly in [-1, 1], not clamped."""
        return self.decoder(self.post_quant_conv(self.quantize.look_up(codes, self.config.grid)))


class Codebook(nn.Module):
    """Nearest neighbour in L2 (argmin in float32 even under autocast), straight-through gradient."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size, width)
        nn.init.uniform_(self.embedding.weight, -1.0 / size, 1.0 / size)

    def forward(self, latents: Tensor) -> Quantised:
        """[B, E, G, G] -> Quantised."""
        batch, width, height, breadth = latents.shape
        with torch.autocast(latents.device.type, enabled=False):
            flat = latents.float().permute(0, 2, 3, 1).reshape(-1, width)
            with torch.no_grad():
                codes = self.nearest(flat)
            nearest = self.embedding(codes).float()
            passed = flat + (nearest - flat).detach()
            output = passed.view(batch, height, breadth, width).permute(0, 3, 1, 2)
        return Quantised(codes.view(batch, -1), flat, nearest, output)

    def nearest(self, flat: Tensor) -> Tensor:
        """float32 [n, E] -> int64 [n]: argmin over the codebook of |z - e|^2, without the constant |z|^2."""
        table = self.embedding.weight.float()
        return torch.addmm(table.square().sum(1), flat, table.t(), alpha=-2).argmin(1)

    def look_up(self, codes: Tensor, grid: int) -> Tensor:
        """int64 [B, G*G] -> [B, E, G, G]."""
        return self.embedding(codes).view(codes.shape[0], grid, grid, -1).permute(0, 3, 1, 2)


# ------------------------------------------------------------------------------------------- blocks


class Norm(nn.GroupNorm):
    """GroupNorm with the published epsilon. groups: as `VqganConfig.norm_groups`.

    On a CPU the input is made contiguous and weight and bias are cast to its dtype: torch's backward for channels-last
    or mixed dtypes is up to ten times slower (a training step in bf16: 447 ms without, 233 ms with this).
    """

    def __init__(self, channels: int, groups: NormGroups) -> None:
        super().__init__(group_count(channels, groups), channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, C, h, w]."""
        if x.device.type != "cpu":
            return super().forward(x)
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.group_norm(x.contiguous(), self.num_groups, weight, bias, self.eps)


class PlaceNorm(nn.LayerNorm):
    """LayerNorm over the channels of one place, independent of the rest of the picture."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, C, h, w], channels last in memory."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def norm_of(channels: int, groups: NormGroups, local: bool) -> nn.Module:
    """Return GroupNorm as published or, if `local`, `PlaceNorm`."""
    return PlaceNorm(channels) if local else Norm(channels, groups)


def convolution(channels: int, out_channels: int, local: bool) -> nn.Conv2d:
    """Return a 3x3 convolution as published or, if `local`, 1x1; both keep the side."""
    kernel = 1 if local else 3
    return nn.Conv2d(channels, out_channels, kernel, padding=kernel // 2)


class ResBlock(Block):
    """Two normalised convolutions with a skip connection, a 1x1 convolution where the width changes."""

    def __init__(self, channels: int, out_channels: int, groups: NormGroups, local: bool = False) -> None:
        super().__init__()
        self.norm1 = norm_of(channels, groups, local)
        self.conv1 = convolution(channels, out_channels, local)
        self.norm2 = norm_of(out_channels, groups, local)
        self.conv2 = convolution(out_channels, out_channels, local)
        if channels != out_channels:
            self.nin_shortcut = nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, C', h, w]."""
        inner = self.conv1(F.silu(self.norm1(x)))
        inner = self.conv2(F.silu(self.norm2(inner)))
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + inner


class AttnBlock(Block):
    """Single-head attention over all places of the feature map."""

    def __init__(self, channels: int, groups: NormGroups) -> None:
        super().__init__()
        self.norm = Norm(channels, groups)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, C, h, w]."""
        normed = self.norm(x)
        q, k, v = (layer(normed).flatten(2).transpose(1, 2)[:, None] for layer in (self.q, self.k, self.v))
        mixed = attend(q, k, v)[:, 0]  # [B, h*w, C]
        return x + self.proj_out(mixed.transpose(1, 2).reshape(x.shape))


class Downsample(nn.Module):
    """Halve the side: one row and column of zeros at the far edges, then 3x3 with stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, 2h, 2w] -> [B, C, h, w]."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double the side: nearest neighbour, then 3x3."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, C, 2h, 2w]."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The blocks of one resolution; `downsample` or `upsample` is set by the owner where the side changes after it."""

    def __init__(
        self, channels: int, out_channels: int, blocks: int, attention: bool, groups: NormGroups, local: bool = False
    ) -> None:
        super().__init__()
        widths = [channels] + [out_channels] * (blocks - 1)
        self.block = nn.ModuleList(ResBlock(width, out_channels, groups, local) for width in widths)
        self.attn = nn.ModuleList(AttnBlock(out_channels, groups) for _ in range(blocks if attention else 0))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, C', h', w']."""
        for index, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[index](x)
        for name in ("downsample", "upsample"):
            if hasattr(self, name):
                x = getattr(self, name)(x)
        return x


class Middle(nn.Module):
    """Block, attention, block at the smallest side; no attention if the configuration has none at all.

    A code then describes its own neighbourhood, not the whole picture.
    """

    def __init__(self, channels: int, attention: bool, groups: NormGroups, local: bool = False) -> None:
        super().__init__()
        self.block_1 = ResBlock(channels, channels, groups, local)
        self.attn_1: nn.Module = AttnBlock(channels, groups) if attention else nn.Identity()
        self.block_2 = ResBlock(channels, channels, groups, local)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, C, h, w]."""
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """Pixels -> latents. With `local_encoder`, only the first convolution and the downsampling mix places."""

    def __init__(self, config: VqganConfig) -> None:
        super().__init__()
        widths, groups, local = config.widths, config.norm_groups, config.local_encoder
        self.conv_in = nn.Conv2d(3, config.channels, 3, padding=1)
        self.down = nn.ModuleList()
        for index, width in enumerate(widths):
            attention = config.sides[index] in config.attention_at
            above = widths[index - 1] if index else config.channels
            level = Level(above, width, config.res_blocks, attention, groups, local)
            if index < len(widths) - 1:
                level.downsample = Downsample(width)
            self.down.append(level)
        self.mid = Middle(widths[-1], bool(config.attention_at), groups, local)
        self.norm_out = norm_of(widths[-1], groups, local)
        self.conv_out = convolution(widths[-1], config.latent_channels, local)

    def forward(self, pixels: Tensor) -> Tensor:
        """[B, 3, S, S] -> [B, Z, G, G]."""
        x = self.conv_in(pixels)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Latents -> pixels, with one more block per level than the encoder. `up` is ordered finest first, as published."""

    def __init__(self, config: VqganConfig) -> None:
        super().__init__()
        widths, groups = config.widths, config.norm_groups
        self.conv_in = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], bool(config.attention_at), groups)
        levels = []
        for index, width in enumerate(widths):
            attention = config.sides[index] in config.attention_at
            below = widths[min(index + 1, len(widths) - 1)]
            level = Level(below, width, config.res_blocks + 1, attention, groups)
            if index:
                level.upsample = Upsample(width)
            levels.append(level)
        self.up = nn.ModuleList(levels)
        self.norm_out = Norm(widths[0], groups)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        """[B, Z, G, G] -> [B, 3, S, S]."""
        x = self.mid(self.conv_in(latents))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))
