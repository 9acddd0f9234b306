"""Objects365 (Shao et al., ICCV 2019), version 2: 365 classes, boxes only, two million images.

The published files, unpacked, are

    $DETECTRON2_DATASETS/objects365/annotations/zhiyuan_objv2_{train,val}.json
    $DETECTRON2_DATASETS/objects365/{train,val}/patch*/*.jpg

The data sets are named objects365_v2_train and objects365_v2_val.
"""

import os
from functools import partial
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog

from visft.data.datasets.coco import load_coco_json
from visft.data.datasets.layouts import Layout, last_two_parts

NAMES = {split: f"objects365_v2_{split}" for split in ("train", "val")}

# Images that the training set's file lists but its archives lack.
_MISSING = {
    "patch16/objects365_v2_00908726.jpg",
    "patch6/objects365_v1_00320532.jpg",
    "patch6/objects365_v1_00320534.jpg",
}


def class_names() -> list[str]:
    """Return the names of the classes 1 to 365 in the order of their ids, spelled as in the published file."""
    return Path(__file__).with_suffix(".txt").read_text(encoding="utf-8").splitlines()


def image_path(file_name: str) -> str:
    """Return the path of an image: the file has images/v1/patch8/NAME, but its archive unpacks to patch8/NAME.

    The result is "" for a missing image.
    """
    path = last_two_parts(file_name)
    return "" if path in _MISSING else path


LAYOUT = Layout("Objects365", image_path=image_path, own_classes=False, strict=False)


def register_objects365() -> None:
    """Register both splits under DETECTRON2_DATASETS in detectron2's catalogs, replacing earlier entries.

    Reads no annotations.
    """
    root = os.path.join(os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets")), "objects365")
    names = class_names()
    for split, name in NAMES.items():
        json_file = os.path.join(root, "annotations", f"zhiyuan_objv2_{split}.json")
        image_root = os.path.join(root, split)
        if name in DatasetCatalog:
            DatasetCatalog.remove(name)
            MetadataCatalog.pop(name, None)
        DatasetCatalog.register(name, partial(load_coco_json, json_file, image_root, name, LAYOUT))
        MetadataCatalog.get(name).set(
            json_file=json_file,
            image_root=image_root,
            evaluator_type="coco",
            annotation_format=LAYOUT,
            thing_classes=names,
            thing_dataset_id_to_contiguous_id={index + 1: index for index in range(len(names))},
        )
