"""Captions by an LSTM with soft attention (Show, Attend and Tell, arXiv 1502.03044)."""

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
from visft.modeling.heads.common.full_precision import without_autocast


@VISFT_HEADS_REGISTRY.register()
class CaptionHead(CaptioningHead):
    """An LSTM that attends to the cells before each word, with the doubly stochastic regulariser (section 4.2.1):
    over a caption, the attention on each cell should sum to 1."""

    class_layers = ("decoder.embedding", "decoder.fc")

    @configurable
    def __init__(
        self,
        *,
        in_channels: int,
        vocabulary: Vocabulary,
        attention_dim: int = 384,
        embedding_dim: int = 384,
        hidden_dim: int = 384,
        dropout: float = 0.5,
        attention_weight: float = 1.0,
        **captioning: Any,
    ):
        """
        Args:
            in_channels: of the feature map.
            attention_dim: width in which cells and state are compared.
            embedding_dim: of a word.
            hidden_dim: of the LSTM's state.
            dropout: before the words' scores.
            attention_weight: of the regulariser.
            vocabulary, captioning: see `CaptioningHead`.
        """
        widths = (attention_dim, embedding_dim, hidden_dim)
        decoder = SoftAttentionDecoder(in_channels, len(vocabulary), *widths, dropout)
        super().__init__(decoder, vocabulary=vocabulary, **captioning)
        self.attention_weight = attention_weight

    @classmethod
    def from_config(cls, cfg: CfgNode, name: str, input_shape: ShapeSpec) -> dict:
        node = cfg.MODEL.VISFT[name.upper()]
        return cls.common_config(cfg, name, input_shape) | {
            "attention_dim": node.ATTENTION_DIM,
            "embedding_dim": node.EMBEDDING_DIM,
            "hidden_dim": node.HIDDEN_DIM,
            "attention_weight": node.ATTENTION_WEIGHT,
        }

    def attention_losses(self, attention: Tensor, captions: Tensor) -> dict[str, Tensor]:
        """Mean over captions and cells of (1 - sum over words of the attention)^2, equation 14."""
        missing = (1 - attention.float().sum(1)).square().sum()
        return {"loss_attention": self.attention_weight * missing / (captions * attention.shape[2])}


class SoftAttentionDecoder(CaptionDecoder):
    """The LSTM. Its state starts from the mean cell; before each word it attends to the cells, and a gate read from
    the state weighs what it saw (section 4.2.1, beta). Modules are named as in the authors' files.

    It computes in float32 under any autocast: a recurrent state would accumulate rounding errors.
    """

    def __init__(
        self,
        in_channels: int,
        num_words: int,
        attention_dim: int,
        embedding_dim: int,
        hidden_dim: int,
        dropout: float,
    ):
        super().__init__()
        self.attention = SoftAttention(in_channels, hidden_dim, attention_dim)
        self.embedding = nn.Embedding(num_words, embedding_dim)
        self.decode_step = nn.LSTMCell(embedding_dim + in_channels, hidden_dim)
        self.init_h = nn.Linear(in_channels, hidden_dim)
        self.init_c = nn.Linear(in_channels, hidden_dim)
        self.f_beta = nn.Linear(hidden_dim, in_channels)
        self.fc = nn.Linear(hidden_dim, num_words)
        self.dropout = dropout
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        nn.init.uniform_(self.fc.weight, -0.1, 0.1)
        nn.init.zeros_(self.fc.bias)

    @without_autocast
    def forward(self, cells: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        # Fewer, larger operations: what does not depend on the state is computed for all words at once, and what is
        # linear in it by one product.
        layers = (self.attention.decoder_att, self.f_beta)
        weight = torch.cat((*(layer.weight for layer in layers), self.decode_step.weight_hh))
        bias = torch.cat((*(layer.bias for layer in layers), self.decode_step.bias_hh))
        words, seen_weight = self._words(tokens)
        sizes = [len(layer.weight) for layer in layers] + [words.shape[2]]
        cells, compared, h, c = self.start(cells)
        hidden, attention = [], []
        for word in words.unbind(1):
            read = F.linear(h, weight, bias).split(sizes, dim=1)
            h, c, alpha = self.attention(cells, compared, c, read, word, seen_weight)
            hidden.append(h)
            attention.append(alpha)
        return torch.stack(hidden, dim=1), torch.stack(attention, dim=1)

    def scores(self, hidden: Tensor) -> Tensor:
        return self.fc(F.dropout(hidden, self.dropout, self.training))

    @without_autocast
    def start(self, cells: Tensor) -> tuple[Tensor, ...]:
        """Cells, cells as the attention compares them, h, c."""
        mean = cells.mean(1)
        return cells, self.attention.encoder_att(cells), self.init_h(mean), self.init_c(mean)

    @without_autocast
    def step(self, state: tuple[Tensor, ...], tokens: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        cells, compared, h, c = state
        lstm = self.decode_step
        read = self.attention.decoder_att(h), self.f_beta(h), F.linear(h, lstm.weight_hh, lstm.bias_hh)
        h, c, alpha = self.attention(cells, compared, c, read, *self._words(tokens))
        return h, alpha, (cells, compared, h, c)

    def _words(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The words' part of the LSTM's gates `[..., 4 H]`, and the weight `[4 H, C]` of the attended cells' part."""
        weight = self.decode_step.weight_ih.split(
            (self.embedding.embedding_dim, self.f_beta.out_features), dim=1
        )
        return F.linear(self.embedding(tokens), weight[0], self.decode_step.bias_ih), weight[1]


class SoftAttention(nn.Module):
    """One step of the LSTM with its additive attention (equations 4 and 5), where cells and state meet in a ReLU."""

    def __init__(self, in_channels: int, hidden_dim: int, attention_dim: int):
        super().__init__()
        self.encoder_att = nn.Linear(in_channels, attention_dim)
        self.decoder_att = nn.Linear(hidden_dim, attention_dim)
        self.full_att = nn.Linear(attention_dim, 1)

    def forward(
        self,
        cells: Tensor,
        compared: Tensor,
        c: Tensor,
        read: tuple[Tensor, Tensor, Tensor],
        word: Tensor,
        seen_weight: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Advance by one word: the new h and c, and the attention on the cells `[N, P]`, which sums to 1.

        Args:
            cells, compared: `[N, P, C]`, and `encoder_att` of them `[N, P, A]`.
            read: linear in h: for the attention (`decoder_att`) `[N, A]`, the gate beta `[N, C]` and the LSTM's gates
                `[N, 4 H]`.
            word, seen_weight: as `SoftAttentionDecoder._words` gives them, of one word.
        """
        attended, beta, recurrent = read
        alpha = self.full_att(F.relu(compared + attended[:, None])).squeeze(2).softmax(1)
        seen = torch.bmm(alpha[:, None], cells)[:, 0]
        gates = word + recurrent + F.linear(beta.sigmoid() * seen, seen_weight)
        i, f, g, o = gates.chunk(4, dim=1)  # as nn.LSTMCell has them
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c, alpha
