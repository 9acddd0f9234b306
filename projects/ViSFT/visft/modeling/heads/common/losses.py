"""Formulas of the losses: boxes, masks, and sampling of masks at points."""

import torch
from torch import Tensor
from torch.nn import functional as F


def generalized_iou(a: Tensor, b: Tensor) -> Tensor:
    """GIoU (arXiv 1902.09630) of corner boxes [..., 4], with broadcasting -> [...]."""
    area_a = (a[..., 2:] - a[..., :2]).prod(-1)
    area_b = (b[..., 2:] - b[..., :2]).prod(-1)
    low, high = torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])
    intersection = (high - low).clamp(min=0).prod(-1)
    union = area_a + area_b - intersection
    hull = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).prod(-1)
    # Two boxes without area would divide by zero.
    union, hull = union.clamp(min=1e-12), hull.clamp(min=1e-12)
    return intersection / union - (hull - union) / hull


def dice_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """1 - (2 p.t + 1) / (p.1 + t.1 + 1) over the last dimension, p = sigmoid(logits) (V-Net, arXiv 1606.04797)."""
    probability = logits.sigmoid()
    overlap = (probability * targets).sum(-1)
    return 1 - (2 * overlap + 1) / (probability.sum(-1) + targets.sum(-1) + 1)


def mask_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy, mean over the last dimension."""
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(-1)


def pairwise_mask_costs(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """`mask_loss` and `dice_loss` of each prediction with each target.

    Args:
        logits: [..., Q, P]. targets: [T, P].

    Returns:
        two tensors [..., Q, T].
    """
    shape, transposed = (*logits.shape[:-1], len(targets)), targets.T
    areas, parts = targets.sum(-1), []
    for rows in logits.flatten(0, -2).split(rows_at_once(logits.shape[-1], logits.device)):
        # BCE = softplus(x) - x t: the first term is a prediction's alone, the second a product of matrices.
        mask = (F.softplus(rows).sum(-1, keepdim=True) - rows @ transposed) / rows.shape[-1]
        probability = rows.sigmoid()
        sums = probability.sum(-1, keepdim=True) + areas
        parts.append((mask, 1 - (2 * (probability @ transposed) + 1) / (sums + 1)))
    mask, dice = (torch.cat(costs).view(shape) for costs in zip(*parts, strict=True))
    return mask, dice


def rows_at_once(length: int, device: torch.device) -> int:
    """How many rows of so many numbers to work on at a time: on a CPU what its caches hold, elsewhere some 100 MiB."""
    return max(1, (1 << (20 if device.type == "cpu" else 25)) // length)


def sample_points(maps: Tensor, points: Tensor) -> Tensor:
    """Bilinear values of maps [N, C, h, w] at points [N, P, 2] -> [N, C, P].

    Points are (x, y), 0..1 over the map; outside of it there are zeros.
    """
    return F.grid_sample(maps, 2 * points[:, None] - 1, align_corners=False).squeeze(2)


def sample_masks(masks: Tensor, points: Tensor) -> Tensor:
    """`sample_points` of masks [T, h, w] of any type, all at the same points [P, 2] -> [T, P] float32.

    Only the four pixels about a point are read, so that no mask is converted as a whole.
    """
    height, width = masks.shape[-2:]
    at = points * points.new_tensor([width, height]) - 0.5
    low = at.floor()
    (right, below), (x, y) = (at - low).unbind(-1), low.long().unbind(-1)
    pixels, total = masks.flatten(1), points.new_zeros(len(masks), len(points))
    for row, weight_y in ((y, 1 - below), (y + 1, below)):
        for column, weight_x in ((x, 1 - right), (x + 1, right)):
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            index = row.clamp(0, height - 1) * width + column.clamp(0, width - 1)
            weight = weight_x * weight_y * inside
            total += pixels.gather(1, index.expand(len(masks), -1)) * weight
    return total
