"""Captions by a small Transformer decoder (arXiv 1706.03762, pre-norm), the modern choice beside the LSTM."""

from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from torch import Tensor, nn
from torch.nn import functional as F

from visft.modeling.heads.build import VISFT_HEADS_REGISTRY
from visft.modeling.heads.captioning.beam_search import CaptionDecoder
from visft.modeling.heads.captioning.captioning_head import CaptioningHead
from visft.modeling.heads.captioning.vocabulary import Vocabulary
from visft.modeling.heads.common.layers import check_divisible
from visft.modeling.heads.common.position_encoding import sine_position_encoding


@VISFT_HEADS_REGISTRY.register()
class TransformerCaptionHead(CaptioningHead):
    """A Transformer over the words so far, which attends to the cells."""

    class_layers = ("decoder.embedding", "decoder.bias")

    @configurable
    def __init__(
        self,
        *,
        in_channels: int,
        vocabulary: Vocabulary,
        dim: int = 384,
        num_layers: int = 3,
        num_attention_heads: int = 8,
        feedforward_dim: int = 1024,
        dropout: float = 0.1,
        max_length: int = 30,
        **captioning: Any,
    ):
        """
        Args:
            in_channels: of the feature map.
            dim: width of words and cells.
            dropout: on words and in every layer.
            vocabulary, max_length, captioning: see `CaptioningHead`.

        Raises:
            ConfigError: the width is no multiple of the number of heads, or of 4 (positions in two directions).
        """
        check_divisible("EMBEDDING_DIM", dim, num_attention_heads, "NUM_ATTENTION_HEADS")
        check_divisible("EMBEDDING_DIM", dim, 4, "sine and cosine of two directions")
        layer = (dim, num_attention_heads, feedforward_dim, dropout)
        decoder = TransformerDecoder(in_channels, len(vocabulary), max_length, num_layers, *layer)
        super().__init__(decoder, vocabulary=vocabulary, max_length=max_length, **captioning)

    @classmethod
    def from_config(cls, cfg: CfgNode, name: str, input_shape: ShapeSpec) -> dict:
        node = cfg.MODEL.VISFT[name.upper()]
        return cls.common_config(cfg, name, input_shape) | {
            "dim": node.EMBEDDING_DIM,
            "num_layers": node.NUM_LAYERS,
            "num_attention_heads": node.NUM_ATTENTION_HEADS,
            "feedforward_dim": node.FEEDFORWARD_DIM,
        }


class TransformerDecoder(CaptionDecoder):
    """Words with learned positions, cells with sine positions, layers of `DecoderLayer`; a word's embedding is also
    what its score is read with."""

    def __init__(
        self,
        in_channels: int,
        num_words: int,
        max_length: int,
        num_layers: int,
        dim: int,
        num_heads: int,
        feedforward_dim: int,
        dropout: float,
    ):
        super().__init__()
        self.input_proj = nn.Linear(in_channels, dim)
        self.embedding = nn.Embedding(num_words, dim)
        self.position = nn.Embedding(max_length + 1, dim)  # of the start and each word
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(
            DecoderLayer(dim, num_heads, feedforward_dim, dropout) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(dim)
        self.bias = nn.Parameter(torch.zeros(num_words))
        for table in (self.embedding, self.position):
            nn.init.normal_(table.weight, std=dim**-0.5)

    def forward(self, cells: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return self._read(*self.start(cells)[:1], tokens)

    def scores(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.embedding.weight, self.bias)

    def start(self, cells: Tensor) -> tuple[Tensor, ...]:
        """The memory, and no words."""
        memory, side = self.input_proj(cells), int(cells.shape[1] ** 0.5)
        valid = torch.ones(1, side, side, dtype=torch.bool, device=cells.device)
        position = sine_position_encoding(valid, memory.shape[2]).flatten(2).transpose(1, 2)
        return memory + position.to(memory.dtype), torch.zeros(
            len(cells), 0, dtype=torch.int64, device=cells.device
        )

    def step(self, state: tuple[Tensor, ...], tokens: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        # All words anew at each step: captions are short, and keys and values kept would be state in every layer.
        memory, words = state[0], torch.cat((state[1], tokens[:, None]), dim=1)
        hidden, attention = self._read(memory, words)
        return hidden[:, -1], attention[:, -1], (memory, words)

    def _read(self, memory: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        length = tokens.shape[1]
        x = self.dropout(self.embedding(tokens) + self.position.weight[:length])
        later = torch.ones(length, length, dtype=torch.bool, device=tokens.device).triu(1)
        attention = memory.new_zeros(*tokens.shape, memory.shape[1])
        for layer in self.layers:
            x, attention = layer(x, memory, later)
        return self.norm(x), attention


class DecoderLayer(nn.Module):
    """Self-attention on the words so far, attention to the cells, an MLP; each on the normalised input, added to it."""

    def __init__(self, dim: int, num_heads: int, feedforward_dim: int, dropout: float):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.self_attn = nn.MultiheadAttention(dim, num_heads, dropout=dropout, batch_first=True)
        self.cross_attn = nn.MultiheadAttention(dim, num_heads, dropout=dropout, batch_first=True)
        self.linear1, self.linear2 = nn.Linear(dim, feedforward_dim), nn.Linear(feedforward_dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, memory: Tensor, later: Tensor) -> tuple[Tensor, Tensor]:
        """Words `[N, T, D]`, memory `[N, P, D]`, mask `[T, T]` of what a word may not see -> words, attention
        `[N, T, P]` (mean over attention heads)."""
        y = self.norm1(x)
        x = x + self.dropout(self.self_attn(y, y, y, attn_mask=later, need_weights=False)[0])
        seen, attention = self.cross_attn(self.norm2(x), memory, memory)
        x = x + self.dropout(seen)
        y = self.linear2(self.dropout(F.relu(self.linear1(self.norm3(x)))))
        return x + self.dropout(y), attention
