"""Mask2Former's transformer decoder (arXiv 2112.01527, section 3.2), on one scale."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visft.modeling.heads.common.layers import MLP, Attention, xavier_init


@dataclass(frozen=True)
class MaskOutput:
    """Predictions before the first layer and after each, the last one last."""

    logits: Tensor
    """[layers + 1, N, Q, classes + 1], no-object last"""
    masks: Tensor
    """[layers + 1, N, Q, h, w] logits"""


class CrossAttentionLayer(nn.Module):
    """Post-norm masked cross-attention."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.multihead_attn = Attention(dim, num_heads)
        self.norm = nn.LayerNorm(dim)

    def forward(
        self, x: Tensor, query_pos: Tensor, memory: Tensor, placed_memory: Tensor, allowed: Tensor
    ) -> Tensor:
        return self.norm(x + self.multihead_attn(x + query_pos, placed_memory, memory, allowed))


class SelfAttentionLayer(nn.Module):
    """Post-norm self-attention of the queries."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.self_attn = Attention(dim, num_heads)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, query_pos: Tensor) -> Tensor:
        placed = x + query_pos
        return self.norm(x + self.self_attn(placed, placed, x))


class FeedForwardLayer(nn.Module):
    """Post-norm feed-forward network."""

    def __init__(self, dim: int, feedforward_dim: int):
        super().__init__()
        self.linear1 = nn.Linear(dim, feedforward_dim)
        self.linear2 = nn.Linear(feedforward_dim, dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.linear2(F.relu(self.linear1(x))))


class MaskDecoder(nn.Module):
    """Queries that attend, layer by layer, to the cells inside the mask that they last predicted."""

    def __init__(
        self,
        *,
        dim: int,
        num_classes: int,
        num_queries: int,
        num_layers: int,
        num_heads: int,
        feedforward_dim: int,
    ):
        super().__init__()

        def layers(kind: type[nn.Module], *args: int) -> nn.ModuleList:
            return nn.ModuleList(kind(*args) for _ in range(num_layers))

        self.transformer_cross_attention_layers = layers(CrossAttentionLayer, dim, num_heads)
        self.transformer_self_attention_layers = layers(SelfAttentionLayer, dim, num_heads)
        self.transformer_ffn_layers = layers(FeedForwardLayer, dim, feedforward_dim)
        xavier_init(self)
        self.decoder_norm = nn.LayerNorm(dim)
        self.query_feat = nn.Embedding(num_queries, dim)
        self.query_embed = nn.Embedding(num_queries, dim)
        self.level_embed = nn.Embedding(1, dim)
        self.class_embed = nn.Linear(dim, num_classes + 1)
        self.mask_embed = MLP(dim, dim, dim, 3)

    def forward(self, mask_features: Tensor, memory: Tensor, pos: Tensor) -> MaskOutput:
        """Maps [N, D, h, w], [N, D, h, w] and [1, D, h, w] -> predictions."""
        n = len(memory)
        memory = memory.flatten(2).transpose(1, 2) + self.level_embed.weight
        placed_memory = memory + pos.flatten(2).transpose(1, 2)
        query_pos = self.query_embed.weight.expand(n, -1, -1)
        x = self.query_feat.weight.expand(n, -1, -1)
        states = [self.decoder_norm(x)]
        masks = [self._masks(states[0], mask_features)]
        layers = zip(
            self.transformer_cross_attention_layers,
            self.transformer_self_attention_layers,
            self.transformer_ffn_layers,
            strict=True,
        )
        for cross_attention, self_attention, feed_forward in layers:
            x = cross_attention(x, query_pos, memory, placed_memory, self._allowed(masks[-1]))
            x = feed_forward(self_attention(x, query_pos))
            states.append(self.decoder_norm(x))
            masks.append(self._masks(states[-1], mask_features))
        return MaskOutput(self.class_embed(torch.stack(states)), torch.stack(masks))

    def _masks(self, state: Tensor, mask_features: Tensor) -> Tensor:
        """[N, Q, D], [N, D, h, w] -> [N, Q, h, w]."""
        return (self.mask_embed(state) @ mask_features.flatten(2)).unflatten(-1, mask_features.shape[-2:])

    @staticmethod
    def _allowed(masks: Tensor) -> Tensor:
        """[N, Q, h, w] logits -> [N, 1, Q, h * w]: a query attends inside its mask, or everywhere if that is empty.

        The maps have the memory's size, so the paper's resizing is not needed.
        """
        inside = masks.detach().flatten(2) >= 0
        return (inside | ~inside.any(-1, keepdim=True))[:, None]
