"""Text-to-image GPT over VQGAN codes (the GPT of EasyNLP's text2image_generation).

One causal transformer reads T text tokens, then I image codes. Ids [0, image_vocab) are codes; text ids follow, offset
by image_vocab. The head outputs logits of image codes only, and only at the I places that predict one.
Letters: B batch, T text tokens, I image tokens, L = T + I, D width, H heads, V image vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pretrain.models.layers import ACTIVATIONS, Block, attend
from pretrain.models.noise import Dropout, DropPath, path_rates

if TYPE_CHECKING:
    from pretrain.schema.gpt import GptConfig


class Cache:
    """KV cache of all layers, allocated once: two tensors [layers, B, H, L - 1, D/H]; `length` places are filled."""

    def __init__(self, config: GptConfig, batch: int, device: torch.device, dtype: torch.dtype) -> None:
        length = config.text_tokens + config.image_tokens - 1  # the last code is never an input
        shape = (config.layers, batch, config.heads, length, config.width // config.heads)
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values [B, H, n, D/H] of a layer -> all keys and values of that layer so far."""
        end = self.length + keys.shape[2]
        self.keys[layer, :, :, self.length : end] = keys
        self.values[layer, :, :, self.length : end] = values
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


class Gpt(nn.Module):
    """Pre-LN transformer, learned positions, untied image head without bias."""

    def __init__(self, config: GptConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = Embed(config)
        self.blocks = nn.ModuleList(GptBlock(config, layer) for layer in range(config.layers))
        self.norm = nn.LayerNorm(config.width, config.norm_eps)
        self.head = nn.Linear(config.width, config.image_vocab, bias=False)
        self.apply(_init)

    def forward(self, text: Tensor, codes: Tensor) -> Tensor:
        """text: int64 [B, T], codes: int64 [B, n], n <= I -> float32 logits [B, n, V], the i-th predicting codes[:, i].

        The last code is not an input, because nothing is predicted from it.
        """
        tokens = torch.cat([text + self.config.image_vocab, codes[:, :-1]], 1)
        return self.step(tokens, start=0, last=codes.shape[1])

    def step(self, tokens: Tensor, start: int, last: int, cache: Cache | None = None) -> Tensor:
        """tokens: ids int64 [B, n] at places start.. -> float32 logits [B, last, V] of the last places.

        Without a cache, `tokens` is the whole sequence; with one, the cache holds everything before `start`.
        """
        x = self.embed(tokens, start)
        for block in self.blocks:
            x = block(x, cache)
        if cache is not None:
            cache.length += tokens.shape[1]
        return self.head(self.norm(x[:, -last:])).float()

    @torch.no_grad()
    def sample(
        self,
        text: Tensor,
        temperature: float = 1.0,
        top_k: int = 0,
        guidance: float = 1.0,
        empty: Tensor | None = None,
        uniforms: Tensor | None = None,
    ) -> Tensor:
        """Sample image codes: text int64 [B, T], not modified -> codes int64 [B, I].

        temperature: 0 takes the most likely code. top_k: 0 keeps all codes. guidance: classifier-free guidance scale
        (Ho & Salimans 2022, arXiv:2207.12598); 1 disables it. The logits are u + guidance (c - u), with u those of
        `empty`, int64 [T], the empty caption, computed as further rows of the batch. It needs training with
        `caption_drop`.
        uniforms: float64 [B, I] in [0, 1), one number per code, drawn by torch when None. A row's codes depend on its
        numbers, not on the other rows.
        """
        if uniforms is None:
            uniforms = torch.rand(len(text), self.config.image_tokens, dtype=torch.float64, device=text.device)
        guided = guidance != 1.0
        rows = torch.cat([text, _empty_rows(text, empty)]) if guided else text
        cache = Cache(self.config, len(rows), text.device, self.cache_dtype(text.device.type))
        tokens = rows + self.config.image_vocab
        codes = text.new_empty(len(text), self.config.image_tokens)
        for place in range(self.config.image_tokens):
            logits = self.step(tokens, cache.length, 1, cache)[:, 0]
            if guided:
                given, empty = logits.chunk(2)
                logits = empty + guidance * (given - empty)
            codes[:, place] = choose(logits, temperature, top_k, uniforms[:, place])
            tokens = codes[:, place : place + 1].repeat(2 if guided else 1, 1)
        return codes

    def cache_dtype(self, device_type: str) -> torch.dtype:
        """Return the dtype of the projected keys and values."""
        if torch.is_autocast_enabled(device_type):
            return torch.get_autocast_dtype(device_type)
        return next(self.parameters()).dtype


def choose(logits: Tensor, temperature: float, top_k: int, uniforms: Tensor) -> Tensor:
    """float32 logits [B, V], float64 uniforms [B] -> codes int64 [B], sampled by inverse CDF."""
    if temperature == 0:
        return logits.argmax(-1)
    if 0 < top_k < logits.shape[-1]:
        floor = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < floor, -torch.inf)
    cumulative = (logits.double() / temperature).softmax(-1).cumsum(-1)
    wanted = uniforms[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, wanted, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)


