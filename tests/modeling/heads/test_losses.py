"""Formulas against torchvision and against the formulas written out."""

import pytest
import torch
from torch.nn import functional as F
from torchvision import ops

from visft.modeling.heads.common import losses


def random_boxes(count: int) -> torch.Tensor:
    low = torch.rand(count, 2)
    return torch.cat((low, low + 0.01 + torch.rand(count, 2)), dim=1)


def test_giou_is_torchvisions_pairwise_and_paired():
    a, b = random_boxes(30), random_boxes(20)
    b[0], b[1, :2], b[1, 2:] = a[0], a[1, :2] + 0.001, a[1, 2:] - 0.001  # equal, nested
    torch.testing.assert_close(losses.generalized_iou(a[:, None], b[None]), ops.generalized_box_iou(a, b))
    loss = ops.generalized_box_iou_loss(a[:20], b, reduction="none")
    torch.testing.assert_close(1 - losses.generalized_iou(a[:20], b), loss, atol=1e-5, rtol=1e-4)


def test_giou_of_boxes_without_area_is_finite_with_its_gradient():
    point = torch.tensor([[0.5, 0.5, 0.5, 0.5]], requires_grad=True)
    value = losses.generalized_iou(point, torch.tensor([[0.5, 0.5, 0.5, 0.5]]))
    value.sum().backward()
    assert value.isfinite().all() and point.grad.isfinite().all()


def test_mask_losses_are_their_formulas():
    logits, targets = 3 * torch.randn(2, 5, 40), torch.rand(2, 5, 40)
    p = 1 / (1 + torch.exp(-logits))
    for i in range(2):
        for j in range(5):
            dice = 1 - (2 * sum(p[i, j] * targets[i, j]) + 1) / (sum(p[i, j]) + sum(targets[i, j]) + 1)
            assert losses.dice_loss(logits, targets)[i, j] == pytest.approx(dice.item(), rel=1e-5)
            bce = -(targets[i, j] * p[i, j].log() + (1 - targets[i, j]) * (1 - p[i, j]).log()).mean()
            assert losses.mask_loss(logits, targets)[i, j] == pytest.approx(bce.item(), rel=1e-4)


def test_pairwise_mask_costs_are_the_losses_of_each_pair():
    logits, targets = 3 * torch.randn(2, 5, 40), torch.rand(4, 40)
    bce, dice = losses.pairwise_mask_costs(logits, targets)
    for q in range(5):
        for t in range(4):
            pair = logits[:, q], targets[t].expand(2, -1)
            torch.testing.assert_close(bce[:, q, t], losses.mask_loss(*pair))
            torch.testing.assert_close(dice[:, q, t], losses.dice_loss(*pair))


def test_points_at_cell_centres_give_the_cells_and_points_outside_zero():
    maps = torch.randn(2, 3, 4, 6)
    y, x = torch.meshgrid((torch.arange(4) + 0.5) / 4, (torch.arange(6) + 0.5) / 6, indexing="ij")
    points = torch.stack((x, y), dim=-1).reshape(1, -1, 2).expand(2, -1, -1)
    torch.testing.assert_close(losses.sample_points(maps, points), maps.flatten(2), atol=1e-5, rtol=1e-4)
    assert losses.sample_points(maps, points + 1.5).abs().max() == 0


def test_points_between_cells_are_bilinear():
    ramp = torch.arange(8.0).expand(1, 1, 5, 8)  # the value of column x is x
    points = torch.tensor([[[0.3, 0.5], [0.55, 0.31]]])
    expected = points[..., 0] * 8 - 0.5
    torch.testing.assert_close(losses.sample_points(ramp, points)[0], expected)
    upsampled = F.interpolate(ramp, (5, 16), mode="bilinear", align_corners=False)[0, 0, 0]
    at = torch.stack(((torch.arange(16) + 0.5) / 16, torch.full((16,), 0.5)), dim=-1)[None]
    # The outermost points differ: there grid_sample blends with the zeros outside.
    torch.testing.assert_close(losses.sample_points(ramp, at)[0, 0, 1:-1], upsampled[1:-1])
