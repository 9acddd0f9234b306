"""A tower's maps of a set of images, some images at a time, unchanged or averaged to the cells of a grid."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from towerbench.features import FeatureStore, Images

CHUNK = 64
"""Number of images whose maps are in memory at a time."""


def in_chunks(
    tower: FeatureStore, images: Images, stop: int | None = None
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield maps `[n, C, h, w]` of `CHUNK` images at a time, each with the index of its first image.

    Args:
        images: `dense`.
        stop: number of images, from the first. None: all.
    """
    stop = images.count if stop is None else stop
    for start in range(0, stop, CHUNK):
        yield start, tower.dense(images, start, min(start + CHUNK, stop))


def grid_cells(tower: FeatureStore, images: Images, grid: int) -> Iterator[torch.Tensor]:
    """Yield maps averaged to `grid` x `grid` cells, row by row: `[n, grid * grid, C]` of `CHUNK` images at a time."""
    for _, maps in in_chunks(tower, images):
        yield F.adaptive_avg_pool2d(maps, grid).flatten(2).transpose(1, 2)
