"""An image's annotations, moved as the image was: boxes, classes and masks in the frame that the model sees."""

import numpy as np
import torch
from detectron2.data import transforms as T
from detectron2.data.detection_utils import filter_empty_instances, polygons_to_bitmask
from detectron2.structures import BitMasks, Boxes, BoxMode, Instances

from visft.data.masks import all_masked, decode, usable

_Window = tuple[int, int, np.ndarray]
"""Left and top of a part of an image, and bool [h, w] of that part: the mask of an object, which is empty elsewhere."""


def annotated_instances(
    record: dict, transforms: T.TransformList, size: tuple[int, int], *, with_masks: bool = True
) -> Instances:
    """`gt_boxes`, `gt_classes` and `gt_masks` (if the data set has masks) of an augmented image.

    Crowds and objects of which nothing is left are not in it. After a crop, boxes are those of what is left of the
    masks, which is often smaller than what is left of the boxes.

    Args:
        record: a detectron2 dataset dict, not changed; `has_masks` says whether its data set has masks (default:
            whether its own annotations have), each annotation one.
        transforms: what was done to the image.
        size: (height, width) after that.
        with_masks: False leaves `gt_masks` out; masks are then drawn only for boxes after a crop.
    """
    annotations = [a for a in record["annotations"] if not a.get("iscrowd", 0)]
    has_masks = record.get("has_masks", all_masked(annotations))
    cropped = any(isinstance(t, T.CropTransform) for t in transforms.transforms)
    instances = Instances(size)
    instances.gt_boxes = Boxes(_boxes(annotations, transforms, size))
    instances.gt_classes = torch.tensor([int(a["category_id"]) for a in annotations], dtype=torch.int64)
    if has_masks and (with_masks or cropped):
        windows = [_drawn(usable(a.get("segmentation")), transforms, size) for a in annotations]
        if cropped:
            instances.gt_boxes = Boxes(torch.tensor([_box(w) for w in windows]).reshape(-1, 4))
        if with_masks:
            instances.gt_masks = BitMasks(_pasted(windows, size))
    return filter_empty_instances(instances)


def _boxes(annotations: list[dict], transforms: T.TransformList, size: tuple[int, int]) -> torch.Tensor:
    """[n, 4] xyxy, cut at the image's border."""
    if not annotations:
        return torch.zeros(0, 4)
    boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations]
    moved = transforms.apply_box(np.asarray(boxes, dtype=np.float64)).clip(min=0)
    return torch.from_numpy(np.minimum(moved, (*size[::-1], *size[::-1]))).float()


def _drawn(
    segmentation: list | dict | np.ndarray, transforms: T.TransformList, size: tuple[int, int]
) -> _Window:
    """The mask in the augmented image.

    Polygons are moved and drawn once, at the final size: sharper than moving a drawn mask, and without the shapely that
    cutting polygons takes (drawing cuts them at the border). They are drawn in the part of the image that they reach:
    an object covers a small part of most images.
    """
    if not isinstance(segmentation, list):
        return 0, 0, transforms.apply_segmentation(decode(segmentation, size).astype(np.uint8)).astype(bool)
    moved = [transforms.apply_coords(np.asarray(p, dtype=np.float64).reshape(-1, 2)) for p in segmentation]
    every = np.concatenate(moved or [np.zeros((1, 2))])
    # One pixel more on each side, for pycocotools rounds to fifths of a pixel. That is done before shifting: afterwards
    # it would round otherwise, here and there. What is left of the image or above it comes with no shift.
    left, top = np.clip(np.floor(every.min(0)) - 1, 0, size[::-1]).astype(int)
    right, bottom = np.clip(np.ceil(every.max(0)) + 1, 0, size[::-1]).astype(int)
    if left >= right or top >= bottom:
        return 0, 0, np.zeros((0, 0), dtype=bool)
    polygons = [(np.where(p > 0, np.floor(5 * p + 0.5) / 5, p) - (left, top)).reshape(-1) for p in moved]
    return left, top, polygons_to_bitmask(polygons, bottom - top, right - left)


def _pasted(windows: list[_Window], size: tuple[int, int]) -> torch.Tensor:
    """bool [n, height, width]."""
    masks = np.zeros((len(windows), *size), dtype=bool)
    for mask, (left, top, part) in zip(masks, windows, strict=True):
        mask[top : top + part.shape[0], left : left + part.shape[1]] = part
    return torch.from_numpy(masks)


def _box(window: _Window) -> tuple[float, float, float, float]:
    """The tight box of a mask; zeros if it is empty."""
    left, top, part = window
    columns, rows = np.flatnonzero(part.any(0)), np.flatnonzero(part.any(1))
    if not len(columns):
        return 0.0, 0.0, 0.0, 0.0
    return (
        float(left + columns[0]),
        float(top + rows[0]),
        float(left + columns[-1] + 1),
        float(top + rows[-1] + 1),
    )
