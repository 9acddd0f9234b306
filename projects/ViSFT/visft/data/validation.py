"""Annotation files in COCO's format and formats near it, checked whole before training."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from visft.data import masks as mask_formats
from visft.data.datasets.coco_json import (
    entries_of,
    is_box,
    is_id,
    is_int,
    is_number,
    is_positive_int,
    is_text,
    name_of,
    require_keys,
    some,
)
from visft.data.datasets.layouts import COCO, Layout
from visft.errors import DataError

logger = logging.getLogger(__name__)

# A box may reach this many pixels over the image's edge: annotation tools round, COCO's own included.
_BOX_TOLERANCE = 1.0

# Images of COCO's train sets with one box each that has no height (github.com/cocodataset/cocoapi, issue 355). All
# the world trains on these files, so they pass; the mapper drops the two as it drops what a crop leaves empty.
_KNOWN_FLAT = {200365, 550395}


@dataclass(frozen=True)
class CocoSummary:
    """What a checked annotation file holds."""

    classes: tuple[str, ...]
    """Names in the order of their category ids."""
    category_ids: tuple[int, ...]
    images: int
    annotated: bool
    """Whether it has `annotations`."""
    learnable: int
    """Annotations that are no crowds."""
    masked: str
    """The first annotation with a mask; "": none has."""
    unmasked: str
    """The first annotation of an object without a mask, and what is wrong."""
    unmasked_crowd: str
    no_area: str
    """The first annotation whose `area` is no number, which evaluation reads."""
    not_federated: str = ""
    """Where LVIS's evaluation needs it: the first entry that does not say what is known of which class."""


def summary_of(values: Mapping) -> CocoSummary:
    """A summary from its values as JSON keeps them."""
    lists = {key: tuple(values[key]) for key in ("classes", "category_ids")}
    return CocoSummary(**{**values, **lists})


def check_content(
    path: str, content: dict, annotations: Iterable | None = None, layout: Layout = COCO
) -> CocoSummary:
    """Check what an annotation file holds, all but whether its images are there.

    Args:
        annotations: those of the file, where they are not in its content; each is checked before the next is asked for.
        layout: of the file.

    Raises:
        DataError: names the file, the first entry that is wrong (annotations by their id), what is wrong and what was
            expected.
    """
    categories = _check_categories(path, entries_of(path, content, "categories"))
    images = entries_of(path, content, "images")
    sizes = _check_images(path, images, layout)
    annotated = annotations is not None or "annotations" in content
    if annotations is None:
        annotations = entries_of(path, content, "annotations") if annotated else []
    found = _check_annotations(path, annotations, sizes, categories, layout)
    ids = tuple(sorted(categories))
    return CocoSummary(
        classes=tuple(categories[i] for i in ids),
        category_ids=ids,
        images=len(sizes),
        annotated=annotated,
        not_federated=_not_federated(content["categories"], images) if layout.federated else "",
        **found,
    )


def _not_federated(categories: list[dict], images: list[dict]) -> str:
    for entry in categories:
        if entry.get("frequency") not in ("r", "c", "f"):
            return (
                f"category {entry['id']} has frequency {entry.get('frequency')!r}; expected r, c or f (rare, common, "
                "frequent)"
            )
    ids = {entry["id"] for entry in categories}
    for entry in images:
        for key in ("neg_category_ids", "not_exhaustive_category_ids"):
            if not isinstance(entry.get(key), list) or not ids.issuperset(entry[key]):
                return (
                    f"image {entry['id']} has {key} {entry.get(key)!r}; expected a list of ids of `categories`, as "
                    "LVIS's evaluation reads it"
                )
    return ""


def _check_categories(path: str, entries: list) -> dict[int, str]:
    categories: dict[int, str] = {}
    for number, entry in enumerate(entries):
        where = name_of(entry, number, "category", "categories")
        require_keys(path, where, entry, {"id": is_int, "name": is_text})
        if entry["id"] in categories:
            raise DataError(f"{path}: category id {entry['id']} occurs twice; ids must be unique")
        categories[entry["id"]] = entry["name"]
    if not categories:
        raise DataError(f"{path}: `categories` is empty; expected at least one entry with `id` and `name`")
    return categories


