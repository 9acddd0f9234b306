"""Complete checks of annotation files in COCO's and similar formats, before training."""

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

# A box may reach this many pixels beyond the image's edge, because annotation tools round, including COCO's own.
_BOX_TOLERANCE = 1.0

# Images of COCO's train sets with one box of height 0 each (github.com/cocodataset/cocoapi, issue 355). They pass,
# because these files are in common use. The mapper drops the two boxes.
_KNOWN_FLAT = {200365, 550395}


@dataclass(frozen=True)
class CocoSummary:
    """A summary of a checked annotation file."""

    classes: tuple[str, ...]
    """Names in the order of their category ids."""
    category_ids: tuple[int, ...]
    images: int
    annotated: bool
    """Whether it has `annotations`."""
    learnable: int
    """Number of annotations that are not crowds."""
    masked: str
    """The first annotation with a mask, or ""."""
    unmasked: str
    """The first annotation without a mask that is not a crowd, and the reason."""
    unmasked_crowd: str
    no_area: str
    """The first annotation whose `area`, which evaluation reads, is not a number."""
    not_federated: str = ""
    """For LVIS's evaluation: the first entry that does not say which classes are annotated exhaustively."""


def summary_of(values: Mapping) -> CocoSummary:
    """Return a summary from its JSON values."""
    lists = {key: tuple(values[key]) for key in ("classes", "category_ids")}
    return CocoSummary(**{**values, **lists})


def check_content(
    path: str, content: dict, annotations: Iterable | None = None, layout: Layout = COCO
) -> CocoSummary:
    """Check the content of an annotation file, but not whether its images exist.

    Args:
        annotations: those of the file, if they are not in its content. Each is checked before the next one is read.
        layout: of the file.

    Raises:
        DataError: names the file, the first wrong entry (annotations by their id), what is wrong and what was expected.
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
                    f"image {entry['id']} has {key} {entry.get(key)!r}; expected a list of ids of `categories`, for "
                    "LVIS's evaluation"
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
    """Check images and return (width, height) by image id."""
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
    """Check annotations and return their part of the summary."""
    seen, learnable = set(), 0
    masked = unmasked = unmasked_crowd = no_area = ""
    keys = {"id": is_id, "image_id": is_id, "category_id": is_int, "bbox": is_box}
    for number, entry in enumerate(entries):
        where = name_of(entry, number)
        require_keys(path, where, entry, keys)
        # COCO 2014's minival is known to repeat ids, which detectron2 also allows.
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
    logger.info("%s: %d images, %d annotations, no errors", path, len(sizes), len(seen))
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
            "width and height above 0: correct it or remove it"
        )
    over = max(-x, -y, x + w - width, y + h - height)
    if over > _BOX_TOLERANCE:
        raise DataError(
            f"{path}: {where} has a box that reaches {over:g} px out of its image, bbox {entry['bbox']} in "
            f"{width} x {height}; expected [x, y, width, height] in pixels inside the image: correct it"
        )


def _check_mask(path: str, where: str, segmentation: object, size: tuple[int, int]) -> str:
    """Return why an annotation has no usable mask, or ""."""
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
