"""Regions of images in the form of data sets: panoptic segments, and COCO's instances."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from towerbench import region_pooling
from towerbench.errors import DataError
from towerbench.real import maps, sources
from towerbench.real.sources import Source, field

logger = logging.getLogger(__name__)

KINDS = ("boxes", "thing masks", "stuff masks")

Choice = Callable[[Sequence[Sequence[int]], int], list[int]]
"""From the labels of the regions in each image, and the number of classes, to the images that are used."""


@dataclass(frozen=True)
class Region:
    """A region of an image.

    Args:
        label: index of its class.
        box: `(x, y, width, height)` in pixels, within the image.
        mask: the id of a segment, or COCO's run lengths. None: there is no mask, or it has no pixel.
    """

    label: int
    box: tuple[float, float, float, float]
    mask: int | dict[str, Any] | None = None


@dataclass(frozen=True)
class Shown:
    """An image with regions.

    Args:
        size: (height, width) that boxes and masks refer to.
        segments: a file of segment ids, to which regions refer. None: there is none.
    """

    source: Source
    size: tuple[int, int]
    regions: tuple[Region, ...]
    segments: Path | None = None

    def coverage(self, regions: Sequence[Region], kind: str, grid: tuple[int, int]) -> torch.Tensor:
        """Return the covered share of each cell for some of its regions, `[M, h, w]`."""
        if kind == "boxes":
            return torch.stack([region_pooling.box_coverage(r.box, self.size, grid) for r in regions])
        if self.segments is not None:
            ids = segment_ids(self.segments)
            return torch.stack([region_pooling.coverage(ids == r.mask, grid) for r in regions])
        from pycocotools import mask as mask_api

        masks = (mask_api.decode(r.mask).astype(bool) for r in regions)
        return torch.stack([region_pooling.coverage(mask, grid) for mask in masks])


@dataclass(frozen=True)
class RegionSet:
    """Images with regions.

    Args:
        names: the words for each class.
        things: whether a class is of things. Otherwise it is stuff.
        files: with the annotations.
    """

    images: Sequence[Shown]
    names: Sequence[tuple[str, ...]]
    things: Sequence[bool]
    files: tuple[Path, ...]

    @property
    def sources(self) -> list[Source]:
        """The encoded images."""
        return [shown.source for shown in self.images]

    def of_kind(self, kind: str, per_class: int | None = None) -> list[list[Region]]:
        """Return the regions of a kind by image. At most the first `per_class` of each class are included."""
        seen = [0] * len(self.names)
        found: list[list[Region]] = []
        for shown in self.images:
            found.append([])
            for region in shown.regions:
                if self.things[region.label] == (kind == "stuff masks"):
                    continue
                if kind != "boxes" and region.mask is None:
                    continue
                if per_class is None or seen[region.label] < per_class:
                    seen[region.label] += 1
                    found[-1].append(region)
        return found

    def part(self, numbers: Sequence[int]) -> "RegionSet":
        """Return some of its images."""
        return sources.rows_of(self, numbers, "images")


def evenly(labels: Sequence[Sequence[int]], classes: int) -> list[int]:
    """Return the images that are tested. This is a `Choice`."""
    return sources.spread(len(labels), maps.TEST)


def balanced(labels: Sequence[Sequence[int]], classes: int, per_class: int) -> list[int]:
    """Return no more than `maps.TRAIN` images to train on, the same ones at every call. This is a `Choice`.

    Images of the rarest class come first, until there are `per_class` of its regions. Then come those of the next
    class.
    """
    holders: list[list[int]] = [[] for _ in range(classes)]
    for image in np.random.default_rng(0).permutation(len(labels)):
        for label in set(labels[image]):
            holders[label].append(int(image))
    count, taken = np.zeros(classes, np.int64), set()
    for label in sorted(range(classes), key=lambda label: len(holders[label])):
        for image in holders[label]:
            if count[label] >= per_class or len(taken) >= maps.TRAIN:
                break
            if image not in taken:
                taken.add(image)
                np.add.at(count, labels[image], 1)
    return sorted(taken)


# ---------------------------------------------------------------- reading


def panoptic(json_file: Path, folder: Path, segments: Path, choice: Choice) -> RegionSet:
    """Read COCO's panoptic format: a JSON file, and images whose colours are the segments' ids.

    Args:
        folder: of the images.
        segments: folder of the images of segments.

    Raises:
        DataError: a file is missing or broken, or they contradict each other. All chosen images are read.
    """
    data = sources.read_json(json_file)
    classes, names, things = _categories(data, json_file)
    images = _images(data, json_file)
    entries = field(data, "annotations", json_file, list)
    by_image = {}
    for entry in entries:
        known = field(entry, "segments_info", json_file, list)
        infos = [info for info in known if not field(info, "iscrowd", json_file, int)]
        ids = {field(info, "id", json_file, int) for info in known}
        by_image[_known(entry, "image_id", images, json_file)] = entry, infos, ids
    order = sorted(by_image, key=lambda image: field(images[image], "file_name", json_file, str))
    labels = [
        [classes[_known(info, "category_id", classes, json_file)] for info in by_image[image][1]]
        for image in order
    ]
    chosen = []
    for number in choice(labels, len(names)):
        image, (entry, infos, ids) = images[order[number]], by_image[order[number]]
        size = _size(image, json_file)
        file = segments / field(entry, "file_name", json_file, str)
        there = _check_segments(file, size, ids, json_file)
        regions = []
        for info, label in zip(infos, labels[number], strict=True):
            box = _box(info, size, json_file)
            if box is not None:
                regions.append(Region(label, box, info["id"] if info["id"] in there else None))
        chosen.append(Shown(Source(folder / image["file_name"]), size, tuple(regions), file))
    return RegionSet(chosen, names, things, (json_file, *(shown.segments for shown in chosen)))


def segment_ids(file: Path) -> np.ndarray:
    """Return the ids `[H, W]` int32 that an image of segments has as colours: R + 256 G + 65536 B.

    Raises:
        DataError: the file is missing, or is no colour image.
    """
    with sources.readable(file, "image of segments", "make the panoptic annotations again"):
        colours = np.asarray(Image.open(file))
    if colours.ndim != 3 or colours.shape[2] != 3:
        raise DataError(
            f"{file}: has shape {colours.shape}; a colour image `[H, W, 3]` was expected, whose colours are the ids "
            "of segments; make the panoptic annotations again"
        )
    return colours.astype(np.int32) @ np.array([1, 256, 65536], np.int32)


def _check_segments(file: Path, size: tuple[int, int], known: set[int], json_file: Path) -> set[int]:
    """Return the ids in an image of segments. All are known, except 0 (nothing)."""
    ids = segment_ids(file)
    if ids.shape != size:
        raise DataError(
            f"{file}: is of height and width {ids.shape}, and {json_file} says {size} for its image; make the "
            "panoptic annotations again"
        )
    flat = ids.ravel()
    starts = flat[np.flatnonzero(np.diff(flat, prepend=flat[0] + 1))]  # of runs, which are fewer than pixels
    there = set(np.unique(starts).tolist())
    unknown = sorted(there - known - {0})
    if unknown:
        raise DataError(
            f"{file}: has the segment {unknown[0]}, which {json_file} does not name for it; ids in `segments_info` "
            "were expected; make the panoptic annotations again"
        )
    return there


def instances(
    json_file: Path, folder: Path, path: Callable[[Mapping[str, Any]], str], choice: Choice, *, masks: bool
) -> RegionSet:
    """Read COCO's format of instances, which Objects365 and LVIS also have. Crowds and boxes without area are left out.

    Args:
        folder: prefix of the images' paths.
        path: from an entry of `images` to its path below the folder. "": it is known to be missing.
        masks: whether `segmentation` is read too.

    Raises:
        DataError: the file is missing, broken, or contradicts itself. Regions are read of the chosen images.
    """
    data = sources.read_json(json_file)
    classes, names, things = _categories(data, json_file)
    images = _images(data, json_file)
    by_image: dict[Any, list] = {image: [] for image, entry in images.items() if path(entry)}
    for entry in field(data, "annotations", json_file, list):
        image = _known(entry, "image_id", images, json_file)
        _known(entry, "category_id", classes, json_file)
        if image in by_image and not entry.get("iscrowd"):
            by_image[image].append(entry)
    order = sorted(by_image)
    labels = [[classes[entry["category_id"]] for entry in by_image[image]] for image in order]
    chosen, flat = [], 0
    for number in choice(labels, len(names)):
        image = images[order[number]]
        size, regions = _size(image, json_file), []
        for entry, label in zip(by_image[order[number]], labels[number], strict=True):
            box = _box(entry, size, json_file)
            if box is None:
                flat += 1
                continue
            regions.append(Region(label, box, _run_lengths(entry, size, json_file) if masks else None))
        chosen.append(Shown(Source(folder / path(image)), size, tuple(regions)))
    if flat:
        logger.warning("%s: %d boxes without area are left out", json_file, flat)
    return RegionSet(chosen, names, things, (json_file,))


def _categories(data: Any, file: Path) -> tuple[dict[int, int], list[tuple[str, ...]], list[bool]]:
    """Return the index of each category by its id, in the order of ids, their words, and whether they are things."""
    entries = sorted(field(data, "categories", file, list), key=lambda entry: field(entry, "id", file, int))
    classes = {entry["id"]: place for place, entry in enumerate(entries)}
    if len(classes) != len(entries) or not entries:
        raise DataError(
            f"{file}: has {len(entries)} categories with {len(classes)} different ids; one id each was expected"
        )
    names = []
    for entry in entries:
        several = entry.get("synonyms")  # LVIS has them
        given = several if isinstance(several, list) and several else [field(entry, "name", file, str)]
        names.append(tuple(dict.fromkeys(word for name in given for word in maps.words(str(name)))))
        if not names[-1]:
            raise DataError(f"{file}: the category {entry['id']} has no name; words were expected")
    return classes, names, [bool(entry.get("isthing", 1)) for entry in entries]


def _images(data: Any, file: Path) -> dict[Any, Mapping[str, Any]]:
    return {field(entry, "id", file, (int, str)): entry for entry in field(data, "images", file, list)}


def _known(entry: Any, key: str, known: Mapping[Any, Any], file: Path) -> Any:
    value = field(entry, key, file, (int, str))
    if value not in known:
        what = {"category_id": "categories", "image_id": "images"}[key]
        raise DataError(
            f"{file}: an annotation has `{key}` {value!r}, which is none of its `{what}`; get it again"
        )
    return value


def _size(image: Mapping[str, Any], file: Path) -> tuple[int, int]:
    size = field(image, "height", file, int), field(image, "width", file, int)
    if min(size) < 1:
        raise DataError(
            f"{file}: the image {image['id']!r} has height and width {size}; pixels were expected"
        )
    return size


def _box(entry: Any, size: tuple[int, int], file: Path) -> tuple[float, float, float, float] | None:
    """Return a box cut to its image. None: it has no area. Published boxes reach slightly over the edge."""
    box = field(entry, "bbox", file, list)
    if len(box) != 4 or not all(isinstance(v, int | float) and math.isfinite(v) for v in box):
        raise DataError(f"{file}: `bbox` is {box}; four numbers x, y, width, height were expected")
    x, y, width, height = (float(v) for v in box)
    if width <= 0 or height <= 0:
        return None
    left, top, right, bottom = max(x, 0.0), max(y, 0.0), min(x + width, size[1]), min(y + height, size[0])
    if left >= right or top >= bottom:
        raise DataError(
            f"{file}: the box {box} lies outside its image, which has height and width {size}; are the images "
            "and annotations of one version?"
        )
    return left, top, right - left, bottom - top


def _run_lengths(entry: Any, size: tuple[int, int], file: Path) -> dict[str, Any] | None:
    """Return COCO's run lengths of the content of `segmentation`. None: it covers no pixel."""
    from pycocotools import mask as mask_api

    shape = field(entry, "segmentation", file, (list, dict))
    try:
        if isinstance(shape, list):
            encoded = mask_api.merge(mask_api.frPyObjects(shape, *size))
        else:
            encoded = (
                shape if isinstance(shape["counts"], str | bytes) else mask_api.frPyObjects(shape, *size)
            )
        area, of = int(mask_api.area(encoded)), tuple(encoded["size"])
    except Exception as error:  # pycocotools raises errors of many kinds
        raise DataError(
            f"{file}: a `segmentation` can not be read ({error}); polygons or run lengths were expected"
        ) from error
    if of != size:
        raise DataError(f"{file}: a `segmentation` is of size {of}, and its image of {size}; get it again")
    return encoded if area else None
