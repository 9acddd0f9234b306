"""Segmentation from a map of features: cells to train a probe on, label maps compared, mean IoU."""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from towerbench.dense_maps import in_chunks
from towerbench.features import FeatureStore, Images
from towerbench.readout import Readout


def sampled(labels: np.ndarray, height: int, width: int) -> torch.Tensor:
    """Labels `[H, W]` at the centres of height x width equal parts of the image, `[height, width]` int64."""
    rows, columns = (
        ((np.arange(side) + 0.5) * length / side).astype(int)
        for side, length in zip((height, width), labels.shape, strict=True)
    )
    return torch.from_numpy(labels[np.ix_(rows, columns)].astype(np.int64))


def overlaps(predicted: torch.Tensor, truth: torch.Tensor, classes: int) -> torch.Tensor:
    """Intersections and unions by class `[2 * classes]` of two label maps; pixels of other labels are left out."""
    counted = truth < classes
    predicted, truth = predicted[counted], truth[counted]
    sizes = torch.bincount(predicted, minlength=classes) + torch.bincount(truth, minlength=classes)
    both = torch.bincount(truth[predicted == truth], minlength=classes)
    return torch.cat((both, sizes - both))


def mean_iou(means: np.ndarray) -> np.ndarray:
    """Mean IoU over the classes that there are, from means over images of `overlaps`, `[..., 2 * classes]`."""
    both, either = np.split(means, 2, axis=-1)
    there = either > 0
    return (both / np.where(there, either, 1)).sum(-1) / there.sum(-1)


def segmented(
    tower: FeatureStore,
    images: Images,
    scores: Readout,
    truth: Callable[[int], tuple[torch.Tensor, float]],
    classes: int,
) -> np.ndarray:
    """Compare what cells tell with the truth, image by image: `overlaps`, `[N, 2 * classes]`.

    Args:
        scores: cells `[N, h, w, C]` -> scores of the classes `[N, h, w, classes]`, which are interpolated.
        truth: from an image's number to its labels `[H, W]`, of any size, and how much each of these counts.
    """
    found = []
    for start, maps in in_chunks(tower, images):
        told = scores(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        for number, score in enumerate(told, start):
            labels, weight = truth(number)
            fine = F.interpolate(score[None], labels.shape, mode="bilinear", align_corners=False)
            found.append(weight * overlaps(fine[0].argmax(0), labels, classes))
    return torch.stack(found).numpy()


def training_cells(
    tower: FeatureStore,
    images: Images,
    labels: Callable[[int, tuple[int, int]], torch.Tensor],
    chosen: Callable[[int, torch.Tensor], np.ndarray],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features `[M, C]` and labels `[M]` of some cells of every image.

    Args:
        labels: from an image's number and the grid `(h, w)` to its cells' labels `[h, w]`.
        chosen: from an image's number and these labels, flat, to the places of the cells that are taken.
    """
    features, found = [], []
    for start, maps in in_chunks(tower, images):
        for number, cells in enumerate(maps, start):
            label = labels(number, tuple(cells.shape[1:])).flatten()
            places = torch.from_numpy(chosen(number, label))
            features.append(cells.flatten(1).T[places])
            found.append(label[places])
    return torch.cat(features), torch.cat(found)
