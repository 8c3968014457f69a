"""Dropout with per-sample noise: the same for a sample in any batch, row, rank or device.

Whether an activation is kept is a hash of the sample's key, the token's index in the sample, the module and the
channel; there is no generator and no state. Letters: B rows, S sequence, D width, H heads.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Noise(NamedTuple):
    """Noise of a batch. keys: int64 [B, S], the key of each token's sample, or [B, 1] with one sample per row; places:
    int64 [B, S], the token's index in its sample, None if that is its index in the row.
    """

    keys: Tensor
    places: Tensor | None = None


_current: ContextVar[Noise | None] = ContextVar("noise", default=None)


@contextlib.contextmanager
def noise_of(keys: Tensor | None, places: Tensor | None = None) -> Iterator[None]:
    """Make `Dropout` use this noise within the context; without keys, each call draws from torch's generator."""
    token = _current.set(None if keys is None else Noise(keys, places))
    try:
        yield
    finally:
        _current.reset(token)


def noise_again() -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
    """For torch's checkpoint: return the contexts of a forward and of its recomputation, with the current noise."""
    noise = _current.get()
    return contextlib.nullcontext(), noise_of(*noise or (None,))


def name_noise(model: nn.Module) -> None:
    """Give every `Dropout` of the model its own noise, derived from the module's name and equal in every process."""
    for name, module in model.named_modules():
        if isinstance(module, Dropout):
            module.site = zlib.crc32(name.encode())


class Dropout(nn.Module):
    """Zero each activation with probability `rate` and scale the others by 1 / (1 - rate), in training only."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        if not 0 <= rate < 1:
            raise ValueError(f"dropout={rate}: must be at least 0 and below 1")
        self.rate = rate
        self.site = 0

    @property
    def active(self) -> bool:
        """Whether anything is dropped."""
        return self.training and self.rate > 0

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, D] -> [B, S, D]."""
        if not self.active:
            return x
        noise = self.noise(x)
        lanes = torch.arange(x.shape[-1], dtype=torch.int32, device=x.device)
        high, low = self._tokens(noise, x.shape[1])
        return self._dropped(x, _hash(high[..., None], low[..., None], lanes))

    def pairs(self, weights: Tensor, noise: Noise) -> Tensor:
        """Drop attention weights [B, H, S, S], query by key: noise of the query's token; channel: key and head."""
        heads, length = weights.shape[1:3]
        keys = torch.arange(length, device=weights.device)[None] if noise.places is None else noise.places
        head = torch.arange(heads, device=weights.device)[:, None, None] << 20
        high, low = (part[:, None, :, None] for part in self._tokens(noise, length))
        return self._dropped(weights, _hash(high, low, (keys[:, None, None, :] + head).int()))

    def noise(self, x: Tensor) -> Noise:
        """Return the batch's noise, or one drawn from torch's generator for the rows of x [B, ...]."""
        drawn = _current.get()
        return drawn or Noise(torch.randint(torch.iinfo(torch.int64).max, (len(x), 1), device=x.device))

    def _tokens(self, noise: Noise, length: int) -> tuple[Tensor, Tensor]:
        """Return two int32 [B, S], a hash of sample, token index and module."""
        keys, places = noise
        if places is None:
            places = torch.arange(length, device=keys.device)[None]
        mixed = _mix(keys[:, :length] + _mix(places[:, :length] + (self.site << 20)))
        return (mixed >> 32).int(), (mixed << 32 >> 32).int()

    def _dropped(self, x: Tensor, hashed: Tensor) -> Tensor:
        kept = hashed >= round(self.rate * 2**32) - 2**31
        return x * kept / (1 - self.rate)


class DropPath(Dropout):
    """Stochastic depth: zero a sample's whole branch with probability `rate`, else scale it by 1 / (1 - rate).

    Huang et al. 2016, arXiv:1603.09382; in training only. In a row of several samples, each is dropped by itself.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, D] -> [B, S, D]."""
        if not self.active:
            return x
        keys = self.noise(x).keys[:, : x.shape[1], None]
        mixed = _mix(keys + _mix(torch.full_like(keys, self.site << 20)))
        high, low = (mixed >> 32).int(), (mixed << 32 >> 32).int()
        return self._dropped(x, _hash(high, low, torch.zeros_like(low)))


def path_rates(rate: float, layers: int) -> list[float]:
    """Return the rate of each block, rising evenly from 0 in the first to `rate` in the last."""
    return [rate * layer / max(1, layers - 1) for layer in range(layers)]


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's step and finaliser (Steele, Lea, Flood 2014), int64: products wrap, shifts are logical."""
    x = x + -0x61C8864680B583EB
    x = (x ^ (x >> 30 & (1 << 34) - 1)) * -0x40A7B892E31B1A47
    x = (x ^ (x >> 27 & (1 << 37) - 1)) * -0x6B2FB644ECCEEE15
    return x ^ (x >> 31 & (1 << 33) - 1)


def _hash(high: Tensor, low: Tensor, lanes: Tensor) -> Tensor:
    """MurmurHash3's finaliser on broadcast int32; `high` enters before it, `low` within it -> int32."""
    x = high + lanes * -0x61C88647
    x = (x ^ (x >> 16 & 0xFFFF)) * -0x7A143595
    x = (x ^ (x >> 13 & 0x7FFFF) ^ low) * -0x3D4D51CB
    return x ^ (x >> 16 & 0xFFFF)
