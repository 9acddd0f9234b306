"""Transforms an image's annotations like the image: boxes, classes and masks in the frame that the model sees."""

import numpy as np
import torch
from detectron2.data import transforms as T
from detectron2.data.detection_utils import filter_empty_instances, polygons_to_bitmask
from detectron2.structures import BitMasks, Boxes, BoxMode, Instances

from visft.data.masks import all_masked, decode, usable

_Window = tuple[int, int, np.ndarray]
"""Left and top of a window in an image, and bool [h, w]: the mask of an object, which is empty outside the window."""


def annotated_instances(
    record: dict, transforms: T.TransformList, size: tuple[int, int], *, with_masks: bool = True
) -> Instances:
    """Return `gt_boxes`, `gt_classes` and `gt_masks` (if the data set has masks) of an augmented image.

    Crowds and objects that are completely cropped are left out. After a crop, boxes are tight around the cropped masks,
    which are often smaller than the cropped boxes.

    Args:
        record: a detectron2 dataset dict, not changed; `has_masks` says whether every annotation of its data set has a
            mask (default: whether its own annotations do).
        transforms: those of the image.
        size: (height, width) after them.
        with_masks: False leaves `gt_masks` out; masks are then drawn only to get boxes after a crop.
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
    """Return [n, 4] xyxy, clipped at the image's border."""
    if not annotations:
        return torch.zeros(0, 4)
    boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations]
    moved = transforms.apply_box(np.asarray(boxes, dtype=np.float64)).clip(min=0)
    return torch.from_numpy(np.minimum(moved, (*size[::-1], *size[::-1]))).float()


def _drawn(
    segmentation: list | dict | np.ndarray, transforms: T.TransformList, size: tuple[int, int]
) -> _Window:
    """Return the mask in the augmented image.

    Polygons are transformed and drawn once at the final size. This is sharper than transforming a drawn mask, and needs
    no shapely for cropping, because drawing clips at the border. They are drawn only in the window that they cover,
    which is a small part of most images.
    """
    if not isinstance(segmentation, list):
        return 0, 0, transforms.apply_segmentation(decode(segmentation, size).astype(np.uint8)).astype(bool)
    moved = [transforms.apply_coords(np.asarray(p, dtype=np.float64).reshape(-1, 2)) for p in segmentation]
    every = np.concatenate(moved or [np.zeros((1, 2))])
    # One more pixel on each side, because pycocotools rounds to fifths of a pixel. Round before shifting, because the
    # result can differ afterwards. Coordinates left of the image or above it are not rounded.
    left, top = np.clip(np.floor(every.min(0)) - 1, 0, size[::-1]).astype(int)
    right, bottom = np.clip(np.ceil(every.max(0)) + 1, 0, size[::-1]).astype(int)
    if left >= right or top >= bottom:
        return 0, 0, np.zeros((0, 0), dtype=bool)
    polygons = [(np.where(p > 0, np.floor(5 * p + 0.5) / 5, p) - (left, top)).reshape(-1) for p in moved]
    return left, top, polygons_to_bitmask(polygons, bottom - top, right - left)


def _pasted(windows: list[_Window], size: tuple[int, int]) -> torch.Tensor:
    """Return bool [n, height, width]."""
    masks = np.zeros((len(windows), *size), dtype=bool)
    for mask, (left, top, part) in zip(masks, windows, strict=True):
        mask[top : top + part.shape[0], left : left + part.shape[1]] = part
    return torch.from_numpy(masks)


def _box(window: _Window) -> tuple[float, float, float, float]:
    """Return the tight box of a mask, or zeros if it is empty."""
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
