"""Masks as annotations have them: polygons, run lengths (compressed or not), or bitmaps."""

from collections.abc import Iterable

import numpy as np
from detectron2.structures.masks import polygons_to_bitmask
from pycocotools import mask as mask_api

from visft.data.datasets.coco_json import are_numbers

NO_POLYGON = "no polygon has three points"


def usable(segmentation: object) -> list | dict | np.ndarray | None:
    """A mask without what is none: a polygon of one or two points is left out; None where nothing is left.

    COCO's own tools take a list that begins with four numbers for boxes.
    """
    if isinstance(segmentation, list):
        segmentation = [polygon for polygon in segmentation if len(polygon) >= 6 and len(polygon) % 2 == 0]
    return segmentation if segmentation is not None and len(segmentation) else None


def all_masked(annotations: Iterable[dict]) -> bool:
    """Whether there are annotations of objects, and each has a mask. What is annotated as a crowd needs none."""
    masked = [usable(a.get("segmentation")) is not None for a in annotations if not a.get("iscrowd", 0)]
    return len(masked) > 0 and all(masked)


def decode(segmentation: list | dict | np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A mask `[H, W]` bool from polygons, run lengths (compressed or not) or a bitmap, as records may have them.

    Args:
        size: (height, width) of the image.
    """
    if isinstance(segmentation, np.ndarray):
        return segmentation.astype(bool)
    if isinstance(segmentation, list):
        return polygons_to_bitmask([np.asarray(polygon) for polygon in segmentation], *size)
    return mask_api.decode(compressed(segmentation)).astype(bool)


def compressed(run_lengths: dict) -> dict:
    """Run lengths `{size, counts}` with compressed counts, from these or from a list of counts, which become a text."""
    if not isinstance(run_lengths["counts"], list | tuple | np.ndarray):
        return run_lengths
    counts = list(run_lengths["counts"])
    made = mask_api.frPyObjects({**run_lengths, "counts": counts}, *run_lengths["size"])
    return {"size": list(made["size"]), "counts": made["counts"].decode()}


def area(segmentation: list | dict, size: tuple[int, int]) -> float:
    """Pixels of polygons or run lengths, as COCO's tools count them. `size` as for `decode`."""
    if isinstance(segmentation, list):
        return float(mask_api.area(mask_api.merge(mask_api.frPyObjects(segmentation, *size))))
    return float(mask_api.area(compressed(segmentation)))


def fault(segmentation: object, size: tuple[int, int]) -> str:
    """What is wrong with a mask from a file; "" where nothing is.

    Args:
        size: (width, height) of the image.
    """
    width, height = size
    if isinstance(segmentation, list):
        if not all(isinstance(p, list) and are_numbers(p) for p in segmentation):
            return "a polygon is not a list of finite numbers"
        if any(len(p) % 2 for p in segmentation):
            return "a polygon has an odd count of coordinates"
        # A sliver of one or two points beside a whole polygon is dropped by detectron2, as by COCO's own tools.
        return "" if any(len(p) >= 6 for p in segmentation) else NO_POLYGON
    if not isinstance(segmentation, dict):
        return f"it is of type {type(segmentation).__name__}"
    if list(segmentation.get("size") or []) != [height, width]:
        return f"its size is {segmentation.get('size')}, the image's [height, width] is {[height, width]}"
    counts = segmentation.get("counts")
    if isinstance(counts, str):
        counts = run_lengths_of(counts)
    if not isinstance(counts, list) or not {int}.issuperset(map(type, counts)) or min(counts, default=0) < 0:
        return "its counts are no run lengths"
    if sum(counts) != width * height:
        return f"its run lengths cover {sum(counts)} of {width * height} pixels"
    return ""


def run_lengths_of(text: str) -> list[int] | None:
    """Run lengths from COCO's compressed string; None if it is none. pycocotools trusts the string: a broken one makes
    it write past its buffers, so it must not see one.

    Five bits a character from '0' on, lowest first, bit 5 set when more follow, sign extended; from the third run
    on, the difference to the run before the previous is stored (pycocotools, `rleFrString`).
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
