"""Tiny data sets of regions that lie on disk as ADE20K, COCO, LVIS and Objects365 do: coloured rectangles."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from visft.data.datasets import objects365

SIZE = (64, 96)
"""Whole pixels to each of the 16 x 16 cells."""

COLOURS = ((200, 30, 30), (30, 200, 30), (30, 30, 200), (200, 200, 30), (200, 30, 200), (30, 200, 200))
THINGS, STUFF = (7, 12, 149), (0, 2, 9)
"""ADE20K's bed, person, flag; wall, sky, grass."""

ADE = "ADEChallengeData2016"


def scene(seed: int) -> tuple[np.ndarray, np.ndarray, list[tuple[int, tuple[int, int, int, int]]]]:
    """An image of two backgrounds and two boxes on them, what of the four is where, and number and box of each."""
    rng = np.random.default_rng(seed)
    which, (height, width) = np.zeros(SIZE, int), SIZE
    cut = int(rng.integers(20, 44))
    kinds = [*(3 + rng.permutation(3)[:2]), *rng.permutation(3)[:2]]
    which[cut:] = 1
    boxes = [(0, 0, width, cut), (0, cut, width, height - cut)]
    for number, left in ((2, 4), (3, 52)):
        x, y = left + int(rng.integers(0, 12)), int(rng.integers(2, 24))
        w, h = int(rng.integers(16, 28)), int(rng.integers(16, 36))
        which[y : y + h, x : x + w] = number
        boxes.append((x, y, w, h))
    pixels = np.array(COLOURS)[np.array(kinds)[which]] + rng.integers(-20, 20, (*SIZE, 3))
    return np.clip(pixels, 0, 255).astype(np.uint8), which, list(zip(map(int, kinds), boxes, strict=True))


def save(file: Path, pixels: np.ndarray) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file, **({"quality": 95} if file.suffix == ".jpg" else {}))


def ade20k(root: Path, counts=(("training", 15), ("validation", 6)), classes=range(150)) -> None:
    """As Mask2Former's script writes it; some of its classes or all."""
    from detectron2.data.datasets.builtin_meta import ADE20K_SEM_SEG_CATEGORIES

    categories = [
        {"id": i, "name": name, "isthing": int(i in THINGS), "color": [i, i, i]}
        for i, name in enumerate(ADE20K_SEM_SEG_CATEGORIES)
        if i in classes
    ]
    for split, count in counts:
        short = "train" if split == "training" else "val"
        images, annotations = [], []
        for i in range(count):
            name = f"ADE_{short}_{i + 1:08d}"
            pixels, which, objects = scene(i + 50 * (short == "val"))
            ids = [70000 + 300 * i + 7 * number for number in range(4)]
            save(root / ADE / "images" / split / f"{name}.jpg", pixels)
            coded = np.array([[d % 256, d // 256 % 256, d // 65536] for d in ids], np.uint8)[which]
            coded[:1] = 0  # no segment
            save(root / ADE / f"ade20k_panoptic_{short}" / f"{name}.png", coded)
            labels = np.array([(*THINGS, *STUFF)[kind] + 1 for kind, _ in objects], np.uint8)[which]
            save(root / ADE / "annotations" / split / f"{name}.png", labels)
            infos = [
                {
                    "id": ids[number],
                    "category_id": (*THINGS, *STUFF)[kind],
                    "area": int((which == number).sum()),
                    "bbox": list(box),
                    "iscrowd": 0,
                }
                for number, (kind, box) in enumerate(objects)
            ]
            # Stuff that things hide altogether is named, and is nowhere.
            infos.append({"id": 5, "category_id": 2, "area": 9, "bbox": [1, 1, 3, 3], "iscrowd": 0})
            images.append({"id": name, "file_name": f"{name}.jpg", "width": 96, "height": 64})
            annotations.append({"image_id": name, "file_name": f"{name}.png", "segments_info": infos})
        found = {"images": images, "annotations": annotations, "categories": categories}
        (root / ADE / f"ade20k_panoptic_{short}.json").write_text(json.dumps(found))


def instances(root: Path, seeds, file_names, categories, *, masks=True) -> dict:
    """COCO's format, with what sets the data sets apart left to `file_names`: from a number to keys of an image and the
    place of its image."""
    images, annotations = [], []
    for number, seed in enumerate(seeds):
        keys, place = file_names(number)
        pixels, _, objects = scene(seed)
        save(root / place, pixels)
        images.append({"id": 500 - number, "width": 96, "height": 64, **keys})
        for kind, (x, y, w, h) in objects[2:]:
            annotation = {
                "id": len(annotations) + 1,
                "image_id": 500 - number,
                "category_id": categories[kind]["id"],
                "bbox": [x, y, w, h],
                "area": w * h,
                "iscrowd": 0,
            }
            if masks:
                annotation["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
            annotations.append(annotation)
        crowd = dict(annotation, id=9000 + number, iscrowd=1)
        if masks:
            crowd["segmentation"] = {"size": [64, 96], "counts": [0, 64 * 96]}
        annotations.append(crowd)
    return {"images": images, "annotations": annotations, "categories": categories}


def coco(root: Path) -> None:
    categories = [{"id": i, "name": name} for i, name in ((1, "person"), (17, "cat"), (90, "toothbrush"))]
    (root / "coco/annotations").mkdir(parents=True)
    for split, seeds in (("train2017", range(15)), ("val2017", range(50, 56))):

        def named(number, split=split):
            name = f"{number:012d}.jpg"
            return {"file_name": name}, f"coco/{split}/{name}"

        found = instances(root, seeds, named, categories)
        (root / f"coco/annotations/instances_{split}.json").write_text(json.dumps(found))


def lvis(root: Path) -> None:
    categories = [
        {"id": 3, "name": "bow_(weapon)", "synonyms": ["bow_(weapon)", "longbow"], "frequency": "r"},
        {"id": 1, "name": "aerosol_can", "synonyms": ["aerosol_can", "spray_can"], "frequency": "c"},
        {"id": 2, "name": "barrel", "synonyms": ["barrel", "cask"], "frequency": "f"},
    ]
    (root / "lvis").mkdir()
    for split, seeds in (("train", range(15)), ("val", range(50, 56))):

        def named(number, split=split):
            # Some images of LVIS's validation are of COCO's training.
            folder = "train2017" if split == "train" or number % 2 else "val2017"
            name = f"{number + 1000 * (split == 'val'):012d}.jpg"
            url = f"http://images.cocodataset.org/{folder}/{name}"
            return {"coco_url": url, "not_exhaustive_category_ids": []}, f"coco/{folder}/{name}"

        found = instances(root, seeds, named, categories)
        found["annotations"] = [a for a in found["annotations"] if not a.pop("iscrowd")]  # it has no such key
        (root / f"lvis/lvis_v1_{split}.json").write_text(json.dumps(found))


def objects(root: Path) -> dict:
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(objects365.class_names())]
    (root / "objects365/annotations").mkdir(parents=True)

    def named(number):
        name = f"objects365_v1_{number:08d}.jpg"
        return {
            "file_name": f"images/v1/patch{number % 3}/{name}"
        }, f"objects365/val/patch{number % 3}/{name}"

    found = instances(root, range(24), named, categories, masks=False)
    for annotation in found["annotations"]:
        annotation |= {"isfake": 0, "isreflected": 0}
    found["annotations"][0]["bbox"][0] -= 9.5  # published boxes reach over the edge
    found["annotations"][3]["bbox"][2] = 0
    (root / "objects365/annotations/zhiyuan_objv2_val.json").write_text(json.dumps(found))
    return found
