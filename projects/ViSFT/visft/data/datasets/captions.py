"""Captions of images, from files in the format of COCO's `captions_train2017.json`."""

import functools
import os
from collections.abc import Mapping

from detectron2.data import DatasetCatalog, MetadataCatalog

from visft.data.datasets.coco import outlines_of, records_of
from visft.data.datasets.coco_json import entries_of, name_of, read_json
from visft.data.datasets.packed import PackedMapping, Rows, packed, row
from visft.data.datasets.shards import ShardCaptions, ShardRecords
from visft.errors import DataError

_KEYS = "`images` and `annotations`"


def register_coco_captions() -> None:
    """Set the metadata `caption_json` of detectron2's COCO data sets to COCO's caption files. Reads no file."""
    for name in DatasetCatalog.list():
        if name.startswith("coco_20") and not name.endswith(("_panoptic", "_separated", "_stuffonly")):
            meta = MetadataCatalog.get(name)
            folder, _, file = (meta.get("json_file") or "").rpartition("instances_")
            if folder:
                meta.caption_json = f"{folder}captions_{file}"


def captions_of(name: str) -> Mapping[int | str, list[str]]:
    """Return the captions of a registered data set by image id. Empty if it has none.

    They come from the file in the metadata (`caption_json`), or from the key `captions` of the records.

    Raises:
        DataError: the caption file is broken.
    """
    path = MetadataCatalog.get(name).get("caption_json")
    if path:
        return read_captions(path) if os.path.isfile(path) else {}
    if MetadataCatalog.get(name).get("json_file"):
        return {}  # this format has no captions, so there is no need to load the records
    records = records_of(name)
    if isinstance(records, ShardRecords):
        return records.captions
    return {r["image_id"]: list(r["captions"]) for r in outlines_of(records) if r.get("captions")}


def read_captions(path: str) -> Mapping[int | str, list[str]]:
    """Return the captions in a file by image id, in the file's order. An unchanged file is not read again.

    Raises:
        DataError: the file is broken. The message names the first broken entry.
    """
    try:
        stat = os.stat(path)
    except OSError as error:
        raise DataError(f"{path}: the caption file cannot be opened ({error.strerror})") from None
    return _read(path, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=4)
def _read(path: str, _mtime_ns: int, _size: int) -> Mapping[int | str, list[str]]:
    def build() -> tuple[dict, Rows]:
        return {}, {"captions": [row(entry) for entry in _captions(path, read_json(path, _KEYS)).items()]}

    file = packed(path, "captions", build)
    return _captions(path, read_json(path, _KEYS)) if file is None else PackedMapping(file, "captions")


def _captions(path: str, content: dict) -> dict[int | str, list[str]]:
    captions: dict[int | str, list[str]] = {}
    for number, entry in enumerate(entries_of(path, content, "annotations", _KEYS)):
        where = name_of(entry, number)
        if not isinstance(entry, dict):
            raise DataError(
                f"{path}: {where} is a {type(entry).__name__}; expected an object with `image_id` and `caption`"
            )
        text, image = entry.get("caption"), entry.get("image_id")
        if not isinstance(text, str) or not isinstance(image, int | str) or isinstance(image, bool):
            raise DataError(
                f"{path}: {where} is no caption: it has image_id {image!r} and caption {text!r}; expected a number or "
                "string as image_id and a string as caption"
            )
        captions.setdefault(image, []).append(text)
    return captions


def load_captioned(path: str, image_root: str) -> list[dict]:
    """Return records of a caption file's `images`, which have only captions.

    Raises:
        DataError: the file is broken, or an image has no `id` or `file_name`.
    """
    captions, records = read_captions(path), []
    for number, entry in enumerate(entries_of(path, read_json(path, _KEYS), "images", _KEYS)):
        where = name_of(entry, number, "image", "images")
        if not isinstance(entry, dict) or not isinstance(entry.get("file_name"), str) or "id" not in entry:
            raise DataError(f"{path}: {where} lacks `id` or `file_name`, which every image needs; add them")
        file = os.path.join(image_root, entry["file_name"])
        record = {"file_name": file, "image_id": entry["id"], "captions": captions.get(entry["id"], [])}
        records.append(record | {side: entry[side] for side in ("height", "width") if side in entry})
    return records


def check_captions(name: str) -> int:
    """Return the number of images with captions in a registered data set.

    Raises:
        DataError: its caption file is broken, or all its captions belong to other images.
    """
    captions = captions_of(name)
    if isinstance(captions, ShardCaptions) or not captions:
        return len(captions)
    found = sum(record.get("image_id") in captions for record in outlines_of(records_of(name)))
    if not found:
        raise DataError(
            f"{MetadataCatalog.get(name).get('caption_json')}: none of its {len(captions)} image ids is an image of "
            f"{name}; use the caption file that belongs to the annotation file"
        )
    return found
