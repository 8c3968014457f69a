"""Transformer layers shared by several models. Letters: B batch, S sequence, D width, H heads, V vocabulary.

Every parameter is used only in the forward of the module that owns it, so that sharded training (ZeRO-3), which
gathers a module's parameters around its forward, needs no special case.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from pretrain.models.noise import Dropout, DropPath, Noise, noise_again, path_rates

if TYPE_CHECKING:
    from pretrain.schema.encoders import EncoderConfig


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), the approximation that CLIP was trained with."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": functools.partial(F.gelu, approximate="tanh"),
    "quick_gelu": quick_gelu,
    "relu": F.relu,
}


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False, dropout: Dropout | None = None
) -> Tensor:
    """torch's SDPA over [B, H, S, D/H]; `mask` bool, True where a key may be attended to.

    With active `dropout` the attention weights are materialised, and recomputed in the backward: no kernel accepts
    per-sample noise. On a CPU it runs in float32 even under autocast: there the bf16 kernel's backward is four times
    slower.
    """
    on_cpu = q.device.type == "cpu"
    with torch.autocast("cpu", enabled=False) if on_cpu else contextlib.nullcontext():
        inputs = (q.float(), k.float(), v.float()) if on_cpu else (q, k, v)
        if dropout is not None and dropout.active:
            noise = dropout.noise(q)
            mixed: Tensor = checkpoint(
                _attend_dropped, *inputs, mask, causal, dropout, noise, use_reentrant=False, preserve_rng_state=False
            )
        else:
            mixed = F.scaled_dot_product_attention(*inputs, attn_mask=mask, is_causal=causal)
    return mixed.to(q.dtype)


def _attend_dropped(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, dropout: Dropout, noise: Noise
) -> Tensor:
    scores = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return dropout.pairs(scores.softmax(-1), noise).to(v.dtype) @ v


class Attention(nn.Module):
    """Multi-head self-attention through torch's SDPA, with one fused projection for queries, keys and values."""

    def __init__(self, width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = Dropout(dropout)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, key_mask: Tensor | None = None, causal: bool = False) -> Tensor:
        """x: [B, S, D], key_mask: bool [B, S], True where a key may be attended to (or [B, S, S]) -> [B, S, D]."""
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mask = None if key_mask is None else key_mask.view(batch, 1, -1, length)
        mixed = attend(q, k, v, mask, causal, self.dropout)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, width))


class Mlp(nn.Module):
    """Linear, activation, Linear; the hidden layer is four times as wide."""

    def __init__(self, width: int, activation: str = "gelu") -> None:
        super().__init__()
        self.rise = nn.Linear(width, 4 * width)
        self.fall = nn.Linear(4 * width, width)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return self.fall(self.activation(self.rise(x)))


class Block(nn.Module):
    """A part of a model that supports activation checkpointing (see `recompute`): only its inputs are kept."""

    again = False

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """Run the forward. The recomputation includes the hooks of sharded training, which gather its parameters."""
        if not (self.again and self.training and torch.is_grad_enabled()):
            return super().__call__(*inputs, **named)
        return checkpoint(super().__call__, *inputs, use_reentrant=False, context_fn=noise_again, **named)


def recompute(model: nn.Module) -> None:
    """Recompute the model's blocks in the backward from now on; values and gradients do not change."""
    for module in model.modules():
        if isinstance(module, Block):
            module.again = True


class PreNormBlock(Block):
    """x + dropout(f(norm(x))), for attention and for the MLP (CLIP, ViT); attention weights are never dropped."""

    def __init__(
        self,
        width: int,
        heads: int,
        activation: str = "gelu",
        eps: float = 1e-5,
        dropout: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps)
        self.mlp = Mlp(width, activation)
        self.dropout1 = Dropout(dropout)
        self.dropout2 = Dropout(dropout)
        self.path1 = DropPath(drop_path)
        self.path2 = DropPath(drop_path)

    def forward(self, x: Tensor, causal: bool = False) -> Tensor:
        """[B, S, D] -> [B, S, D]."""
        x = x + self.path1(self.dropout1(self.attention(self.norm1(x), causal=causal)))
        return x + self.path2(self.dropout2(self.mlp(self.norm2(x))))


