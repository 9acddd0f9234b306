"""Dataset dicts, like detectron2's, of COCO files and files in similar formats, with ids of any kind.

The dicts of a large file are parsed one by one on access, from a file that one process of the machine wrote.
"""

import copy
import dataclasses
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
from detectron2.data import DatasetCatalog, DatasetFromList, MetadataCatalog
from detectron2.structures import BoxMode
from torch.utils.data import ConcatDataset, Dataset

from visft.data.datasets.coco_json import in_order, read_json
from visft.data.datasets.json_arrays import JSONArrays, NotSplitError
from visft.data.datasets.layouts import COCO, LVIS, Layout, class_indices
from visft.data.datasets.packed import PackedFile, Rows, packed, row
from visft.data.masks import compressed, usable
from visft.data.validation import check_content, summary_of
from visft.errors import DataError

_KEYS = ("iscrowd", "bbox", "keypoints", "category_id")
_OUTLINE = ("iscrowd", "category_id")


_STOCK_READERS = {
    ("detectron2.data.datasets.coco", "register_coco_instances.<locals>.<lambda>"): COCO,
    ("detectron2.data.datasets.lvis", "register_lvis_instances.<locals>.<lambda>"): LVIS,
}
"""detectron2's readers, by module and name, whose files this module reads instead."""


def load_coco_json(
    json_file: str, image_root: str, name: str, layout: Layout = COCO
) -> "list[dict] | PackedRecords":
    """Return the images of a checked file in the order of their ids (see `in_order`).

    The `category_id` of an annotation is the index of its class.

    Args:
        image_root: folder that the images' paths are relative to.
        name: of the data set. With `layout.own_classes`, its metadata gets the classes and their ids from the file;
            otherwise its metadata defines them.
    """
    meta = MetadataCatalog.get(name)
    file = packed_coco(json_file, layout)
    if file is not None:
        summary = summary_of(file.summary)
        classes = dict(zip(summary.category_ids, summary.classes, strict=True))
    else:
        content = read_json(json_file)
        classes = {c["id"]: c["name"] for c in sorted(content["categories"], key=lambda c: c["id"])}
    indices = {category: index for index, category in enumerate(classes)}
    if layout.own_classes:
        meta.thing_classes, meta.thing_dataset_id_to_contiguous_id = list(classes.values()), indices
    else:
        known = class_indices(meta)
        indices = {category: known[category] for category in indices}
    if file is not None:
        return PackedRecords(file, image_root, classes=list(indices.values()))
    records = list(_records(content, indices, layout))
    for record in records:
        record["file_name"] = os.path.join(image_root, record["file_name"])
    return records


def records_of(name: str) -> Sequence[dict]:
    """Return the records of a registered, checked data set. This module also reads detectron2's COCO and LVIS files.

    Raises:
        DataError: its annotations are broken.
    """
    reader = DatasetCatalog[name]
    place = (getattr(reader, "__module__", ""), getattr(reader, "__qualname__", ""))
    if place in _STOCK_READERS:
        meta = MetadataCatalog.get(name)
        if "://" not in meta.json_file:
            return load_coco_json(meta.json_file, meta.image_root, name, _STOCK_READERS[place])
    return DatasetCatalog.get(name)


def as_dataset(records: Sequence[dict]) -> Dataset:
    """Wrap records for worker processes, which share their memory."""
    return DatasetFromList(records, copy=False) if isinstance(records, list) else records


def outlines_of(records: Iterable[dict]) -> Iterable[dict]:
    """Return records without boxes and masks if this saves time."""
    return records.outlines() if isinstance(records, PackedRecords | JoinedRecords) else records


class PackedRecords(Sequence):
    """The records of a memory-mapped file with indices `rows`, in this order.

    Args:
        classes: the class index of each category of the file, in the order of the category ids.
        labels: keys to add to every record.
        captions: captions by image id to add to every record, if given.
        bare: rows whose annotations are left out.
    """

    def __init__(
        self,
        file: PackedFile,
        image_root: str,
        *,
        classes: Sequence[int],
        rows: np.ndarray | None = None,
        labels: Mapping | None = None,
        captions: Mapping | None = None,
        bare: frozenset[int] = frozenset(),
    ):
        self.summary = summary_of(file.summary)
        self._file, self._root, self._classes = file, image_root, classes
        self._rows = np.arange(len(file.rows("records"))) if rows is None else rows
        self._labels, self._captions, self._bare = labels or {}, captions, bare

    def labelled(self, labels: Mapping, captions: Mapping | None = None) -> "PackedRecords":
        """Return the same records with more keys."""
        other = copy.copy(self)
        other._labels, other._captions = {**self._labels, **labels}, captions
        return other

    def kept(self, indices: Sequence[int], bare: Iterable[int]) -> "PackedRecords":
        """Return the records at `indices`, without annotations for the indices in `bare`."""
        other = copy.copy(self)
        other._rows = self._rows[np.asarray(indices, dtype=np.int64)]
        other._bare = self._bare | {int(self._rows[index]) for index in bare}
        return other

    def outlines(self) -> Iterator[dict]:
        """Yield the records without boxes and masks."""
        rows = self._file.rows("outlines")
        return (self._record(rows, number) for number in self._rows.tolist())

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index):
        rows = self._file.rows("records")
        if isinstance(index, slice):
            return [self._record(rows, number) for number in self._rows[index].tolist()]
        return self._record(rows, int(self._rows[index]))

    def _record(self, rows: Sequence, number: int) -> dict:
        record = rows[number]
        record["file_name"] = os.path.join(self._root, record["file_name"])
        for annotation in record["annotations"]:
            annotation["bbox_mode"] = BoxMode.XYWH_ABS
            annotation["category_id"] = self._classes[annotation["category_id"]]
        if number in self._bare:
            del record["annotations"]
        if self._captions is not None:
            record["captions"] = self._captions.get(record["image_id"]) or []
        return record | self._labels


