"""detectron2's own detectors over a CLIP tower: each is built, trained and evaluated by detectron2's own trainer."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import shapes
import stock_keys
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.data.datasets.coco_panoptic import register_coco_panoptic_separated
from detectron2.engine import DefaultTrainer, SimpleTrainer
from detectron2.evaluation import COCOEvaluator, DatasetEvaluators, SemSegEvaluator, inference_on_dataset
from detectron2.utils.events import EventStorage
from PIL import Image

from visft import model_zoo

SIZE = (96, 128)
"""Height and width of the images, four a split."""

STOCK = {
    "mask_rcnn_clip_vit_b16_fpn": {"bbox", "segm"},
    "cascade_mask_rcnn_clip_vit_b16_fpn": {"bbox", "segm"},
    "retinanet_clip_vit_b16_fpn": {"bbox"},
    "panoptic_fpn_clip_vit_b16": {"bbox", "segm", "sem_seg"},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Names of a small COCO data set: `{"train": ..., "val": ..., "train_panoptic": ..., "val_panoptic": ...}`."""
    root, names = tmp_path_factory.mktemp("coco"), {}
    for seed, split in enumerate(("train", "val")):
        file, images = shapes.make(root / split, images=4, size=SIZE, seed=seed)
        labels = np.zeros(SIZE, np.uint8)  # 0 things, 1 sky, 2 ground
        labels[10:50], labels[50:] = 1, 2
        (root / f"{split}_labels").mkdir()
        for image in images.glob("*.png"):  # detectron2 expects images in JPEG, labels in PNG
            Image.open(image).save(image.with_suffix(".jpg"))
            Image.fromarray(labels).save(root / f"{split}_labels" / image.name)
        file.write_text(file.read_text().replace(".png", ".jpg"))
        name = f"stock_detectors_{split}"
        register_coco_instances(name, {}, str(file), str(images))
        stuff = {"stuff_classes": ["things", "sky", "ground"]}
        register_coco_panoptic_separated(
            name, stuff, str(images), "", "", str(root / f"{split}_labels"), str(file)
        )
        names |= {split: name, f"{split}_panoptic": f"{name}_separated"}
    yield names
    for name in names.values():
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def read_labels(file: str, dtype: type) -> np.ndarray:
    return np.asarray(Image.open(file), dtype)


class Trainer(DefaultTrainer):
    """detectron2's trainer; it leaves to its users which evaluators they want."""

    @classmethod
    def build_evaluator(cls, cfg, name):
        tasks = ("bbox", "segm") if cfg.MODEL.MASK_ON else ("bbox",)
        evaluators = [COCOEvaluator(name, tasks=tasks, output_dir=cfg.OUTPUT_DIR)]
        if cfg.MODEL.META_ARCHITECTURE == "PanopticFPN":
            # Its own reader of label images asks numpy for `copy=False`, which numpy 2 refuses.
            labels = {"output_dir": cfg.OUTPUT_DIR, "sem_seg_loading_fn": read_labels}
            evaluators.append(SemSegEvaluator(name, **labels))
        return DatasetEvaluators(evaluators)


def small(name: str, world: dict[str, str], output: Path, *options):
    """The config `name` with a small tower with random weights, small heads, and the small data set."""
    cfg = model_zoo.get_config(name)
    suffix = "_panoptic" if name.startswith("panoptic") else ""
    keys = stock_keys.SMALL | {
        "OUTPUT_DIR": str(output),
        "DATASETS.TRAIN": (world[f"train{suffix}"],),
        "DATASETS.TEST": (world[f"val{suffix}"],),
        "MODEL.ROI_HEADS.NUM_CLASSES": 3,
        "MODEL.RETINANET.NUM_CLASSES": 3,
        "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 3,
    }
    cfg.merge_from_list([*(part for pair in keys.items() for part in pair), *options])
    cfg.freeze()
    return cfg


def changed(before: dict, after: dict) -> set[str]:
    """Names of the tensors that differ."""
    return {name for name in before if not torch.equal(before[name], after[name])}


def run(cfg) -> tuple[DefaultTrainer, set[str]]:
    """Train and evaluate; the trainer and the names of the parameters that moved."""
    Path(cfg.OUTPUT_DIR).mkdir(parents=True, exist_ok=True)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    return trainer, changed(before, dict(trainer.model.named_parameters()))


