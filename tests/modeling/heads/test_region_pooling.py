"""Mean features of regions, against means over the pixels of the feature map drawn large."""

import torch

from visft.modeling.heads.common import region_pooling

SIZE, GRID = (48, 64), (6, 8)


def large(features: torch.Tensor) -> torch.Tensor:
    return features.repeat_interleave(8, 1).repeat_interleave(8, 2)


def test_boxes():
    features = torch.randn(5, *GRID)
    boxes = torch.tensor([[3, 5, 30, 41], [9, 9, 10, 10], [0, 0, 64, 1], [17, 0, 63, 48], [0, 0, 64, 48]])
    found = region_pooling.pool(features, region_pooling.box_coverage(boxes, SIZE, GRID))
    for row, (x0, y0, x1, y1) in zip(found, boxes.tolist(), strict=True):
        expected = large(features)[:, y0:y1, x0:x1].mean((1, 2))
        torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-5)


def test_masks_of_an_image_that_is_padded():
    features = torch.randn(5, *GRID)
    masks = torch.rand(70, 41, 50) < 0.3  # more than a chunk
    found = region_pooling.pool(features, region_pooling.mask_coverage(masks, SIZE, GRID))
    for row, mask in zip(found, masks, strict=True):
        torch.testing.assert_close(row, large(features)[:, :41, :50][:, mask].mean(1), rtol=1e-4, atol=1e-5)


def test_a_region_smaller_than_a_cell_is_its_cell():
    features = torch.randn(5, *GRID)
    mask = torch.zeros(1, *SIZE, dtype=torch.bool)
    mask[0, 20, 33] = True
    found = region_pooling.pool(features, region_pooling.mask_coverage(mask, SIZE, GRID))
    torch.testing.assert_close(found[0], features[:, 2, 4])
    # Boxes without area, the last one outside of the map.
    boxes = torch.tensor([[33.0, 20, 33, 20], [33.0, 16, 33, 24], [99.0, -9, 101, -3]])
    found = region_pooling.pool(features, region_pooling.box_coverage(boxes, SIZE, GRID))
    torch.testing.assert_close(found, torch.stack([features[:, 2, 4], features[:, 2, 4], features[:, 0, 7]]))


def test_a_mask_without_a_pixel_falls_back_to_its_box():
    masks = torch.zeros(2, *SIZE, dtype=torch.bool)
    masks[1, :8, :8] = True
    boxes = region_pooling.box_coverage(torch.tensor([[8.0, 8, 16, 16]] * 2), SIZE, GRID)
    coverage = region_pooling.or_nearest_cell(region_pooling.mask_coverage(masks, SIZE, GRID), boxes)
    assert coverage[0].nonzero().tolist() == [[1, 1]] and coverage[1].nonzero().tolist() == [[0, 0]]
    assert region_pooling.mask_coverage(masks[:0], SIZE, GRID).shape == (0, *GRID)
