"""Stock detectors through tools/train_net.py: trained, resumed and evaluated by the command line."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import processes
import pytest
import shapes
from detectron2.data import MetadataCatalog
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from PIL import Image

from visft.engine import settings, stock
from visft.errors import ConfigError

SMALL = {
    "MODEL.DEVICE": "cpu",
    "MODEL.CLIP_VIT.NAME": "visft-tiny",
    "MODEL.CLIP_VIT.PRETRAINED": "",
    "MODEL.CLIP_VIT.WINDOW_SIZE": 4,
    "MODEL.CLIP_VIT.GLOBAL_BLOCKS": (),
    "MODEL.CLIP_VIT.FPN_CHANNELS": 32,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 20,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 10,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 8,
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0,
    "MODEL.ROI_BOX_HEAD.CONV_DIM": 32,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 32,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 32,
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": 32,
    "INPUT.MIN_SIZE_TRAIN": (64,),
    "INPUT.MIN_SIZE_TEST": 64,
    "TEST.DETECTIONS_PER_IMAGE": 5,
    "DATALOADER.NUM_WORKERS": 0,
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.STEPS": (),
    "SOLVER.MAX_ITER": 2,
    "SOLVER.CHECKPOINT_PERIOD": 1,
    "SEED": 1,
}


def arguments(root: Path, name: str, *options: str, **keys) -> list[str]:
    """Options and then KEY VALUE pairs over a small version of the config `name`."""
    pairs = SMALL | {key.replace("__", "."): value for key, value in keys.items()}
    words = [str(word) for pair in pairs.items() for word in pair]
    return ["--config-file", str(root / "configs" / f"{name}.yaml"), *options, *words]


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]


def test_mask_rcnn_on_own_data(root, shapes_train, shapes_test, tmp_path):
    """Also where ids are texts, nothing says `iscrowd`, and an image of the training set is broken."""
    content = json.loads(Path(shapes_test[0]).read_text())
    for image in content["images"]:
        image["id"] = f"no. {image['id']}"
    for annotation in content["annotations"]:
        annotation["image_id"] = f"no. {annotation['image_id']}"
        del annotation["iscrowd"], annotation["area"]
    test_json = tmp_path / "test.json"
    test_json.write_text(json.dumps(content))
    images = tmp_path / "images"
    shutil.copytree(shapes_train[1], images)
    next(images.iterdir()).write_bytes(b"\x89PNG")
    keys = {
        "DATALOADER__SKIP_BROKEN": True,
        "OUTPUT_DIR": tmp_path / "run",
        "VISFT__DATA__TRAIN_JSON": shapes_train[0],
        "VISFT__DATA__TRAIN_IMAGES": images,
        "VISFT__DATA__TEST_JSON": test_json,
        "VISFT__DATA__TEST_IMAGES": shapes_test[1],
        "MODEL__ROI_HEADS__NUM_CLASSES": len(shapes.CLASSES),
    }
    name = "mask_rcnn_clip_vit_b16_fpn"
    status, text = processes.run("train_net.py", arguments(root, name, **keys), tmp_path / "log")
    assert status == 0, text
    figures = rows(tmp_path / "run")[-1]
    assert {"bbox/AP50", "segm/AP50"} <= figures.keys()
    found = json.loads((tmp_path / "run" / "inference" / "coco_instances_results.json").read_text())
    assert found and {entry["image_id"] for entry in found} <= {f"no. {i}" for i in (1, 2, 3, 4)}

    # One iteration more, from where it was; then the figures of its end again, without training.
    more = arguments(root, name, "--resume", **keys, SOLVER__MAX_ITER=3)
    status, text = processes.run("train_net.py", more, tmp_path / "log")
    assert status == 0 and "Starting training from iteration 2" in text, text
    end = rows(tmp_path / "run")[-1]
    again = arguments(root, name, "--eval-only", **keys)
    again += [
        "MODEL.WEIGHTS",
        str(tmp_path / "run" / "model_final.pth"),
        "OUTPUT_DIR",
        str(tmp_path / "again"),
    ]
    status, text = processes.run("train_net.py", again, tmp_path / "again.log")
    assert status == 0, text
    expected = {
        name.removeprefix("bbox/"): value for name, value in end.items() if name.startswith("bbox/AP")
    }
    assert f"{{'bbox': {{'AP': {expected['AP']}" in text.replace("OrderedDict([('bbox', ", "{'bbox': ")


@pytest.fixture(scope="module")
def coco(tmp_path_factory) -> Path:
    """A folder for DETECTRON2_DATASETS with COCO's layout, categories and semantic labels, four images a split."""
    root = tmp_path_factory.mktemp("datasets")
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
    return root


def test_panoptic_fpn_on_coco(root, coco, tmp_path):
    """By the names of the config; panopticapi, which no registry has, is done without."""
    words = arguments(root, "panoptic_fpn_clip_vit_b16", OUTPUT_DIR=tmp_path / "run")
    # In a process of its own: detectron2 reads DETECTRON2_DATASETS when it is imported.
    command = [sys.executable, str(root / "tools" / "train_net.py"), *words]
    environment = os.environ | {"DETECTRON2_DATASETS": str(coco)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert {"bbox/AP50", "segm/AP50", "sem_seg/mIoU"} <= rows(tmp_path / "run")[-1].keys()
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