@pytest.mark.parametrize("name", STOCK)
def test_yaml_detector_trains_and_is_evaluated(name, world, tmp_path):
    cfg = small(name, world, tmp_path)
    trainer, moved = run(cfg)

    levels = trainer.model.backbone.output_shape()
    shape = {level: (spec.stride, spec.channels) for level, spec in levels.items()}
    assert shape == {f"p{k}": (2**k, 32) for k in range(2, 7)}
    rows = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    losses = [row["total_loss"] for row in rows if "total_loss" in row]
    assert losses and all(math.isfinite(loss) for loss in losses)

    tower = {n for n, _ in trainer.model.named_parameters() if ".tower." in n}
    assert moved & tower, "TRAIN is `full`, and nothing in the tower moved"
    assert moved - tower, "nothing outside the tower moved"

    results = trainer._last_eval_results
    assert set(results) == STOCK[name]
    assert "AP50" in results["bbox"]
    found = json.loads((tmp_path / "coco_instances_results.json").read_text())
    assert {entry["image_id"] for entry in found} <= {1, 2, 3, 4} and found
    assert {entry["category_id"] for entry in found} <= {2, 5, 8}
    height, width = SIZE
    for entry in found:
        x, y, w, h = entry["bbox"]
        assert -0.01 <= x and -0.01 <= y and x + w <= width + 0.01 and y + h <= height + 0.01
        if "segm" in STOCK[name]:
            assert entry["segmentation"]["size"] == [height, width]
    if "sem_seg" in results:
        assert 0 <= results["sem_seg"]["pACC"] <= 100


@pytest.mark.parametrize("train", ["none", "lora"])
def test_what_moves_in_the_tower_is_what_train_says(train, world, tmp_path):
    cfg = small("mask_rcnn_clip_vit_b16_fpn", world, tmp_path, "MODEL.CLIP_VIT.TRAIN", train)
    _, moved = run(cfg)
    in_tower = {name for name in moved if ".tower." in name}
    if train == "none":
        assert not in_tower
    else:
        assert in_tower and all("lora_" in name for name in in_tower)
    assert any(name.startswith("roi_heads.") for name in moved)


def lazy(name: str, world: dict[str, str], root: Path):
    """The lazy config `name` with a small tower with random weights and the small data set."""
    cfg = LazyConfig.load(str(root / "configs" / "lazy" / f"{name}.py"))
    net = cfg.model.backbone.net
    net.name, net.pretrained, net.window_size, net.global_blocks = "visft-tiny", None, 4, ()
    cfg.dataloader.train.dataset.names = world["train"]
    cfg.dataloader.test.dataset.names = world["val"]
    for part, edges in ((cfg.dataloader.train, [96, 128]), (cfg.dataloader.test, 96)):
        part.num_workers = 0
        part.mapper.augmentations[0].short_edge_length = edges
    cfg.dataloader.train.total_batch_size = 2

    if "roi_heads" in cfg.model:
        cfg.model.roi_heads.num_classes = 3
        cfg.model.roi_heads.batch_size_per_image = 16
        cfg.model.roi_heads.box_predictor.test_score_thresh = 0.0
        cfg.model.proposal_generator.post_nms_topk = (50, 20)
    else:
        cfg.model.num_classes = 3
        cfg.model.test_score_thresh = 0.0
        cfg.dataloader.train.mapper.use_instance_mask = False
    cfg.dataloader.evaluator.tasks = ("bbox",)
    return cfg


@pytest.mark.parametrize("name", ["mask_rcnn_clip_vit_b16", "fcos_clip_vit_b16"])
def test_lazy_detector_trains_and_is_evaluated(name, world, root):
    cfg = lazy(name, world, root)
    model = instantiate(cfg.model)
    cfg.optimizer.params.model = model
    before = {n: p.detach().clone() for n, p in model.named_parameters()}

    model.train()
    trainer = SimpleTrainer(model, instantiate(cfg.dataloader.train), instantiate(cfg.optimizer))
    trainer.train(0, 3)
    moved = changed(before, dict(model.named_parameters()))
    assert any(".tower." in n for n in moved)
    assert any(not n.startswith("backbone.") for n in moved)
    assert all(torch.isfinite(p).all() for p in model.parameters())

    with EventStorage():
        results = inference_on_dataset(
            model, instantiate(cfg.dataloader.test), instantiate(cfg.dataloader.evaluator)
        )
    assert 0 <= results["bbox"]["AP50"] <= 100
