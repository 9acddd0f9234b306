"""Objects of the unseen scenes on a feature map. Several demo benchmarks share them."""

import functools
from collections.abc import Mapping

import numpy as np
import torch

from towerbench.demo import unseen
from towerbench.dense_maps import grid_cells, in_chunks
from towerbench.features import FeatureStore, Images
from towerbench.region_pooling import coverage, mean_features
from towerbench.standardise import Standardiser

KINDS = ("mask", "box")
GRID = 8
"""Readouts that look at whole images see GRID x GRID cells."""


@functools.lru_cache(maxsize=4)
def objects(part: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scene `[M]` and the category `[M]` of every object of a part, in order."""
    scenes = unseen.scenes(part)
    rows = [(i, item.category) for i, scene in enumerate(scenes) for item in scene.objects]
    return torch.tensor(rows, dtype=torch.int64).view(-1, 2).unbind(1)


def box_mask(box: tuple[int, int, int, int], shape: tuple[int, int]) -> np.ndarray:
    """Return a box `(x, y, width, height)` as a mask."""
    x, y, width, height = box
    mask = np.zeros(shape, bool)
    mask[y : y + height, x : x + width] = True
    return mask


def pooled(tower: FeatureStore, images: Images, part: str, kind: str) -> torch.Tensor:
    """Return the mean feature `[M, C]` of each object of a part, weighted by the covered share of each cell.

    Args:
        images: the images of the part, `dense`.
        kind: what is given of the object: `mask` or `box`.
    """
    scenes, found = unseen.scenes(part), []
    for start, maps in in_chunks(tower, images):
        for scene, cells in zip(scenes[start : start + len(maps)], maps, strict=True):
            shapes = [
                item.mask if kind == "mask" else box_mask(item.box, item.mask.shape) for item in scene.objects
            ]
            weights = torch.stack([coverage(shape, cells.shape[1:]) for shape in shapes])
            found.append(mean_features(cells, weights))
    return torch.cat(found)


def cells(tower: FeatureStore, images: Images) -> torch.Tensor:
    """Return maps averaged to `[N, GRID * GRID, C]`."""
    return torch.cat(list(grid_cells(tower, images, GRID)))


def standardised_cells(tower: FeatureStore, images: Mapping[str, Images]) -> dict[str, torch.Tensor]:
    """Return `cells` of each set, standardised like those of `train`."""
    found = {name: cells(tower, each) for name, each in images.items()}
    standardised = Standardiser.of(found["train"], channels=2)
    return {name: standardised(each) for name, each in found.items()}


def cell_labels(scene, grid: tuple[int, int]) -> torch.Tensor:
    """Return what covers most of each cell `[h, w]`: a category, or the number of categories for the background."""
    background = len(unseen.categories())
    shares = torch.zeros(background + 1, *grid)
    for item in scene.objects:
        shares[item.category] += coverage(item.mask, grid)
    shares[background] = 1 - shares[:background].sum(0)
    return shares.argmax(0)


def per_scene(values: torch.Tensor, part: str) -> np.ndarray:
    """Return sums over the objects of each scene `[N, ...]`, given values by object `[M, ...]`."""
    sums = torch.zeros(len(unseen.scenes(part)), *values.shape[1:], dtype=torch.float64)
    return sums.index_add(0, objects(part)[0], values.double()).numpy()
