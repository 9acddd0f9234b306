"""Masks of annotations: polygons, run lengths (compressed or not), or bitmaps."""

from collections.abc import Iterable

import numpy as np
from detectron2.structures.masks import polygons_to_bitmask
from pycocotools import mask as mask_api

from visft.data.datasets.coco_json import are_numbers

NO_POLYGON = "no polygon has three points"


def usable(segmentation: object) -> list | dict | np.ndarray | None:
    """Return a mask without polygons of one or two points, or None if nothing is left.

    COCO's own tools would take a list that begins with four numbers for boxes.
    """
    if isinstance(segmentation, list):
        segmentation = [polygon for polygon in segmentation if len(polygon) >= 6 and len(polygon) % 2 == 0]
    return segmentation if segmentation is not None and len(segmentation) else None


def all_masked(annotations: Iterable[dict]) -> bool:
    """Whether there are annotations other than crowds and each of them has a mask."""
    masked = [usable(a.get("segmentation")) is not None for a in annotations if not a.get("iscrowd", 0)]
    return len(masked) > 0 and all(masked)


def decode(segmentation: list | dict | np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Decode polygons, run lengths (compressed or not) or a bitmap to a bool mask `[H, W]`.

    Args:
        size: (height, width) of the image.
    """
    if isinstance(segmentation, np.ndarray):
        return segmentation.astype(bool)
    if isinstance(segmentation, list):
        return polygons_to_bitmask([np.asarray(polygon) for polygon in segmentation], *size)
    return mask_api.decode(compressed(segmentation)).astype(bool)


def compressed(run_lengths: dict) -> dict:
    """Return run lengths `{size, counts}` with compressed counts, which are a string. A list is converted."""
    if not isinstance(run_lengths["counts"], list | tuple | np.ndarray):
        return run_lengths
    counts = list(run_lengths["counts"])
    made = mask_api.frPyObjects({**run_lengths, "counts": counts}, *run_lengths["size"])
    return {"size": list(made["size"]), "counts": made["counts"].decode()}


def area(segmentation: list | dict, size: tuple[int, int]) -> float:
    """Return the number of pixels of polygons or run lengths, as COCO's tools count them. `size` as in `decode`."""
    if isinstance(segmentation, list):
        return float(mask_api.area(mask_api.merge(mask_api.frPyObjects(segmentation, *size))))
    return float(mask_api.area(compressed(segmentation)))


def fault(segmentation: object, size: tuple[int, int]) -> str:
    """Return the fault of a mask from a file, or "".

    Args:
        size: (width, height) of the image.
    """
    width, height = size
    if isinstance(segmentation, list):
        if not all(isinstance(p, list) and are_numbers(p) for p in segmentation):
            return "a polygon is not a list of finite numbers"
        if any(len(p) % 2 for p in segmentation):
            return "a polygon has an odd count of coordinates"
        # detectron2 and COCO's own tools drop a polygon of one or two points beside a complete one.
        return "" if any(len(p) >= 6 for p in segmentation) else NO_POLYGON
    if not isinstance(segmentation, dict):
        return f"it is of type {type(segmentation).__name__}"
    if list(segmentation.get("size") or []) != [height, width]:
        return f"its size is {segmentation.get('size')}, the image's [height, width] is {[height, width]}"
    counts = segmentation.get("counts")
    if isinstance(counts, str):
        counts = run_lengths_of(counts)
    if not isinstance(counts, list) or not {int}.issuperset(map(type, counts)) or min(counts, default=0) < 0:
        return "its counts are not run lengths"
    if sum(counts) != width * height:
        return f"its run lengths cover {sum(counts)} of {width * height} pixels"
    return ""


def run_lengths_of(text: str) -> list[int] | None:
    """Decode COCO's compressed string to run lengths, or None if it is not valid.

    pycocotools trusts the string: a broken one makes it write past its buffers, so check it here first.

    Each character from '0' on holds five bits, lowest first, with bit 5 set if more follow, sign extended. From the
    third run on, the difference from the run before the previous one is stored (pycocotools, `rleFrString`).
    """
    runs: list[int] = []
    value = shift = 0
    for character in text:
        code = ord(character) - 48
        if not 0 <= code < 64 or shift > 30:
            return None
        value |= (code & 31) << shift
        shift += 5
        if not code & 32:
            if code & 16:
                value -= 1 << shift
            runs.append(value + runs[-2] if len(runs) > 2 else value)
            value = shift = 0
    return None if shift else runs
