"""ELECTRA, Clark et al. 2020, arXiv:2003.10555. Written for one device.

Deviation: a replacement is sampled by inverse CDF from one uniform number per masked position, not as the maximum over
Gumbel noise per word. The distribution is the same, and the number comes with the sample.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.models.layers import ACTIVATIONS, MlmHead, TextEmbeddings, TextEncoder, init_bert, own_segment

if TYPE_CHECKING:
    from pretrain.schema.encoders import ElectraConfig


class ElectraOutput(NamedTuple):
    """Outputs of generator and discriminator."""

    word_logits: Tensor  # float32 [B, M, V], generator, at the masked positions
    replaced_logits: Tensor  # float32 [B, S], discriminator; above 0 predicts a replaced token
    replaced: Tensor  # bool [B, S], the targets
    corrupted: Tensor  # int64 [B, S], input of the discriminator


class RtdHead(nn.Module):
    """Replaced-token head: Linear, activation, Linear to one logit per token."""

    def __init__(self, width: int, activation: str) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.transform = nn.Linear(width, width)
        self.out = nn.Linear(width, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, S, D] -> float32 [B, S]."""
        return self.out(self.activation(self.transform(hidden))).squeeze(-1).float()


class Electra(nn.Module):
    """A small generator fills in masked words; the discriminator predicts which words differ from the original.

    Word, position and type embeddings and their norm are shared, at the discriminator's embedding width.
    """

    def __init__(self, config: ElectraConfig) -> None:
        super().__init__()
        width, heads = config.generator_size
        self.embeddings = TextEmbeddings(config)
        self.generator = TextEncoder.of(config, width, heads)
        self.mlm = MlmHead(config, width)  # always GELU, as published
        self.discriminator = TextEncoder.of(config, config.width, config.heads)
        self.rtd = RtdHead(config.width, config.activation)
        self.apply(init_bert)

    def forward(
        self,
        tokens: Tensor,
        types: Tensor,
        attention: Tensor,
        positions: Tensor,
        labels: Tensor,
        label_weights: Tensor,
        uniforms: Tensor,
        segments: Tensor | None = None,
        places: Tensor | None = None,
    ) -> ElectraOutput:
        """tokens (masked), types: int64 [B, S]; attention: bool [B, S]; the rest [B, M]: positions and labels int64,
        label_weights float (0 where a slot is empty), uniforms float32 in [0, 1).

        segments, places: int64 [B, S], for rows of several samples (see `inputs.packing`).
        """
        key_mask = own_segment(attention, segments)
        hidden = self.generator(self.embeddings(tokens, types, places), key_mask)
        word_logits = self.mlm(hidden, positions, self.embeddings.word)
        filled = label_weights > 0
        sampled = sample_words(word_logits.detach(), uniforms)
        corrupted = put(tokens, positions, sampled, filled)
        original = put(tokens, positions, labels, filled)
        judged = self.discriminator(self.embeddings(corrupted, types, places), key_mask)
        return ElectraOutput(word_logits, self.rtd(judged), corrupted != original, corrupted)


@torch.no_grad()
def sample_words(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Sample from softmax(logits) by inverse CDF: logits float32 [..., V], uniforms [...] in [0, 1) -> int64 [...]."""
    cumulative = logits.softmax(-1).cumsum(-1)
    targets = uniforms.to(cumulative.dtype)[..., None] * cumulative[..., -1:]
    drawn = torch.searchsorted(cumulative, targets, right=True).squeeze(-1)
    # rounding may raise a target to the total, whose index is one past the last word
    return drawn.clamp(max=logits.shape[-1] - 1)


def put(tokens: Tensor, positions: Tensor, values: Tensor, filled: Tensor) -> Tensor:
    """Write `values` [B, M] to `tokens` [B, S] at `positions` [B, M] where `filled` [B, M]; ignore empty slots."""
    length = tokens.shape[1]
    # empty slots also point at position 0: write them to an extra column, which is cut off
    targets = torch.where(filled, positions, length)
    return F.pad(tokens, (0, 1)).scatter(1, targets, values)[:, :length]
