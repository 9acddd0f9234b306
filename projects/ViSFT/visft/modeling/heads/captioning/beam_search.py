"""Greedy and beam search over any caption decoder."""

import torch
from torch import Tensor, nn


class CaptionDecoder(nn.Module):
    """Predicts the words of a caption from an image's cells: of whole captions in training, one by one in search.

    `cells` are an image's pooled features `[N, P, C]`, `tokens` numbers of words, `hidden` the states that the next
    words are predicted from.
    """

    def forward(self, cells: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Read captions `[N, T]` word by word; returns hidden `[N, T, H]` and attention on the cells `[N, T, P]`."""
        raise NotImplementedError

    def scores(self, hidden: Tensor) -> Tensor:
        """Scores (logits) of each word of the vocabulary to come next: `[..., H]` -> `[..., V]`."""
        raise NotImplementedError

    def start(self, cells: Tensor) -> tuple[Tensor, ...]:
        """The state before any word: tensors whose first dimension counts captions."""
        raise NotImplementedError

    def step(self, state: tuple[Tensor, ...], tokens: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Read one word `[N]` more; returns hidden `[N, H]`, attention `[N, P]` and the new state."""
        raise NotImplementedError


@torch.no_grad()
def beam_search(
    decoder: CaptionDecoder,
    cells: Tensor,
    *,
    start: int,
    end: int,
    forbidden: tuple[int, ...] = (),
    beam_size: int = 1,
    max_length: int = 30,
) -> list[tuple[list[int], Tensor, float]]:
    """The most probable caption found for each image; with `beam_size` 1, the greedy one.

    A caption's score is the sum of its words' logarithmic probabilities, its end included. It can only fall with
    more words: as soon as the best caption of a beam has ended, no other can overtake it.

    Args:
        cells: `[N, P, C]`.
        start, end, forbidden: numbers of words; the last are never predicted. No caption is empty.
        beam_size: how many unfinished captions are followed.
        max_length: most words of a caption, its end not counted.

    Returns:
        For each image the words' numbers (without start and end), the attention on the cells at each word
        `[T, P]`, and the score.
    """
    count, width = len(cells), beam_size
    state = tuple(part.repeat_interleave(width, dim=0) for part in decoder.start(cells))
    tokens = torch.full((count * width,), start, device=cells.device)
    # All beams are alike at first; only one may go on, or every word would be found several times.
    total = torch.full((count, width), -torch.inf, device=cells.device)
    total[:, 0] = 0
    done = torch.zeros(count, width, dtype=torch.bool, device=cells.device)
    first_row = width * torch.arange(count, device=cells.device)[:, None]
    words = torch.zeros(count * width, 0, dtype=torch.int64, device=cells.device)
    maps = cells.new_zeros(count * width, 0, cells.shape[1])
    for length in range(max_length + 1):
        hidden, attention, state = decoder.step(state, tokens)
        step = decoder.scores(hidden).float().log_softmax(-1).view(count, width, -1)
        step[..., list(forbidden)] = -torch.inf
        if length == 0:
            step[..., end] = -torch.inf
        if length == max_length:
            # What has not ended ends here, at no cost.
            step[...] = -torch.inf
            step[..., end] = 0
        step[done] = -torch.inf
        step[..., end].masked_fill_(done, 0)
        total, index = (total[..., None] + step).flatten(1).topk(width, dim=1)
        parent, token = index // step.shape[-1], index % step.shape[-1]
        rows, tokens = (first_row + parent).flatten(), token.flatten()
        state = tuple(part[rows] for part in state)
        words = torch.cat((words[rows], tokens[:, None]), dim=1)
        maps = torch.cat((maps[rows], attention[rows, None].to(maps.dtype)), dim=1)
        done = done.gather(1, parent) | (token == end)
        if done[:, 0].all():
            break
    best = []
    for row in range(0, count * width, width):
        caption = words[row].tolist()
        caption = caption[: caption.index(end)]
        best.append((caption, maps[row, : len(caption)], float(total[row // width, 0])))
    return best
