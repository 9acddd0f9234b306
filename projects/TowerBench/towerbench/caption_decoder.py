"""A small Transformer that captions the cells of a feature map, and its vocabulary."""

import math
import re
from collections import Counter
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_NO_WORD = re.compile(r"[^\w\s]|_")


class Words:
    """A vocabulary. Id 0 is padding, then come the words by falling frequency; the last three ids are special.

    Args:
        captions: of the training images.
        min_count: number of occurrences from which a word is known.
    """

    def __init__(self, captions: Iterable[str], min_count: int) -> None:
        counts = Counter(word for caption in captions for word in _split(caption))
        kept = (word for word, count in counts.items() if count >= min_count)
        self._words = ["", *sorted(kept, key=lambda word: (-counts[word], word))]
        self._numbers = {word: number for number, word in enumerate(self._words)}
        self.unknown, self.start, self.end = (len(self._words) + i for i in range(3))

    def __len__(self) -> int:
        return len(self._words) + 3

    def encode(self, text: str, length: int) -> Tensor:
        """Return ids between start and end, of at most `length` words."""
        numbers = [self._numbers.get(word, self.unknown) for word in _split(text)[:length]]
        return torch.tensor([self.start, *numbers, self.end])

    def decode(self, numbers: list[int]) -> str:
        """Return the words before the end."""
        return " ".join(self._words[number] for number in numbers[: numbers.index(self.end)])


def _split(text: str) -> list[str]:
    return _NO_WORD.sub(" ", text.lower().replace("'", "").replace("\u2019", "")).split()


class CaptionDecoder(nn.Module):
    """Words with learned positions attend to cells with sine positions (arXiv:1706.03762, pre-norm); a word's embedding
    is also what its score is read with.

    Args:
        channels: of a cell.
        words: number of ids.
        length: maximum number of words in a caption.
        dim: width of words and cells.
    """

    def __init__(self, channels: int, words: int, *, length: int, dim: int, layers: int) -> None:
        super().__init__()
        self.length = length
        self.input_proj = nn.Linear(channels, dim)
        self.embedding = nn.Embedding(words, dim)
        self.position = nn.Embedding(length + 1, dim)  # for the start and each word
        self.dropout = nn.Dropout(0.1)
        self.layers = nn.ModuleList(_Layer(dim, 4, 0.1) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.bias = nn.Parameter(torch.zeros(words))
        for table in (self.embedding, self.position):
            nn.init.normal_(table.weight, std=dim**-0.5)

    def forward(self, cells: Tensor, tokens: Tensor) -> Tensor:
        """Return the states `[N, T, dim]` that predict the word after each of `tokens` `[N, T]`.

        Args:
            cells: of a square, `[N, P, C]`.
        """
        return self.read(self.memory(cells), tokens)

    def memory(self, cells: Tensor) -> Tensor:
        """Return the keys and values that words attend to."""
        memory = self.input_proj(cells)
        return memory + _positions(math.isqrt(cells.shape[1]), memory.shape[2])

    def read(self, memory: Tensor, tokens: Tensor) -> Tensor:
        """As `forward`, from the result of `memory`."""
        length = tokens.shape[1]
        x = self.dropout(self.embedding(tokens) + self.position.weight[:length])
        later = torch.ones(length, length, dtype=torch.bool).triu(1)
        for layer in self.layers:
            x = layer(x, memory, later)
        return self.norm(x)

    def scores(self, hidden: Tensor) -> Tensor:
        """Return the scores of the next word from the states of `forward`: `[..., dim]` -> `[..., words]`."""
        return F.linear(hidden, self.embedding.weight, self.bias)

    @torch.no_grad()
    def say(self, cells: Tensor, words: Words) -> list[str]:
        """Decode greedily, for each of `[N, P, C]`. No caption is empty."""
        memory = self.memory(cells)
        tokens = torch.full((len(cells), 1), words.start)
        for step in range(self.length):
            scores = self.scores(self.read(memory, tokens)[:, -1])
            scores[:, [0, words.unknown, words.start, *([words.end] if step == 0 else [])]] = -torch.inf
            tokens = torch.cat((tokens, scores.argmax(1, keepdim=True)), dim=1)
            if (tokens == words.end).any(1).all():
                break
        return [words.decode([*row, words.end]) for row in tokens[:, 1:].tolist()]


class _Layer(nn.Module):
    """Causal self-attention, attention to the cells and an MLP, each on the normalised input and added to it."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(3))
        options = {"dropout": dropout, "batch_first": True}
        self.to_words = nn.MultiheadAttention(dim, heads, **options)
        self.to_cells = nn.MultiheadAttention(dim, heads, **options)
        self.mlp = nn.Sequential(
            nn.Linear(dim, 2 * dim), nn.ReLU(), nn.Dropout(dropout), nn.Linear(2 * dim, dim)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, memory: Tensor, later: Tensor) -> Tensor:
        """Words `[N, T, D]`, memory `[N, P, D]`, and mask `[T, T]` of words that a word may not see."""
        y = self.norms[0](x)
        x = x + self.dropout(self.to_words(y, y, y, attn_mask=later, need_weights=False)[0])
        # With weights, PyTorch computes attention in another way, which the published figures were measured with.
        x = x + self.dropout(self.to_cells(self.norms[1](x), memory, memory)[0])
        return x + self.dropout(self.mlp(self.norms[2](x)))


def _positions(side: int, dim: int) -> Tensor:
    """Return sine position encodings of a square's cells, `[side * side, dim]` (DETR, arXiv:2005.12872, A.4)."""
    half = dim // 2
    frequency = 10000.0 ** (-2 * torch.arange(half).div(2, rounding_mode="floor") / half)
    angle = (torch.arange(1.0, side + 1) / (side + 1e-6) * 2 * math.pi)[:, None] * frequency
    line = torch.stack((angle[:, 0::2].sin(), angle[:, 1::2].cos()), dim=-1).flatten(1)
    down, across = line[:, None].expand(-1, side, -1), line.expand(side, -1, -1)
    return torch.cat((down, across), dim=-1).flatten(0, 1)
