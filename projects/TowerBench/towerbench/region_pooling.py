"""Regions, given by boxes or masks, on a map of features: their mean features, and whether these are named right."""

import numpy as np
import torch
import torch.nn.functional as F

AT = (1, 5)
"""A region is named right at once, or within five guesses."""


def coverage(mask: np.ndarray, grid: tuple[int, int]) -> torch.Tensor:
    """The share of each cell `[h, w]` that a mask `[H, W]` covers."""
    return F.adaptive_avg_pool2d(torch.from_numpy(mask)[None].float(), grid)[0]


def box_coverage(
    box: tuple[float, float, float, float], size: tuple[int, int], grid: tuple[int, int]
) -> torch.Tensor:
    """The share of each cell `[h, w]` that a box covers.

    Args:
        box: `(x, y, width, height)` in pixels, which need not be whole, of an image of `size` (height, width).
    """
    x, y, width, height = box
    down = _overlap(y, y + height, size[0], grid[0])
    across = _overlap(x, x + width, size[1], grid[1])
    return down[:, None] * across


def _overlap(start: float, stop: float, length: int, cells: int) -> torch.Tensor:
    """The share of each of `cells` equal parts of a line of `length` that lies between start and stop."""
    edges = torch.arange(cells + 1, dtype=torch.float64) * (length / cells)
    shared = edges[1:].clamp(max=stop) - edges[:-1].clamp(min=start)
    return (shared.clamp(min=0) * (cells / length)).float()


def mean_features(cells: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The mean feature `[M, C]` of each region.

    Args:
        cells: the image's map `[C, h, w]`.
        weights: how much of each cell a region covers, `[M, h, w]`.
    """
    weights = weights.flatten(1)
    return weights @ cells.flatten(1).T / weights.sum(1, keepdim=True)


def within(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Whether the right class is among the first guesses, for each of `AT`: `[M, len(AT)]`.

    Args:
        scores: of every class, `[M, classes]`. labels: the right ones, `[M]`.
    """
    # What is told from nothing else counts as wrong.
    rank = (scores >= scores.gather(1, labels[:, None])).sum(1) - 1
    return torch.stack([rank < k for k in AT], 1)


def class_means(means: np.ndarray) -> np.ndarray:
    """Class-mean accuracy, the mean over `AT`, from counts by class.

    A class's accuracy is the share of its regions that are named right; the mean is over the classes that there are.

    Args:
        means: `[..., classes * (1 + len(AT))]`, by class how many regions of it an image has, and how many of these
            are named right for each of `AT`, as means over images.

    Returns:
        `[...]` in 0..1.
    """
    by_class = means.reshape(*means.shape[:-1], -1, 1 + len(AT))
    count, hits = by_class[..., :1], by_class[..., 1:]
    there = count > 0
    shares = (hits / np.where(there, count, 1)).mean(-1)
    return shares.sum(-1) / there.sum((-2, -1))
