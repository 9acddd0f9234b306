"""Checks of the annotation files of LVIS and Objects365, which are near COCO's format.

All the world trains on these files as they are published, with boxes that reach over an image's edge or have no area,
and the mapper drops what it must. So what is checked is what would stop a training in its middle: entries that lack a
key, ids that point nowhere, images that are not there.
"""

import functools
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

from detectron2.data import Metadata

from visft.data.datasets.coco_json import (
    are_numbers,
    entries_of,
    is_box,
    is_id,
    is_int,
    is_number,
    is_positive_int,
    is_text,
    name_of,
    read_json,
    require_keys,
    some,
)
from visft.errors import DataError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Format:
    """What sets a data set's file apart from COCO's."""

    name: str
    image_key: str
    """Of an image: what says where its image is."""
    image_path: Callable[[str], str]
    """From that value to the path under the data set's `image_root`; "" for an image known to be missing."""
    has_polygons: bool = False
    """Each annotation has polygons."""
    federated: bool = False
    """For evaluation, images and categories say what is known of which class (LVIS)."""
    package: str = ""
    """What detectron2 reads the file with."""


def _lvis_path(url: str) -> str:
    """LVIS names COCO's address of an image; its last two parts are COCO's folder and the file."""
    return "/".join(url.split("/")[-2:])


LVIS = Format("LVIS", "coco_url", _lvis_path, has_polygons=True, federated=True, package="lvis")


def check_published(layout: Format, meta: Metadata, *, train: bool) -> tuple[dict, ...]:
    """Check an annotation file. A file that has not changed since it passed is not read again.

    Args:
        layout: of the file.
        meta: the data set's, with `json_file`, `image_root`, `thing_classes`, and their ids if they are not 1, 2, ...
            (`thing_dataset_id_to_contiguous_id`).
        train: annotations are required, and one at least; else what evaluation reads, if there are annotations.

    Returns:
        `file_name` (with its folder), `width` and `height` of its images, without those known to be missing.

    Raises:
        DataError: names the file, the first entry that is wrong, what is wrong and what was expected.
    """
    if layout.package and find_spec(layout.package) is None:
        raise DataError(
            f"{meta.json_file}: {layout.name} is read with the package `{layout.package}`, which is not installed: "
            f"`pip install {layout.package}`"
        )
    ids = meta.get("thing_dataset_id_to_contiguous_id") or range(1, len(meta.get("thing_classes") or ()) + 1)
    stat = os.stat(meta.json_file)
    return _check(
        layout, meta.json_file, meta.image_root, frozenset(ids), train, stat.st_mtime_ns, stat.st_size
    )


@functools.lru_cache(maxsize=16)
def _check(
    layout: Format, path: str, image_root: str, known: frozenset, train: bool, _mtime_ns: int, _size: int
) -> tuple[dict, ...]:
    content = read_json(path)
    annotated = train or "annotations" in content
    evaluated = annotated and not train
    categories = entries_of(path, content, "categories")
    ids = _check_categories(layout, path, categories, known, evaluated)
    entries = entries_of(path, content, "images")
    images = _check_images(layout, path, entries, ids, layout.federated and evaluated)
    annotations = entries_of(path, content, "annotations") if annotated else []
    _check_annotations(layout, path, annotations, images, ids, evaluated)
    if train and not annotations:
        raise DataError(f"{path}: it has no annotations, so there is nothing to train on")
    logger.info("%s: %d images, %d annotations, nothing wrong", path, len(images), len(annotations))
    found = [(layout.image_path(entry[layout.image_key]), entry) for entry in entries]
    return tuple(
        {
            "file_name": os.path.join(image_root, file),
            "width": entry["width"],
            "height": entry["height"],
        }
        for file, entry in found
        if file
    )


def _check_categories(
    layout: Format, path: str, entries: list, known: frozenset, evaluated: bool
) -> set[int]:
    keys = {"id": is_int, "name": is_text}
    for number, entry in enumerate(entries):
        where = name_of(entry, number, "category", "categories")
        require_keys(path, where, entry, keys)
        if layout.federated and evaluated and entry.get("frequency") not in ("r", "c", "f"):
            raise DataError(
                f"{path}: {where} has frequency {entry.get('frequency')!r}; expected r, c or f (rare, common, frequent)"
            )
    ids = {entry["id"] for entry in entries}
    if len(ids) != len(entries):
        raise DataError(f"{path}: a category id occurs twice; ids must be unique")
    if not ids or not ids <= known:
        raise DataError(
            f"{path}: its {len(ids)} category ids ({some(sorted(ids)) or 'none'}) are not among the {len(known)} that "
            f"the data set's name stands for ({some(sorted(known))}); register the file by a name of its own"
        )
    return ids


def _check_images(layout: Format, path: str, entries: list, ids: set[int], federated: bool) -> set:
    keys = {"id": is_id, layout.image_key: is_text, "width": is_positive_int, "height": is_positive_int}
    seen: set = set()
    for number, entry in enumerate(entries):
        where = name_of(entry, number, "image", "images")
        require_keys(path, where, entry, keys)
        if entry["id"] in seen:
            raise DataError(f"{path}: image id {entry['id']} occurs twice; ids must be unique")
        seen.add(entry["id"])
        for key in ("neg_category_ids", "not_exhaustive_category_ids") if federated else ():
            if not isinstance(entry.get(key), list) or not ids.issuperset(entry[key]):
                raise DataError(
                    f"{path}: {where} has {key} {entry.get(key)!r}; expected a list of ids of `categories`, as LVIS's "
                    "evaluation reads it"
                )
    if not seen:
        raise DataError(f"{path}: the data set is empty (`images` has no entries); expected at least one")
    return seen


def _check_annotations(
    layout: Format, path: str, entries: list, images: set, ids: set[int], evaluated: bool
) -> None:
    keys = {"id": is_id, "image_id": is_id, "category_id": is_int, "bbox": is_box}
    seen = set()
    for number, entry in enumerate(entries):
        where = name_of(entry, number)
        require_keys(path, where, entry, keys)
        if evaluated and entry.get("area") is not None and not is_number(entry["area"]):
            raise DataError(f"{path}: {where} has area {entry['area']!r}; expected a finite number, or none")
        if entry["id"] in seen:
            raise DataError(f"{path}: annotation id {entry['id']} occurs twice; ids must be unique")
        seen.add(entry["id"])
        if entry["image_id"] not in images:
            raise DataError(
                f"{path}: {where} is on image_id {entry['image_id']}, which is not among the file's `images`"
            )
        if entry["category_id"] not in ids:
            raise DataError(
                f"{path}: {where} has category_id {entry['category_id']}, which is not among the file's `categories`"
            )
        if layout.has_polygons and not _are_polygons(entry.get("segmentation")):
            raise DataError(
                f"{path}: {where} has no mask that {layout.name}'s reader takes; expected polygons "
                "[[x1, y1, x2, y2, ...], ...], each of three points at least"
            )


def _are_polygons(segmentation: object) -> bool:
    return (
        isinstance(segmentation, list)
        and len(segmentation) > 0
        and all(
            isinstance(p, list) and len(p) >= 6 and len(p) % 2 == 0 and are_numbers(p) for p in segmentation
        )
    )
