"""A fresh caption head on frozen features: what the captioning benchmarks of both suites share."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn.utils.rnn import pad_sequence

from visft.heads.caption_search import beam_search
from visft.heads.caption_transformer import TransformerCaptionHead
from visft.heads.vocabulary import Vocabulary

from . import readout_training

Captioned = tuple[torch.Tensor, Sequence[Sequence[str]]]
"""Cells `[N, P, C]` of pictures, and the captions of each."""


@dataclass(frozen=True)
class Recipe:
    """How a head is made and trained; the same for every tower.

    Args:
        dim: width of words and cells. layers: of the decoder.
        epochs: most of them; the best by the validation split is kept.
        rate: the peak of the learning rate, which rises and falls once.
        length: most words of a caption.
        min_count: how often the training captions must have a word for the head to know it.
        grid: pictures are seen in `grid` x `grid` cells.
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


def new_head(channels: int, vocabulary: Vocabulary, recipe: Recipe, seed: int) -> TransformerCaptionHead:
    """The same start for every tower."""
    torch.manual_seed(seed)
    return TransformerCaptionHead(
        in_channels=channels,
        vocabulary=vocabulary,
        dim=recipe.dim,
        num_layers=recipe.layers,
        num_attention_heads=4,
        feedforward_dim=2 * recipe.dim,
        grid=recipe.grid,
        max_length=recipe.length,
        beam_size=1,
    )


def trained(train: Captioned, validation: Captioned, recipe: Recipe, seed: int) -> TransformerCaptionHead:
    """The head after the epoch whose loss on the validation split is lowest."""
    vocabulary = Vocabulary.build((text for texts in train[1] for text in texts), recipe.min_count)
    head = new_head(train[0].shape[2], vocabulary, recipe, seed)
    every = torch.arange(len(validation[0]))

    def quality() -> float:
        parts = [_loss(head, validation, rows, 0) * len(rows) for rows in every.split(100)]
        return -float(sum(parts)) / len(every)

    readout_training.train(
        head,
        partial(_loss, head, train),
        len(train[0]),
        epochs=recipe.epochs,
        batch=recipe.batch,
        rate=recipe.rate,
        weight_decay=recipe.weight_decay,
        clip=1.0,
        quality=quality,
    )
    return head


def _loss(head: TransformerCaptionHead, side: Captioned, rows: torch.Tensor, epoch: int) -> torch.Tensor:
    """Of one caption of each picture, another every epoch."""
    texts = [side[1][i] for i in rows.tolist()]
    chosen = [each[(epoch + i) % len(each)] for i, each in zip(rows.tolist(), texts, strict=True)]
    tokens = [torch.tensor(head.vocabulary.encode(text, head.max_length)) for text in chosen]
    lengths = torch.tensor([len(each) - 1 for each in tokens])
    padded = pad_sequence(tokens, batch_first=True, padding_value=head.vocabulary.pad)
    normalizers = torch.tensor([float(lengths.sum()), float(len(rows))])
    # Cells of many pictures are kept in half precision.
    return sum(head.caption_losses(side[0][rows].float(), padded, lengths, normalizers).values())


def said(head: TransformerCaptionHead, cells: torch.Tensor) -> list[str]:
    """Captions of pictures `[N, P, C]`, the most probable word at each step."""
    words = head.vocabulary
    found = []
    for part in cells.split(100):
        found += beam_search(
            head.decoder,
            part,
            start=words.start,
            end=words.end,
            forbidden=(words.pad, words.unknown, words.start),
            max_length=head.max_length,
        )
    return [" ".join(words.decode(ids)) for ids, _, _ in found]