class PostNormBlock(Block):
    """norm(x + f(x)), for attention and for the MLP (BERT)."""

    def __init__(
        self,
        width: int,
        heads: int,
        dropout: float,
        activation: str = "gelu",
        eps: float = 1e-12,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.attention = Attention(width, heads, dropout)
        self.norm1 = nn.LayerNorm(width, eps)
        self.mlp = Mlp(width, activation)
        self.norm2 = nn.LayerNorm(width, eps)
        self.dropout1 = Dropout(dropout)
        self.dropout2 = Dropout(dropout)
        self.path1 = DropPath(drop_path)
        self.path2 = DropPath(drop_path)

    def forward(self, x: Tensor, key_mask: Tensor) -> Tensor:
        """x: [B, S, D], key_mask: bool [B, S] -> [B, S, D]."""
        x = self.norm1(x + self.path1(self.dropout1(self.attention(x, key_mask))))
        return self.norm2(x + self.path2(self.dropout2(self.mlp(x))))


# ------------------------------------------------------------------------------- text encoders (BERT, ELECTRA)


def own_segment(attention: Tensor, segments: Tensor | None) -> Tensor:
    """Return the key mask: attention bool [B, S] unchanged or, with segments int64 [B, S], block-wise bool [B, S, S].

    Padding is a segment too, so that every query has a key.
    """
    return attention if segments is None else segments[:, :, None] == segments[:, None, :]


class WordEmbedding(nn.Embedding):
    """One matrix that embeds tokens and, transposed, computes logits over them.

    Both uses call this module: its parameter has one owner and one name, and sharded training gathers it for both.
    """

    def forward(self, x: Tensor, decode: bool = False) -> Tensor:
        """ids int64 [...] -> [..., D]; with `decode`, [..., D] -> logits [..., V]."""
        return F.linear(x, self.weight) if decode else F.embedding(x, self.weight)


class TextEmbeddings(nn.Module):
    """norm(word + position + segment), BERT's input embedding."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        width = config.embedding_width
        self.word = WordEmbedding(config.vocab_size, width)
        self.position = nn.Embedding(config.context, width)
        self.segment = nn.Embedding(config.type_vocab, width)
        self.norm = nn.LayerNorm(width, config.norm_eps)
        self.dropout = Dropout(config.dropout)

    def forward(self, tokens: Tensor, types: Tensor, places: Tensor | None = None) -> Tensor:
        """tokens, types, places (default 0, 1, ...): int64 [B, S] -> [B, S, embedding width]."""
        if places is None:
            places = torch.arange(tokens.shape[1], device=tokens.device)
        return self.dropout(self.norm(self.word(tokens) + self.position(places) + self.segment(types)))


class TextEncoder(nn.Module):
    """Projection from the embedding width if it differs, then post-norm blocks."""

    def __init__(
        self,
        embedding_width: int,
        width: int,
        layers: int,
        heads: int,
        dropout: float,
        activation: str = "gelu",
        eps: float = 1e-12,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.project = nn.Linear(embedding_width, width) if embedding_width != width else nn.Identity()
        rates = path_rates(drop_path, layers)
        self.blocks = nn.ModuleList(PostNormBlock(width, heads, dropout, activation, eps, rate) for rate in rates)

    @classmethod
    def of(cls, config: EncoderConfig, width: int, heads: int) -> TextEncoder:
        """Build the encoder of a configuration with this width and number of heads."""
        own = (config.layers, heads, config.dropout, config.activation, config.norm_eps, config.drop_path)
        return cls(config.embedding_width, width, *own)

    def forward(self, x: Tensor, key_mask: Tensor) -> Tensor:
        """x: [B, S, embedding width], key_mask: bool [B, S] -> [B, S, D]."""
        x = self.project(x)
        for block in self.blocks:
            x = block(x, key_mask)
        return x


class MlmHead(nn.Module):
    """Transform, then logits over the vocabulary through the word embedding, at masked positions only."""

    def __init__(self, config: EncoderConfig, width: int, activation: str = "gelu") -> None:
        super().__init__()
        self.transform = nn.Linear(width, config.embedding_width)
        self.norm = nn.LayerNorm(config.embedding_width, config.norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.activation = ACTIVATIONS[activation]

    def forward(self, hidden: Tensor, positions: Tensor, word: WordEmbedding) -> Tensor:
        """hidden: [B, S, D], positions: int64 [B, M] -> float32 logits [B, M, V]."""
        chosen = hidden.gather(1, positions[..., None].expand(-1, -1, hidden.shape[-1]))
        logits = word(self.norm(self.activation(self.transform(chosen))), decode=True)
        return logits.float() + self.bias.float()


def init_bert(module: nn.Module) -> None:
    """For `Module.apply`: matrices N(0, .02) truncated at two standard deviations, biases 0, norms 1 and 0."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.trunc_normal_(module.weight, std=0.02, a=-0.04, b=0.04)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
