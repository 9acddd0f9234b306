"""DETR's transformer as ViSFT has it: a narrow encoder with a task token, a residual, and a wider decoder."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visft.modeling.heads.common.layers import Attention, xavier_init

_TASK_TABLE = 256
"""Rows of the table of task tokens. One is used; the table is the authors', so that their files fit."""


class EncoderLayer(nn.Module):
    """Post-norm: self-attention, then a feed-forward network."""

    def __init__(self, dim: int, num_heads: int, feedforward_dim: int, dropout: float):
        super().__init__()
        self.self_attn = Attention(dim, num_heads, dropout)
        self.linear1 = nn.Linear(dim, feedforward_dim)
        self.linear2 = nn.Linear(feedforward_dim, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, pos: Tensor, allowed: Tensor | None) -> Tensor:
        """[N, L, D] -> [N, L, D]; `pos` is added to queries and keys."""
        placed = x + pos
        x = self.norm1(x + self.dropout(self.self_attn(placed, placed, x, allowed)))
        hidden = self.dropout(F.relu(self.linear1(x)))
        return self.norm2(x + self.dropout(self.linear2(hidden)))


class DecoderLayer(nn.Module):
    """Post-norm: self-attention of the queries, cross-attention to the memory, then a feed-forward network."""

    def __init__(self, dim: int, num_heads: int, feedforward_dim: int, dropout: float):
        super().__init__()
        self.self_attn = Attention(dim, num_heads, dropout)
        self.multihead_attn = Attention(dim, num_heads, dropout)
        self.linear1 = nn.Linear(dim, feedforward_dim)
        self.linear2 = nn.Linear(feedforward_dim, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, query_pos: Tensor, memory: Tensor, placed_memory: Tensor, allowed: Tensor | None
    ) -> Tensor:
        """[N, Q, D] -> [N, Q, D]; `memory` [N, L, D] are the values, `placed_memory` (memory + position) the keys."""
        placed = x + query_pos
        x = self.norm1(x + self.dropout(self.self_attn(placed, placed, x)))
        attended = self.multihead_attn(x + query_pos, placed_memory, memory, allowed)
        x = self.norm2(x + self.dropout(attended))
        hidden = self.dropout(F.relu(self.linear1(x)))
        return self.norm3(x + self.dropout(self.linear2(hidden)))


class Encoder(nn.Module):
    """A stack of encoder layers."""

    def __init__(self, num_layers: int, *layer: Any):
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(*layer) for _ in range(num_layers))

    def forward(self, x: Tensor, pos: Tensor, allowed: Tensor | None) -> Tensor:
        """[N, L, D] -> [N, L, D]."""
        for layer in self.layers:
            x = layer(x, pos, allowed)
        return x


class Decoder(nn.Module):
    """A stack of decoder layers; one LayerNorm is on every layer's output, but not carried on."""

    def __init__(self, num_layers: int, dim: int, *layer: Any):
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(dim, *layer) for _ in range(num_layers))
        self.norm = nn.LayerNorm(dim)

    def forward(self, query_pos: Tensor, memory: Tensor, pos: Tensor, allowed: Tensor | None) -> Tensor:
        """Query positions [N, Q, D] and memory [N, L, D] -> hidden states of all layers [layers, N, Q, D]."""
        x, placed_memory, states = torch.zeros_like(query_pos), memory + pos, []
        for layer in self.layers:
            x = layer(x, query_pos, memory, placed_memory, allowed)
            states.append(x)
        return self.norm(torch.stack(states))


class DETRTransformer(nn.Module):
    """Encoder, projection to the decoder's width, decoder."""

    def __init__(
        self,
        *,
        encoder_layers: int,
        encoder_dim: int,
        decoder_layers: int,
        decoder_dim: int,
        num_heads: int,
        feedforward_dim: int,
        dropout: float,
    ):
        super().__init__()
        self.encoder = Encoder(encoder_layers, encoder_dim, num_heads, feedforward_dim, dropout)
        self.enc2dec_proj = nn.Linear(encoder_dim, decoder_dim)
        self.pos_embed_proj = nn.Linear(encoder_dim, decoder_dim)
        self.decoder = Decoder(decoder_layers, decoder_dim, num_heads, feedforward_dim, dropout)
        xavier_init(self)
        self.task_embeddings_enc = nn.Embedding(_TASK_TABLE, encoder_dim)

    def forward(self, x: Tensor, pos: Tensor, query_pos: Tensor, valid: Tensor | None) -> Tensor:
        """Hidden states of the queries.

        Args:
            x: [N, L, E] projected features. pos: [N or 1, L, E].
            query_pos: [Q, D].
            valid: [N, L] bool, False where a cell is padding; None: no padding.

        Returns:
            [layers, N, Q, D].
        """
        encoded = self.encoder(
            # The task token goes first, at position zero; padding never hides it.
            torch.cat((self.task_embeddings_enc.weight[:1].expand(len(x), 1, -1), x), dim=1),
            F.pad(pos, (0, 0, 1, 0)),
            None if valid is None else F.pad(valid, (1, 0), value=True)[:, None, None],
        )
        memory = self.enc2dec_proj(x + encoded[:, 1:])
        query_pos = query_pos.expand(len(x), -1, -1)
        allowed = None if valid is None else valid[:, None, None]
        return self.decoder(query_pos, memory, self.pos_embed_proj(pos), allowed)
