"""Dataset dicts of COCO files, as detectron2's `load_coco_json` makes them, whatever kind the ids are."""

import os
from collections import defaultdict

from detectron2.data import MetadataCatalog
from detectron2.structures import BoxMode

from visft.data.coco_json import in_order, read_json
from visft.data.masks import compressed, usable

_KEYS = ("iscrowd", "bbox", "keypoints", "category_id")


def load_coco_json(json_file: str, image_root: str, name: str | None = None) -> list[dict]:
    """The images of a checked file in the order of their ids (see `in_order`).

    Args:
        image_root: folder that `file_name`s are relative to.
        name: of the data set, whose metadata gets the classes and their ids; `category_id` is then the index of a
            class. None: it stays the file's.
    """
    content = read_json(json_file)
    classes = {c["id"]: c["name"] for c in sorted(content["categories"], key=lambda c: c["id"])}
    indices = {category: index for index, category in enumerate(classes)}
    if name is not None:
        meta = MetadataCatalog.get(name)
        meta.thing_classes, meta.thing_dataset_id_to_contiguous_id = list(classes.values()), indices
    annotations = defaultdict(list)
    for annotation in content.get("annotations", ()):
        annotations[annotation["image_id"]].append(_annotation(annotation, indices if name else None))
    images = {image["id"]: image for image in content["images"]}
    return [
        {
            "file_name": os.path.join(image_root, images[key]["file_name"]),
            "height": images[key]["height"],
            "width": images[key]["width"],
            "image_id": key,
            "annotations": annotations[key],
        }
        for key in in_order(images)
    ]


def _annotation(annotation: dict, indices: dict | None) -> dict:
    found = {key: annotation[key] for key in _KEYS if key in annotation}
    mask = usable(annotation.get("segmentation"))
    if mask is not None:
        found["segmentation"] = compressed(mask) if isinstance(mask, dict) else mask
    if found.get("keypoints"):
        # Whole pixels to coordinates, as detectron2.
        found["keypoints"] = [v if i % 3 == 2 else v + 0.5 for i, v in enumerate(found["keypoints"])]
    else:
        found.pop("keypoints", None)
    found["bbox_mode"] = BoxMode.XYWH_ABS
    if indices is not None:
        found["category_id"] = indices[found["category_id"]]
    return found
