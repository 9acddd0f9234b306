"""Mean features of regions: every cell of the feature map counts by the share of it that the region covers."""

import torch
from torch import Tensor
from torch.nn import functional as F

from visft.modeling.heads.common.full_precision import without_autocast

_CHUNK = 32
"""Masks that are averaged at a time: a hundred float masks of a large image take gigabytes."""


def mask_coverage(masks: Tensor, padded_size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """The share of each cell that masks cover, `[R, h, w]` float32.

    Args:
        masks: `[R, H, W]` bool, of the image as it is before padding.
        padded_size: (height, width) in pixels that the feature map covers.
        grid: (h, w) of the feature map.
    """
    height, width = padded_size
    padding = (0, width - masks.shape[2], 0, height - masks.shape[1])
    found = [
        F.adaptive_avg_pool2d(F.pad(part.float(), padding), grid) for part in masks.split(_CHUNK) if len(part)
    ]
    return torch.cat(found) if found else torch.zeros(0, *grid, device=masks.device)


def box_coverage(boxes: Tensor, padded_size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """The share of each cell that boxes cover, `[R, h, w]` float32.

    A box without area, or outside of the map, gives its nearest cell.

    Args:
        boxes: `[R, 4]` x0, y0, x1, y1 in pixels.
    """
    boxes = boxes.float()
    across = _line_coverage(boxes[:, 0], boxes[:, 2], padded_size[1], grid[1])
    down = _line_coverage(boxes[:, 1], boxes[:, 3], padded_size[0], grid[0])
    return down[:, :, None] * across[:, None, :]


def _line_coverage(low: Tensor, high: Tensor, length: int, cells: int) -> Tensor:
    """The share of each of `cells` equal parts of a line of `length` between low and high: `[R, cells]`."""
    edges = torch.arange(cells, device=low.device) * (length / cells)
    shared = torch.minimum(high[:, None], edges + length / cells) - torch.maximum(low[:, None], edges)
    shared = shared.clamp(min=0) * (cells / length)
    nearest = ((low + high) / 2 * (cells / length)).long().clamp(0, cells - 1)
    return torch.where(shared.sum(1, keepdim=True) > 0, shared, F.one_hot(nearest, cells).to(shared))


def region_coverage(
    boxes: Tensor, masks: Tensor | None, padded_size: tuple[int, int], grid: tuple[int, int]
) -> Tensor:
    """The share of each cell that regions cover, `[R, h, w]` float32.

    Args:
        boxes: `[R, 4]` around the regions.
        masks: `[R, H, W]`; None: the regions are the boxes. A mask too small to cover anything counts as its box.
    """
    found = box_coverage(boxes, padded_size, grid)
    if masks is None:
        return found
    return or_nearest_cell(mask_coverage(masks, padded_size, grid), found.to(masks.device))


def or_nearest_cell(coverage: Tensor, fallback: Tensor) -> Tensor:
    """Coverage `[R, h, w]`, with that of `fallback` `[R, h, w]` where a region covers nothing at all."""
    nothing = coverage.flatten(1).sum(1) == 0
    return torch.where(nothing[:, None, None], fallback, coverage)


@without_autocast
def pool(features: Tensor, coverage: Tensor) -> Tensor:
    """Mean features of regions `[R, C]`, float32.

    Args:
        features: `[C, h, w]` of one image.
        coverage: `[R, h, w]`, each with something above 0.
    """
    weights = coverage.flatten(1)
    weights = weights / weights.sum(1, keepdim=True)
    return weights @ features.float().flatten(1).T
