"""ViT for classification, Dosovitskiy et al. 2020, arXiv:2010.11929. Written for one device.

Initialised as the authors' code (google-research/vision_transformer): patches LeCun normal, positions N(0, .02), class
token 0, matrices of the blocks Xavier uniform, hidden biases of the MLP N(0, 1e-6), head 0. Deviations: dropout as in
transformers, after the embeddings and after each branch, not within the MLP. Letters: B batch, P patches, D width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pretrain.models.layers import PreNormBlock
from pretrain.models.noise import Dropout, path_rates

if TYPE_CHECKING:
    from pretrain.schema.vit import VitConfig

TRUNCATED = 0.87962566
"""Standard deviation of a normal variable of deviation 1 that is truncated at 2."""


class Vit(nn.Module):
    """Patches and a class token -> pre-norm blocks -> logits of the class token."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        width, eps = config.width, config.norm_eps
        patches = (config.image_size // config.patch_size) ** 2
        self.patch = nn.Conv2d(3, width, config.patch_size, stride=config.patch_size)
        self.class_token = nn.Parameter(torch.zeros(width))
        self.positions = nn.Parameter(torch.empty(patches + 1, width))
        self.dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList(
            PreNormBlock(width, config.heads, config.activation, eps, config.dropout, rate)
            for rate in path_rates(config.drop_path, config.layers)
        )
        self.norm = nn.LayerNorm(width, eps)
        self.head = nn.Linear(width, config.classes)
        self._initialise()

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels: float [B, 3, H, W] in [-1, 1] -> float32 logits [B, classes]."""
        patches = self.patch(pixels.to(self.positions.dtype)).flatten(2).transpose(1, 2)
        first = self.class_token.to(patches.dtype).expand(len(patches), 1, -1)
        x = self.dropout(torch.cat([first, patches], dim=1) + self.positions)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, 0])).float()

    def _initialise(self) -> None:
        deviation = self.patch.weight[0].numel() ** -0.5 / TRUNCATED
        nn.init.trunc_normal_(self.patch.weight, std=deviation, a=-2 * deviation, b=2 * deviation)
        nn.init.normal_(self.positions, std=0.02)
        for bias in (self.patch.bias, self.head.weight, self.head.bias):
            assert bias is not None
            nn.init.zeros_(bias)
        for block in self.blocks:
            assert isinstance(block, PreNormBlock)
            for part in (*block.attention.qkv.weight.chunk(3), block.attention.out.weight):
                nn.init.xavier_uniform_(part)
            for linear in (block.attention.qkv, block.attention.out):
                nn.init.zeros_(linear.bias)
            for linear in (block.mlp.rise, block.mlp.fall):
                nn.init.xavier_uniform_(linear.weight)
                nn.init.normal_(linear.bias, std=1e-6)
