"""Reads words from feature maps by CTC, for the OCR benchmarks of both suites."""

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from towerbench import readout_training
from towerbench.dense_maps import in_chunks
from towerbench.features import FeatureStore, Images

LINES = 4
"""Number of words below each other in an image."""

BATCH, RATE = 32, 3e-3
WEIGHT_DECAYS = (0.01, 0.1)
HIDDEN = 128
BLANK = 3.0
"""Initial bias of every column towards blank. Without it, most of the tried starts learned letters at wrong columns,
from their neighbours: they knew the training words by heart and could not read others."""

Words = tuple[torch.Tensor, Sequence[str]]
"""Columns `[N, C, w]` of lines, and the word in each."""


class Reader(nn.Module):
    """Maps columns of features to letters by one hidden layer, which sees a column and its neighbours.

    Args:
        channels: of a column.
        alphabet: the letters, each once.
    """

    def __init__(self, channels: int, alphabet: str) -> None:
        super().__init__()
        self.alphabet = alphabet
        self.hidden = nn.Conv1d(channels, HIDDEN, 3, padding=1)
        self.letters = nn.Conv1d(HIDDEN, 2 * (1 + len(alphabet)), 3, padding=1)
        with torch.no_grad():
            self.letters.bias.view(2, -1)[:, 0] = BLANK

    def forward(self, columns: torch.Tensor) -> torch.Tensor:
        """`[N, C, w]` -> logarithmic probabilities `[2 w, N, 1 + letters]`; two per column. The first letter is
        blank."""
        found = self.letters(F.relu(self.hidden(columns)))
        halves = found.unflatten(1, (2, -1)).permute(3, 1, 0, 2).flatten(0, 1)
        return halves.log_softmax(-1)

    @torch.no_grad()
    def read(self, columns: torch.Tensor) -> list[str]:
        """Return the word in each of `[N, C, w]`."""
        return spelled(self(columns), self.alphabet)


def encoded(found: Sequence[str], alphabet: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the letters of all words in a row, as ids from 1, and the lengths of the words."""
    return torch.tensor([1 + alphabet.index(c) for word in found for c in word]), torch.tensor(
        [len(word) for word in found]
    )


def spelled(scores: torch.Tensor, alphabet: str) -> list[str]:
    """Decode the most probable path of each of `[T, N, 1 + letters]`, without repeats and blanks."""
    read = []
    for path in scores.argmax(-1).T:
        kept = [int(c) for c in torch.unique_consecutive(path)]
        read.append("".join(alphabet[c - 1] for c in kept if c))
    return read


def edit_distance(first: str, second: str) -> int:
    """Return the number of inserted, deleted and replaced letters (Levenshtein)."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        previous, row = row, [i]
        for j, b in enumerate(second, 1):
            row.append(min(previous[j] + 1, row[-1] + 1, previous[j - 1] + (a != b)))
    return row[-1]


def accuracies(read: Sequence[str], truth: Sequence[str]) -> np.ndarray:
    """Return `[N, 2]`: whether a word is right, and the share of its letters that need no edit."""
    return np.array(
        [(r == t, max(0.0, 1 - edit_distance(r, t) / len(t))) for r, t in zip(read, truth, strict=True)],
        np.float64,
    )


def trained(train: Words, validation: Words, alphabet: str, seed: int, epochs: int) -> Reader:
    """Train a reader with each weight decay, and return the one with the best characters on the validation split."""
    best, accuracy = None, -1.0
    for decay in WEIGHT_DECAYS:
        torch.manual_seed(seed)
        reader = Reader(train[0].shape[1], alphabet)
        readout_training.train(
            reader,
            partial(_loss, reader, train),
            len(train[0]),
            epochs=epochs,
            batch=BATCH,
            rate=RATE,
            weight_decay=decay,
            rise=0.15,
            clip=1.0,
        )
        read = [word for part in validation[0].split(1024) for word in reader.read(part.float())]
        found = accuracies(read, validation[1])[:, 1].mean()
        if found > accuracy:
            best, accuracy = reader, found
    return best


def _loss(reader: Reader, side: Words, rows: torch.Tensor, epoch: int) -> torch.Tensor:
    letters, lengths = encoded([side[1][i] for i in rows.tolist()], reader.alphabet)
    scores = reader(side[0][rows].float())  # columns of many words are kept in half precision
    widths = torch.full((len(rows),), len(scores))
    return F.ctc_loss(scores, letters, widths, lengths, zero_infinity=True)


def columns(tower: FeatureStore, images: Images, least: int) -> Iterator[torch.Tensor]:
    """Yield the columns of each line, with its rows averaged to two: `[n * LINES, 2 * C, w]` for some images at a time.

    Args:
        images: of `LINES` lines of equal height, squashed, `dense`.
        least: minimum number of columns: enough for the longest word, whatever the tower's patch size.
    """
    for _, maps in in_chunks(tower, images):
        maps = F.interpolate(maps, (2 * LINES, max(least, maps.shape[3])), mode="area")
        yield maps.unflatten(2, (LINES, 2)).permute(0, 2, 3, 1, 4).flatten(2, 3).flatten(0, 1)
