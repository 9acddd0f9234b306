"""Stock detectors through tools/train_net.py: trained, resumed and evaluated by the command line."""

import contextlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import runs
import shapes
from detectron2.data import MetadataCatalog
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from PIL import Image
from stock_keys import SMALL

from visft.engine import settings, stock
from visft.errors import ConfigError


def arguments(root: Path, name: str, keys: dict) -> list[str]:
    """A small version of the config `name`."""
    return ["--config-file", str(root / "configs" / f"{name}.yaml"), *runs.words(SMALL | keys)]


def test_mask_rcnn_on_own_data(root, shapes_train, shapes_test, tmp_path):
    """Also where ids are texts, nothing says `iscrowd`, and an image of the training set is broken."""
    content = json.loads(Path(shapes_test[0]).read_text())
    for image in content["images"]:
        image["id"] = f"no. {image['id']}"
    for annotation in content["annotations"]:
        annotation["image_id"] = f"no. {annotation['image_id']}"
        del annotation["iscrowd"], annotation["area"]
    (tmp_path / "test.json").write_text(json.dumps(content))
    shutil.copytree(shapes_train[1], tmp_path / "images")
    next((tmp_path / "images").iterdir()).write_bytes(b"\x89PNG")
    run = tmp_path / "run"
    keys = {
        "OUTPUT_DIR": run,
        "DATALOADER.SKIP_BROKEN": True,
        "VISFT.DATA.TRAIN_JSON": shapes_train[0],
        "VISFT.DATA.TRAIN_IMAGES": tmp_path / "images",
        "VISFT.DATA.TEST_JSON": tmp_path / "test.json",
        "VISFT.DATA.TEST_IMAGES": shapes_test[1],
        "MODEL.ROI_HEADS.NUM_CLASSES": len(shapes.CLASSES),
    }
    words = arguments(root, "mask_rcnn_clip_vit_b16_fpn", keys)
    runs.train(words, tmp_path / "log")
    assert {"bbox/AP50", "segm/AP50"} <= runs.rows(run / "metrics.json")[-1].keys()
    found = json.loads((run / "inference" / "coco_instances_results.json").read_text())
    assert found and {entry["image_id"] for entry in found} <= {f"no. {i}" for i in (1, 2, 3, 4)}

    # One iteration more, from where it was; then the figures of its end again, without training.
    more = [*runs.option(words, "--resume"), "SOLVER.MAX_ITER", "3"]
    assert "Starting training from iteration 2" in runs.train(more, tmp_path / "log")
    keys = {"MODEL.WEIGHTS": run / "model_final.pth", "OUTPUT_DIR": tmp_path / "again"}
    again = [*runs.option(words, "--eval-only"), *runs.words(keys)]
    text = runs.train(again, tmp_path / "again.log").replace("OrderedDict([('bbox', ", "{'bbox': ")
    assert f"{{'bbox': {{'AP': {runs.rows(run / 'metrics.json')[-1]['bbox/AP']}" in text


@pytest.fixture(scope="module")
def coco(tmp_path_factory) -> Path:
    """A folder of data sets with COCO's layout, categories and semantic labels, four images a split; the folder that
    it is in."""
    root = tmp_path_factory.mktemp("coco") / "datasets"
    annotations = root / "coco" / "annotations"
    annotations.mkdir(parents=True)
    categories = [{"id": c["id"], "name": c["name"]} for c in COCO_CATEGORIES if c["isthing"]]
    for seed, split in enumerate(("train2017", "val2017")):
        file, images = shapes.make(root / split, images=4, seed=seed)
        content = json.loads(file.read_text()) | {"categories": categories}
        for folder in (split, f"panoptic_stuff_{split}", f"panoptic_{split}"):
            (root / "coco" / folder).mkdir()
        for image in content["images"]:
            name = Path(image["file_name"]).stem
            with Image.open(images / image["file_name"]) as picture:
                picture.save(root / "coco" / split / f"{name}.jpg")
            image["file_name"] = f"{name}.jpg"
            labels = np.full((image["height"], image["width"]), 1 + image["id"], np.uint8)
            Image.fromarray(labels).save(root / "coco" / f"panoptic_stuff_{split}" / f"{name}.png")
        (annotations / f"instances_{split}.json").write_text(json.dumps(content))
        (annotations / f"panoptic_{split}.json").write_text("{}")
    return root.parent


def test_panoptic_fpn_on_coco(root, coco, tmp_path):
    """By the names of the config; panopticapi, which no registry has, is done without."""
    words = arguments(root, "panoptic_fpn_clip_vit_b16", {"OUTPUT_DIR": tmp_path / "run"})
    runs.train(words, tmp_path / "log", folder=coco)
    figures = runs.rows(tmp_path / "run" / "metrics.json")[-1]
    assert {"bbox/AP50", "segm/AP50", "sem_seg/mIoU"} <= figures.keys()
    log = (tmp_path / "run" / "log.txt").read_text()
    said, began = log.find("without panoptic quality"), log.find("Starting training")
    assert 0 < said < began


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("MODEL.MASK_ON", True, "no annotation of stock_boxes .* has a mask; set MODEL.MASK_ON to False"),
        ("MODEL.LOAD_PROPOSALS", True, "MODEL.LOAD_PROPOSALS is True: proposals come in pickle files"),
        ("MODEL.MASK_ON", False, ""),
    ],
)
def test_what_a_detector_cannot_learn_from_is_named_before_training(
    root, shapes_train, tmp_path, key, value, words
):
    content = json.loads(Path(shapes_train[0]).read_text())
    for annotation in content["annotations"]:
        del annotation["segmentation"]
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    cfg = settings.load_config(str(root / "configs" / "mask_rcnn_clip_vit_b16_fpn.yaml"), [key, str(value)])
    cfg.DATASETS.TRAIN = ("stock_boxes",)
    MetadataCatalog.get("stock_boxes").json_file = str(tmp_path / "boxes.json")
    try:
        with pytest.raises(ConfigError, match=words) if words else contextlib.nullcontext():
            stock._check_training_data(cfg)
    finally:
        MetadataCatalog.remove("stock_boxes")


def test_a_kind_that_is_not_evaluated_is_refused_before_training(root):
    cfg = settings.load_config(str(root / "configs" / "mask_rcnn_clip_vit_b16_fpn.yaml"))
    cfg.DATASETS.TEST = ("stock_cityscapes",)
    MetadataCatalog.get("stock_cityscapes").evaluator_type = "cityscapes_instance"
    try:
        with pytest.raises(ConfigError, match="stock_cityscapes is of the kind `cityscapes_instance`"):
            stock._check_evaluators(cfg)
    finally:
        MetadataCatalog.remove("stock_cityscapes")
