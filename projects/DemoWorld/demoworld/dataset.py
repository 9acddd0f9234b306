"""The demo world on disk: COCO files of train and validation scenes, and of scenes of unseen things.

    root/train/*.jpg  root/val/*.jpg  root/unseen/*.jpg
    root/annotations/{instances,captions}_{train,val,unseen}.json
    root/demo_world.json     what the folder was made with; written last

The images contain OpenMoji's drawings, so the data set is under CC BY-SA 4.0 too. Its files say so.
"""

import json
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from demoworld import catalogue, scenes, unseen_things
from demoworld.errors import DemoWorldError

logger = logging.getLogger(__name__)

MARKER = "demo_world.json"
VERSION = 2
"""It is increased when the same parameters give other files, so that old folders are rebuilt."""

FIRST_FRESH = 5001
SCENES_OF_HEADS = 69_000
"""The shipped heads have seen training scenes 1 to this number: 1 to 5,000 many times, the others once. Gradients of a
head on memorised scenes say little about a tower's features, so the demo uses later scenes."""

_QUALITY = 92


@dataclass(frozen=True)
class DemoData:
    """The places of the demo world's files."""

    root: Path

    def images(self, split: str) -> Path:
        return self.root / split

    def instances(self, split: str) -> Path:
        return self.root / "annotations" / f"instances_{split}.json"

    def captions(self, split: str) -> Path:
        return self.root / "annotations" / f"captions_{split}.json"


def make(
    root: str | Path,
    *,
    num_train: int = 4000,
    num_val: int = 500,
    num_unseen: int = 100,
    seed: int = 0,
    first_train: int = SCENES_OF_HEADS + 1,
) -> DemoData:
    """Make the demo world, unless `root` already has one with these parameters.

    The same parameters give the same bytes. The folder gets its name when it is complete.

    Args:
        root: the folder.
        num_train, num_val: numbers of scenes.
        num_unseen: number of scenes of unseen things, which are the first of the out-of-domain suite.
        seed: of the scenes. A scene depends only on the seed, its split and its number.
        first_train: number of the first training scene. The default is the first that the shipped heads have not seen.

    Raises:
        DemoWorldError: `root` has files that were not made here, or numbers are out of range.
    """
    root = Path(root)
    if min(num_train, num_val, num_unseen) < 1:
        raise DemoWorldError(
            f"a demo world needs scenes in every split, not {num_train}, {num_val} and {num_unseen}"
        )
    if first_train < 1:
        raise DemoWorldError(f"training scenes are numbered from 1, not from {first_train}")
    parameters = {"version": VERSION, "num_train": num_train, "num_val": num_val, "seed": seed}
    parameters |= {"first_train": first_train, "num_unseen": num_unseen}
    parameters["sizes"] = [list(size) for size in scenes.SIZES]
    if _made_with(root) == parameters:
        return DemoData(root)
    if root.exists() and _made_with(root) is None and (not root.is_dir() or any(root.iterdir())):
        raise DemoWorldError(
            f"{root} is there and was not made by make_demo_data: give another folder, or remove it"
        )
    root.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(root)
    aside = root.with_name(f"{root.name}.partial-{os.getpid()}")
    try:
        data = DemoData(aside)
        data.instances("train").parent.mkdir(parents=True)
        for split, first, count in (("train", first_train, num_train), ("val", 1, num_val)):
            _write_split(data, split, range(first, first + count), seed)
        _write_split(data, "unseen", range(1, num_unseen + 1), seed)
        (aside / MARKER).write_text(json.dumps(parameters, indent=1), encoding="utf-8")
        if root.exists():
            shutil.rmtree(root)
        try:
            os.rename(aside, root)
        except OSError:
            if _made_with(root) != parameters:
                raise
            # Another process has just made the same folder.
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    logger.info("%s: %d train and %d validation scenes", root, num_train, num_val)
    return DemoData(root)


def _made_with(root: Path) -> dict | None:
    try:
        return json.loads((root / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _remove_abandoned(root: Path) -> None:
    """Remove incomplete folders of killed processes."""
    for path in root.parent.glob(f"{root.name}.partial-*"):
        pid = path.name.rpartition("-")[2]
        if pid.isdigit() and int(pid) != os.getpid():
            try:
                os.kill(int(pid), 0)
            except ProcessLookupError:
                shutil.rmtree(path, ignore_errors=True)
            except OSError:
                pass
        elif pid.isdigit():
            shutil.rmtree(path, ignore_errors=True)


def coco_categories() -> list[dict]:
    """Return COCO's entries (id, name, supercategory) of the categories in the demo world, by id."""
    return [{"id": c.id, "name": c.name, "supercategory": c.supercategory} for c in catalogue.COCO_CATEGORIES]


def categories_of(split: str) -> list[dict]:
    """Return the entries of a split's categories: COCO's, or the own ones of `unseen`, numbered from 1."""
    if split != "unseen":
        return coco_categories()
    names = unseen_things.cast().names
    return [{"id": i, "name": name, "supercategory": "unseen"} for i, name in enumerate(names, start=1)]


def _write_split(data: DemoData, split: str, numbers: range, seed: int) -> None:
    from pycocotools import mask as mask_api

    head = {
        "info": {"description": f"ViSFT demo world, {split}", "version": str(VERSION), "seed": seed}
        | {"contributor": catalogue.ATTRIBUTION},
        "licenses": [{"id": 1, "name": "CC BY-SA 4.0", "url": catalogue.LICENSE_URL}],
    }
    emoji, categories = catalogue.catalogue(), categories_of(split)
    images, instances, captions = [], [], []
    data.images(split).mkdir()
    # `disable=None` shows the bar only on a terminal.
    for image_id in tqdm(numbers, f"{split} scenes", disable=None, leave=False):
        # A longer data set starts with the shorter one.
        if split == "unseen":
            scene = unseen_things.scene(unseen_things.TEST, image_id - 1)
        else:
            rng = np.random.default_rng([seed, split == "val", image_id])
            scene = scenes.compose(rng, held_out=split == "val")
        height, width = scene.image.shape[:2]
        name = f"{image_id:012d}.jpg"
        Image.fromarray(scene.image).save(data.images(split) / name, quality=_QUALITY, subsampling=0)
        images.append({"id": image_id, "file_name": name, "height": height, "width": width, "license": 1})
        for item in scene.objects:
            rle = mask_api.encode(np.asfortranarray(item.mask.astype(np.uint8)))
            instances.append(
                {
                    "id": len(instances) + 1,
                    "image_id": image_id,
                    "category_id": categories[item.category]["id"],
                    "bbox": list(item.box),
                    "area": int(item.mask.sum()),
                    "segmentation": {"size": rle["size"], "counts": rle["counts"].decode("ascii")},
                    "iscrowd": 0,
                    "emoji": emoji[item.emoji].key,
                }
            )
        for text in scene.captions:
            captions.append({"id": len(captions) + 1, "image_id": image_id, "caption": text})
    body = {"images": images, "annotations": instances, "categories": categories}
    data.instances(split).write_text(json.dumps(head | body), encoding="utf-8")
    data.captions(split).write_text(
        json.dumps(head | {"images": images, "annotations": captions}), encoding="utf-8"
    )
