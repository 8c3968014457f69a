"""BERT for pretraining, Devlin et al. 2018, arXiv:1810.04805. Written for one device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pretrain.models.layers import MlmHead, TextEmbeddings, TextEncoder, init_bert, own_segment

if TYPE_CHECKING:
    from pretrain.schema.encoders import BertConfig


class Bert(nn.Module):
    """Encoder with an MLM head at masked positions (decoder tied to the word embedding) and an NSP head."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.embeddings = TextEmbeddings(config)
        self.encoder = TextEncoder.of(config, config.width, config.heads)
        self.pooler = nn.Linear(config.width, config.width)
        self.mlm = MlmHead(config, config.width, config.activation)
        self.nsp = nn.Linear(config.width, 2)
        self.apply(init_bert)

    def forward(
        self,
        tokens: Tensor,
        types: Tensor,
        attention: Tensor,
        positions: Tensor,
        segments: Tensor | None = None,
        places: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """tokens, types: int64 [B, S]; attention: bool [B, S], False on padding; positions: int64 [B, M].

        segments, places: int64 [B, S], for rows of several samples (see `inputs.packing`).

        -> word logits float32 [B, M, V] at `positions`, next-sentence logits float32 [B, 2] (0 is next, 1 is random).
        """
        hidden = self.encoder(self.embeddings(tokens, types, places), own_segment(attention, segments))
        pooled = torch.tanh(self.pooler(hidden[:, 0]))
        return self.mlm(hidden, positions, self.embeddings.word), self.nsp(pooled).float()