def _empty_rows(text: Tensor, empty: Tensor | None) -> Tensor:
    """Return the empty caption [T] once for each row of `text` [B, T]. Raises ValueError if there is none."""
    if empty is None:
        raise ValueError("guidance other than 1 needs the ids of the empty caption; pass `empty`")
    return empty.expand_as(text)


# ------------------------------------------------------------------------------------------- pieces


class Embed(nn.Module):
    """Token embedding plus learned position embedding."""

    def __init__(self, config: GptConfig) -> None:
        super().__init__()
        self.token = nn.Embedding(config.image_vocab + config.text_vocab, config.width)
        self.position = nn.Parameter(torch.zeros(1, config.text_tokens + config.image_tokens, config.width))
        self.drop = Dropout(config.dropout)

    def forward(self, tokens: Tensor, start: int) -> Tensor:
        """int64 [B, n] at places start.. -> [B, n, D]."""
        return self.drop(self.token(tokens) + self.position[:, start : start + tokens.shape[1]])


class CausalAttention(nn.Module):
    """Causal self-attention with separate query, key and value projections, with bias."""

    def __init__(self, config: GptConfig, layer: int) -> None:
        super().__init__()
        self.heads, self.layer = config.heads, layer
        self.query = nn.Linear(config.width, config.width)
        self.key = nn.Linear(config.width, config.width)
        self.value = nn.Linear(config.width, config.width)
        self.out = nn.Linear(config.width, config.width)
        self.drop_weights = Dropout(config.dropout)
        self.drop = Dropout(config.dropout)

    def forward(self, x: Tensor, cache: Cache | None) -> Tensor:
        """[B, n, D] -> [B, n, D]; n must be 1 if the cache is not empty."""
        batch, length, width = x.shape
        q, k, v = (
            layer(x).view(batch, length, self.heads, -1).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        mixed = attend(q, k, v, causal=length > 1, dropout=self.drop_weights)
        return self.drop(self.out(mixed.transpose(1, 2).reshape(batch, length, width)))


class GptBlock(Block):
    """x + attention(norm x), then x + mlp(norm x)."""

    def __init__(self, config: GptConfig, layer: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, config.norm_eps)
        self.attention = CausalAttention(config, layer)
        self.norm2 = nn.LayerNorm(config.width, config.norm_eps)
        self.rise = nn.Linear(config.width, 4 * config.width)
        self.fall = nn.Linear(4 * config.width, config.width)
        self.activation = ACTIVATIONS[config.activation]
        self.drop = Dropout(config.dropout)
        rate = path_rates(config.drop_path, config.layers)[layer]
        self.path1 = DropPath(rate)
        self.path2 = DropPath(rate)

    def forward(self, x: Tensor, cache: Cache | None) -> Tensor:
        """[B, n, D] -> [B, n, D]."""
        x = x + self.path1(self.attention(self.norm1(x), cache))
        return x + self.path2(self.drop(self.fall(self.activation(self.rise(self.norm2(x))))))


def _init(module: nn.Module) -> None:
    """Matrices N(0, .02), biases 0, norms 1 and 0, positions 0."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
