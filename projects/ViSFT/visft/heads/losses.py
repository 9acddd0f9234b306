"""Formulas of the losses: boxes, masks, and sampling of masks at points."""

import torch
from torch import Tensor
from torch.nn import functional as F


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """Boxes [..., 4]: centre and size -> corners."""
    centre, size = boxes[..., :2], boxes[..., 2:]
    return torch.cat((centre - size / 2, centre + size / 2), dim=-1)


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """Boxes [..., 4]: corners -> centre and size."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat(((low + high) / 2, high - low), dim=-1)


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
    overlap = logits @ targets.T
    # BCE = softplus(x) - x t.
    cross_entropy = (F.softplus(logits).sum(-1, keepdim=True) - overlap) / logits.shape[-1]
    probability = logits.sigmoid()
    sums = probability.sum(-1, keepdim=True) + targets.sum(-1)
    return cross_entropy, 1 - (2 * (probability @ targets.T) + 1) / (sums + 1)


def sample_points(maps: Tensor, points: Tensor) -> Tensor:
    """Bilinear values of maps [N, C, h, w] at points [N, P, 2] -> [N, C, P].

    Points are (x, y), 0..1 over the map; outside of it there are zeros.
    """
    return F.grid_sample(maps, 2 * points[:, None] - 1, align_corners=False).squeeze(2)
