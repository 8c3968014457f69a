"""CLIP with a ViT, Radford et al. 2021, arXiv:2103.00020. Written for one device.

Deviations: both towers use the text tower's initialisation, the only one the authors give for blocks; biases start
at 0. `logit_scale` has shape (1,), and is clamped in the forward instead of after the optimizer step.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.models.layers import PreNormBlock
from pretrain.models.noise import path_rates

if TYPE_CHECKING:
    from pretrain.schema.clip import ClipConfig, TextTower, VisionTower

MAX_LOGIT_SCALE = math.log(100.0)


class _Ceiling(torch.autograd.Function):
    """min(x, ceiling), with a gradient that above the ceiling can decrease x but not increase it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ceiling: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.ceiling = ceiling
        return x.clamp(max=ceiling)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        (grad,) = grads
        return grad * ((x < ctx.ceiling) | (grad > 0)), None


class ClipVision(nn.Module):
    """ViT: patches and a class token -> pre-norm blocks -> projected class token."""

    def __init__(self, config: VisionTower, embed_dim: int, activation: str, eps: float) -> None:
        super().__init__()
        patches = (config.image_size // config.patch_size) ** 2
        self.patch = nn.Conv2d(3, config.width, config.patch_size, stride=config.patch_size, bias=False)
        self.class_token = nn.Parameter(torch.empty(config.width))
        self.positions = nn.Parameter(torch.empty(patches + 1, config.width))
        self.norm_pre = nn.LayerNorm(config.width, eps)
        self.blocks = nn.ModuleList(
            PreNormBlock(config.width, config.heads, activation, eps, drop_path=rate)
            for rate in path_rates(config.drop_path, config.layers)
        )
        self.norm_post = nn.LayerNorm(config.width, eps)
        self.project = nn.Linear(config.width, embed_dim, bias=False)
        for parameter in (self.class_token, self.positions, self.project.weight):
            nn.init.normal_(parameter, std=config.width**-0.5)
        _init_blocks(self.blocks, config.width)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels: float [B, 3, H, W], normalised -> float32 [B, embed_dim], unit length."""
        patches = self.patch(pixels.to(self.positions.dtype)).flatten(2).transpose(1, 2)
        first = self.class_token.to(patches.dtype).expand(len(patches), 1, -1)
        x = self.norm_pre(torch.cat([first, patches], dim=1) + self.positions)
        for block in self.blocks:
            x = block(x)
        return F.normalize(self.project(self.norm_post(x[:, 0])).float(), dim=-1)


class ClipText(nn.Module):
    """Causal transformer, pooled at the end-of-text token, projected."""

    def __init__(self, config: TextTower, embed_dim: int, activation: str, eps: float) -> None:
        super().__init__()
        self.word = nn.Embedding(config.vocab_size, config.width)
        self.positions = nn.Parameter(torch.empty(config.context, config.width))
        self.blocks = nn.ModuleList(
            PreNormBlock(config.width, config.heads, activation, eps, drop_path=rate)
            for rate in path_rates(config.drop_path, config.layers)
        )
        self.norm = nn.LayerNorm(config.width, eps)
        self.project = nn.Linear(config.width, embed_dim, bias=False)
        nn.init.normal_(self.word.weight, std=0.02)
        nn.init.normal_(self.positions, std=0.01)
        nn.init.normal_(self.project.weight, std=config.width**-0.5)
        _init_blocks(self.blocks, config.width)

    def forward(self, tokens: Tensor, eot: Tensor) -> Tensor:
        """tokens: int64 [B, S], eot: int64 [B], index of the end-of-text token -> float32 [B, embed_dim], unit length.

        Attention is causal, so tokens after the end of text have no effect and padding needs no mask.
        """
        x = self.word(tokens) + self.positions[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x, causal=True)
        pooled = x[torch.arange(len(x), device=x.device), eot]
        return F.normalize(self.project(self.norm(pooled)).float(), dim=-1)


class Clip(nn.Module):
    """Image and text towers with a shared embedding space, and the scale and bias of their similarities."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.vision = ClipVision(config.vision, config.embed_dim, config.activation, config.norm_eps)
        self.text = ClipText(config.text, config.embed_dim, config.activation, config.norm_eps)
        self.logit_scale = nn.Parameter(torch.full((1,), math.log(config.logit_scale)))
        bias = config.logit_bias
        self.logit_bias = None if bias is None else nn.Parameter(torch.full((1,), bias))

    def forward(self, pixels: Tensor, tokens: Tensor, eot: Tensor) -> tuple[Tensor, ...]:
        """-> image float32 [B, E], text float32 [B, E], both unit length, scale float32 [1], and bias float32 [1].

        A softmax CLIP has no bias, and a scale of at most 100; the sigmoid loss does not limit the scale (SigLIP).
        """
        if self.logit_bias is None:
            scale = _Ceiling.apply(self.logit_scale.float(), MAX_LOGIT_SCALE).exp()
            return self.vision(pixels), self.text(tokens, eot), scale
        scale, bias = self.logit_scale.float().exp(), self.logit_bias.float()
        return self.vision(pixels), self.text(tokens, eot), scale, bias


def eot_by_largest_id(tokens: Tensor) -> Tensor:
    """Index of the end-of-text token in OpenAI's vocabulary, where it has the largest id: int64 [B, S] -> [B]."""
    return tokens.argmax(dim=-1)


def _init_blocks(blocks: nn.ModuleList, width: int) -> None:
    """Standard deviations: attention in w^-.5, MLP in (2w)^-.5, residual outputs w^-.5 (2L)^-.5; biases 0."""
    residual = width**-0.5 * (2 * len(blocks)) ** -0.5
    for block in blocks:
        assert isinstance(block, PreNormBlock)
        deviations = {
            block.attention.qkv: width**-0.5,
            block.attention.out: residual,
            block.mlp.rise: (2 * width) ** -0.5,
            block.mlp.fall: residual,
        }
        for linear, deviation in deviations.items():
            nn.init.normal_(linear.weight, std=deviation)
            nn.init.zeros_(linear.bias)