def _check_images(path: str, entries: list, layout: Layout) -> dict[int | str, tuple[int, int]]:
    """Returns (width, height) by image id."""
    sizes: dict[int | str, tuple[int, int]] = {}
    for number, entry in enumerate(entries):
        where = name_of(entry, number, "image", "images")
        keys = {"id": is_id, layout.image_key: is_text, "width": is_positive_int, "height": is_positive_int}
        require_keys(path, where, entry, keys)
        if entry["id"] in sizes:
            raise DataError(f"{path}: image id {entry['id']} occurs twice; ids must be unique")
        sizes[entry["id"]] = (entry["width"], entry["height"])
    if not sizes:
        raise DataError(
            f"{path}: the data set is empty (`images` has no entries); expected at least one image"
        )
    return sizes


def _check_annotations(
    path: str,
    entries: Iterable,
    sizes: dict[int | str, tuple[int, int]],
    categories: dict[int, str],
    layout: Layout,
) -> dict:
    """What a summary says of annotations."""
    seen, learnable = set(), 0
    masked = unmasked = unmasked_crowd = no_area = ""
    keys = {"id": is_id, "image_id": is_id, "category_id": is_int, "bbox": is_box}
    for number, entry in enumerate(entries):
        where = name_of(entry, number)
        require_keys(path, where, entry, keys)
        # detectron2 lets COCO 2014's minival repeat ids, which it is known to do.
        if entry["id"] in seen and "minival" not in path:
            raise DataError(f"{path}: annotation id {entry['id']} occurs twice; ids must be unique")
        seen.add(entry["id"])
        size = sizes.get(entry["image_id"])
        if size is None:
            raise DataError(
                f"{path}: {where} is on image_id {entry['image_id']}, which is not among the file's `images`"
            )
        if entry["category_id"] not in categories:
            raise DataError(
                f"{path}: {where} has category_id {entry['category_id']}, which is not among the file's "
                f"{len(categories)} `categories` (ids {some(sorted(categories))})"
            )
        crowd = entry.get("iscrowd")
        if crowd not in (0, 1, None):
            raise DataError(f"{path}: {where} has iscrowd {crowd!r}; expected 0 or 1")
        if not (entry.get("area") is None or is_number(entry["area"]) or no_area):
            no_area = f"{where} has area {entry['area']!r}; expected a finite number, or none"
        if layout.strict and entry.get("ignore", 0):
            raise DataError(
                f"{path}: {where} has `ignore` set, which COCO does not have; use iscrowd 1 instead"
            )
        learnable += not crowd
        if layout.strict:
            _check_box(path, where, entry, size)
        segmentation = entry.get("segmentation")
        missing = f"{where} has no segmentation"
        if segmentation:
            missing = _check_mask(path, where, segmentation, size)
        if not missing:
            masked = masked or where
        elif crowd:
            unmasked_crowd = unmasked_crowd or missing
        else:
            unmasked = unmasked or missing
    logger.info("%s: %d images, %d annotations, nothing wrong", path, len(sizes), len(seen))
    return {
        "learnable": learnable,
        "masked": masked,
        "unmasked": unmasked,
        "unmasked_crowd": unmasked_crowd,
        "no_area": no_area,
    }


def _check_box(path: str, where: str, entry: dict, size: tuple[int, int]) -> None:
    x, y, w, h = entry["bbox"]
    width, height = size
    if w <= 0 or h <= 0:
        if h == 0 < w and entry["image_id"] in _KNOWN_FLAT:
            return
        raise DataError(
            f"{path}: {where} has a box without area, bbox {entry['bbox']}; expected [x, y, width, height] with "
            "width and height above 0: correct it or take it out"
        )
    over = max(-x, -y, x + w - width, y + h - height)
    if over > _BOX_TOLERANCE:
        raise DataError(
            f"{path}: {where} has a box that reaches {over:g} px out of its image, bbox {entry['bbox']} in "
            f"{width} x {height}; expected [x, y, width, height] in pixels inside the image"
        )


def _check_mask(path: str, where: str, segmentation: object, size: tuple[int, int]) -> str:
    """Why a mask is as good as none; "" where it is one."""
    reason = mask_formats.fault(segmentation, size)
    sentence = (
        f"{where} has a mask that does not decode: {reason}; expected polygons [[x1, y1, x2, y2, ...], ...] or run "
        "lengths {size, counts}"
    )
    if reason == mask_formats.NO_POLYGON:
        return sentence
    if reason:
        raise DataError(f"{path}: {sentence}")
    return ""
