"""A caption decoder trained on frozen features, for the captioning benchmarks of both suites."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from towerbench import readout_training
from towerbench.caption_decoder import CaptionDecoder, Words

Captioned = tuple[torch.Tensor, Sequence[Sequence[str]]]
"""Cells `[N, P, C]` of images, and the captions of each."""


@dataclass(frozen=True)
class Recipe:
    """Size and training of a decoder, the same for every tower.

    Args:
        dim: width of words and cells. layers: of the decoder.
        epochs: their number. The best one by the validation split is kept.
        rate: peak of the learning rate, which rises and falls once.
        length: maximum number of words in a caption.
        min_count: number of occurrences in the training captions from which a word is known.
        grid: the decoder sees an image as `grid` x `grid` cells.
    """

    dim: int = 96
    layers: int = 2
    epochs: int = 16
    batch: int = 32
    rate: float = 2e-3
    weight_decay: float = 0.05
    length: int = 20
    min_count: int = 2
    grid: int = 8


@dataclass(frozen=True)
class Captioner:
    """A trained decoder with its vocabulary."""

    decoder: CaptionDecoder
    words: Words

    def said(self, cells: torch.Tensor) -> list[str]:
        """Return captions of images `[N, P, C]`."""
        return [text for part in cells.split(100) for text in self.decoder.say(part, self.words)]

    def loss(self, side: Captioned, rows: torch.Tensor, epoch: int) -> torch.Tensor:
        """Return the teacher-forcing loss of one caption per image, another one every epoch: the mean over words."""
        texts = [side[1][i] for i in rows.tolist()]
        chosen = [each[(epoch + i) % len(each)] for i, each in zip(rows.tolist(), texts, strict=True)]
        tokens = [self.words.encode(text, self.decoder.length) for text in chosen]
        lengths = torch.tensor([len(each) - 1 for each in tokens])
        padded = pad_sequence(tokens, batch_first=True)
        # Cells of many images are kept in half precision.
        hidden = self.decoder(side[0][rows].float(), padded[:, :-1])
        there = torch.arange(hidden.shape[1]) < lengths[:, None]
        # Only for positions with a word, because the scores of all words are by far the largest tensor.
        scores = self.decoder.scores(hidden[there])
        return F.cross_entropy(scores, padded[:, 1:][there], reduction="sum") / lengths.sum()


def trained(train: Captioned, validation: Captioned, recipe: Recipe, seed: int) -> Captioner:
    """Train a decoder from the same start for every tower. The epoch with the lowest validation loss is kept."""
    words = Words((text for texts in train[1] for text in texts), recipe.min_count)
    torch.manual_seed(seed)
    decoder = CaptionDecoder(
        train[0].shape[2], len(words), length=recipe.length, dim=recipe.dim, layers=recipe.layers
    )
    captioner = Captioner(decoder, words)
    every = torch.arange(len(validation[0]))

    def quality() -> float:
        parts = [captioner.loss(validation, rows, 0) * len(rows) for rows in every.split(100)]
        return -float(sum(parts)) / len(every)

    readout_training.train(
        decoder,
        partial(captioner.loss, train),
        len(train[0]),
        epochs=recipe.epochs,
        batch=recipe.batch,
        rate=recipe.rate,
        weight_decay=recipe.weight_decay,
        clip=1.0,
        quality=quality,
    )
    return captioner
