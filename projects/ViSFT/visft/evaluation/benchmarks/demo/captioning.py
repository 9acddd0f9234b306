"""A fresh caption head on the frozen tower: scenes of things that no fine-tuning scene shows, scored by CIDEr-D."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from visft.evaluation import captions
from visft.heads.caption_search import beam_search
from visft.heads.caption_transformer import TransformerCaptionHead
from visft.heads.vocabulary import Vocabulary

from ..features import FeatureStore, Pictures
from ..registry import Benchmark, Context, register
from . import regions, unseen

EPOCHS, BATCH, RATE, WEIGHT_DECAY = 16, 32, 2e-3, 0.05
DIM, LAYERS, LENGTH = 96, 2, 20


def new_head(channels: int, vocabulary: Vocabulary, seed: int) -> TransformerCaptionHead:
    """The same start for every tower."""
    torch.manual_seed(seed)
    return TransformerCaptionHead(
        in_channels=channels,
        vocabulary=vocabulary,
        dim=DIM,
        num_layers=LAYERS,
        num_attention_heads=4,
        feedforward_dim=2 * DIM,
        grid=regions.GRID,
        max_length=LENGTH,
        beam_size=1,
    )


def trained(
    train: tuple[torch.Tensor, Sequence[Sequence[str]]],
    validation: tuple[torch.Tensor, Sequence[Sequence[str]]],
    seed: int,
) -> TransformerCaptionHead:
    """The head after the epoch whose loss on the validation split is lowest: how long to train is what regularises it.

    Args:
        train, validation: cells `[N, P, C]` and the captions of each picture.
    """
    vocabulary = Vocabulary.build((text for texts in train[1] for text in texts), 2)
    head = new_head(train[0].shape[2], vocabulary, seed)
    optimizer = torch.optim.AdamW(head.parameters(), RATE, weight_decay=WEIGHT_DECAY)
    steps = EPOCHS * -(-len(train[0]) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.1)
    every = torch.arange(len(validation[0]))
    best, lowest = None, float("inf")
    for epoch in range(EPOCHS):
        head.train()
        for rows in torch.randperm(len(train[0])).split(BATCH):
            loss = _loss(head, train, rows, epoch)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        head.eval()
        with torch.no_grad():
            parts = [_loss(head, validation, rows, 0) * len(rows) for rows in every.split(100)]
        found = float(sum(parts)) / len(every)
        if found < lowest:
            best, lowest = {name: value.clone() for name, value in head.state_dict().items()}, found
    head.load_state_dict(best)
    return head


def _loss(
    head: TransformerCaptionHead,
    side: tuple[torch.Tensor, Sequence[Sequence[str]]],
    rows: torch.Tensor,
    epoch: int,
) -> torch.Tensor:
    """Of one caption of each picture, another every epoch."""
    texts = [side[1][i] for i in rows.tolist()]
    chosen = [each[(epoch + i) % len(each)] for i, each in zip(rows.tolist(), texts, strict=True)]
    tokens = [torch.tensor(head.vocabulary.encode(text, LENGTH)) for text in chosen]
    lengths = torch.tensor([len(each) - 1 for each in tokens])
    padded = pad_sequence(tokens, batch_first=True, padding_value=head.vocabulary.pad)
    normalizers = torch.tensor([float(lengths.sum()), float(len(rows))])
    return sum(head.caption_losses(side[0][rows], padded, lengths, normalizers).values())


def said(head: TransformerCaptionHead, cells: torch.Tensor) -> list[str]:
    """Captions of pictures, the most probable word at each step."""
    words = head.vocabulary
    found = []
    for part in cells.split(100):
        found += beam_search(
            head.decoder,
            part,
            start=words.start,
            end=words.end,
            forbidden=(words.pad, words.unknown, words.start),
            max_length=LENGTH,
        )
    return [" ".join(words.decode(ids)) for ids, _, _ in found]


@register
class CaptioningScenes(Benchmark):
    """Items are scenes, scores their CIDEr-D; it can be above 1."""

    name, family, metric = "captioning scenes", "captioning", "CIDEr-D"
    max_seeds = 1
    item_set = unseen.ITEMS

    @classmethod
    def missing(cls, context: Context) -> str | None:
        return None if captions.installed() else "needs pycocoevalcap (pip install 'visft[eval]')"

    def pictures(self, seed: int) -> Mapping[str, Pictures]:
        return unseen.readout_pictures(self.context.split)

    def items(self, tower: FeatureStore, pictures: Mapping[str, Pictures], seed: int) -> np.ndarray:
        cells = regions.standardised_cells(tower, pictures)
        texts = {
            part: [scene.captions for scene in unseen.scenes(part)]
            for part in ("train", "validation", self.context.split)
        }
        sides = ((cells[part], texts[part]) for part in ("train", "validation"))
        candidates = dict(enumerate(said(trained(*sides, seed), cells["test"])))
        scores = captions.cider_by_picture(dict(enumerate(texts[self.context.split])), candidates)
        return np.array([scores[i] for i in candidates])
