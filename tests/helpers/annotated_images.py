"""Images with annotated rectangles."""

import torch
from detectron2.structures import BitMasks, Boxes, Instances


def rectangles(boxes: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Bool masks [T, h, w] that fill integer boxes [T, 4]."""
    masks = torch.zeros(len(boxes), *size, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist(), strict=True):
        mask[y0:y1, x0:x1] = True
    return masks


def annotated(image_id: int, size: tuple[int, int], boxes: list[list[int]], classes: list[int]) -> dict:
    """A mapped dict without its image; the original image had twice the size."""
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    instances = Instances(size, gt_boxes=Boxes(boxes), gt_classes=torch.tensor(classes, dtype=torch.int64))
    instances.gt_masks = BitMasks(rectangles(boxes, size))
    return {
        "image_id": image_id,
        "height": 2 * size[0],
        "width": 2 * size[1],
        "instances": instances,
    }