class JoinedRecords(ConcatDataset):
    """Concatenated records of several data sets."""

    def outlines(self) -> Iterator[dict]:
        """Yield the records without boxes and masks."""
        return (outline for part in self.datasets for outline in outlines_of(part))


def packed_coco(json_file: str, layout: Layout = COCO) -> PackedFile | None:
    """Return the checked content of a large file: its summary, and rows `records` and `outlines` (no boxes or masks).

    The category of an annotation is an index in the order of the category ids.

    Raises:
        DataError: see `check_content`.
    """

    def build() -> tuple[dict, Rows]:
        try:
            arrays = JSONArrays(json_file)
            content = {key: list(arrays.entries(key)) for key in ("images", "categories")}
            made = _pack(json_file, content, arrays.entries("annotations"), layout)
            arrays.rest()
            return made
        except (NotSplitError, DataError):  # parsing the whole file may succeed
            content = read_json(json_file)
            return _pack(json_file, content, content.get("annotations"), layout)

    return packed(json_file, layout.name.lower(), build)


def _pack(path: str, content: dict, annotations: Iterable | None, layout: Layout) -> tuple[dict, Rows]:
    """Return the summary and the rows. Frees the annotations one by one."""
    rows, outlines = defaultdict(list), defaultdict(list)

    def packing() -> Iterator:
        indices = {c: index for index, c in enumerate(sorted(c["id"] for c in content["categories"]))}
        for annotation in annotations:
            yield annotation  # continues only if the check passes
            found = _annotation(annotation, indices)
            del found["bbox_mode"]
            rows[annotation["image_id"]].append(row(found))
            outline = row({key: found[key] for key in _OUTLINE if key in found})
            outlines[annotation["image_id"]].append(outline)

    if isinstance(annotations, list | Iterator):
        summary = check_content(path, content, packing(), layout=layout)
    else:  # `annotations` is missing or not a list, which the check reports
        summary = check_content(path, content, layout=layout)
    sections = {"records": [], "outlines": []}
    for record in _records(content | {"annotations": []}, {}, layout):
        key = record["image_id"]
        opening = row(record).removesuffix(b"]}")
        sections["records"].append(opening + b",".join(rows.pop(key, ())) + b"]}")
        sections["outlines"].append(opening + b",".join(outlines.pop(key, ())) + b"]}")
    return dataclasses.asdict(summary), sections


def _records(content: dict, indices: dict, layout: Layout) -> Iterator[dict]:
    annotations = defaultdict(list)
    for annotation in content.get("annotations", ()):
        annotations[annotation["image_id"]].append(annotation)
    images = {image["id"]: image for image in content["images"]}
    for key in in_order(images):
        image = images[key]
        file_name = layout.file_of(image)
        if not file_name:
            continue
        yield {
            "file_name": file_name,
            "height": image["height"],
            "width": image["width"],
            "image_id": key,
            **{key: image[key] for key in layout.record_keys if key in image},
            "annotations": [_annotation(annotation, indices) for annotation in annotations[key]],
        }


def _annotation(annotation: dict, indices: dict) -> dict:
    found = {key: annotation[key] for key in _KEYS if key in annotation}
    mask = usable(annotation.get("segmentation"))
    if mask is not None:
        found["segmentation"] = compressed(mask) if isinstance(mask, dict) else mask
    if found.get("keypoints"):
        # Convert pixel indices to coordinates, as in detectron2.
        found["keypoints"] = [v if i % 3 == 2 else v + 0.5 for i, v in enumerate(found["keypoints"])]
    else:
        found.pop("keypoints", None)
    found["bbox_mode"] = BoxMode.XYWH_ABS
    found["category_id"] = indices[found["category_id"]]
    return found
