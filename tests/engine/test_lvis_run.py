"""LVIS through the command line: detectron2's own names over a small data set in its format."""

import json
from pathlib import Path

import pytest
import runs
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_lvis_instances
from detectron2.data.datasets.lvis import get_lvis_instances_meta
from shapes import make

from visft.engine import checks, settings, stock
from visft.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
CONFIG = str(ROOT / "configs" / "visft_lvis_vit_b16.yaml")
IDS = {2: 12, 5: 4, 8: 1203}
"""Categories of the shapes -> ids of LVIS v1."""


def lvis(root: Path, split: str, *, images: int, seed: int) -> None:
    """Write lvis/lvis_v1_<split>.json and coco/<split>2017 in a folder of data sets."""
    file, pictures = make(root / split, images=images, seed=seed)
    folder = root / "coco" / f"{split}2017"
    folder.parent.mkdir(exist_ok=True)
    pictures.rename(folder)
    body = json.loads(file.read_text())
    for image in body["images"]:
        image["coco_url"] = f"http://images.cocodataset.org/{split}2017/{image.pop('file_name')}"
        image["neg_category_ids"] = [4, 1203]
        image["not_exhaustive_category_ids"] = [12]
    for annotation in body["annotations"]:
        annotation["category_id"] = IDS[annotation["category_id"]]
        del annotation["iscrowd"]
    for category, frequency in zip(body["categories"], "rcf", strict=True):
        category.update(id=IDS[category["id"]], frequency=frequency)
    (root / "lvis").mkdir(exist_ok=True)
    (root / "lvis" / f"lvis_v1_{split}.json").write_text(json.dumps(body))


def arguments(output: Path) -> list[str]:
    """configs/visft_lvis_vit_b16.yaml in a few seconds."""
    keys = {
        "MODEL.DEVICE": "cpu",
        "OUTPUT_DIR": output,
        "VISFT.EXPORT": "()",
        "VISFT.STAGES": "('heads',)",
        "VISFT.INPUT.AUGMENTATION": "fixed",
        "VISFT.INPUT.SIZE": 64,
        "INPUT.MIN_SIZE_TEST": 64,
        "INPUT.MAX_SIZE_TEST": 64,
        "DATALOADER.NUM_WORKERS": 0,
        "DATALOADER.REPEAT_THRESHOLD": 0.9,
        "MODEL.CLIP_VIT.NAME": "visft-tiny",
        "MODEL.CLIP_VIT.PRETRAINED": "",
        "MODEL.VISFT.SEGMENTATION.NUM_POINTS": 64,
        "VISFT.SOLVER.HEADS.IMS_PER_BATCH": 2,
        "VISFT.SOLVER.HEADS.MAX_ITER": 2,
    }
    for head in ("DETECTION", "SEGMENTATION"):
        keys |= {f"MODEL.VISFT.{head}.{k}": v for k, v in (("ENCODER_LAYERS", 1), ("DECODER_LAYERS", 1))}
        keys[f"MODEL.VISFT.{head}.NUM_QUERIES"] = 10
    return ["--config-file", CONFIG, *runs.words(keys)]


def test_training_and_evaluation_on_lvis(tmp_path):
    """Two iterations and an evaluation, then the evaluation again by --eval-only: the same figures, with LVIS's own."""
    pytest.importorskip("lvis")
    lvis(tmp_path / "datasets", "train", images=6, seed=0)
    lvis(tmp_path / "datasets", "val", images=4, seed=1)
    run = tmp_path / "run"
    log = runs.train(arguments(run), tmp_path / "log", folder=tmp_path)
    assert "images come more than once" in log
    rows = runs.rows(run / "heads" / "metrics.json")
    figures = {key: value for row in rows for key, value in row.items() if "/AP" in key}
    kinds = {"detection/bbox", "segmentation/bbox", "segmentation/segm"}
    assert {f"{kind}/{name}" for kind in kinds for name in ("AP", "APr", "APc", "APf")} <= set(figures)
    assert any("loss" in key for row in rows for key in row)

    again = runs.option(arguments(run), "--eval-only", "--resume")
    runs.train(again, tmp_path / "again", folder=tmp_path)
    again = json.loads((run / "evaluation.json").read_text())
    assert {key: value for key, value in again.items() if "/AP" in key} == figures


def test_a_stock_detector_is_scored_on_lvis(tmp_path):
    """By the same code, under detectron2's names; the annotations given back score 100."""
    pytest.importorskip("lvis")
    from detectron2.structures import Boxes, BoxMode, Instances

    lvis(tmp_path, "val", images=5, seed=2)
    name, file = "lvis_v1_stock_test", tmp_path / "lvis" / "lvis_v1_val.json"
    register_lvis_instances(name, get_lvis_instances_meta("lvis_v1"), str(file), f"{tmp_path}/coco/")
    try:
        cfg = settings.load_config(str(ROOT / "configs" / "mask_rcnn_clip_vit_b16_fpn.yaml"))
        evaluator = stock.StockTrainer.build_evaluator(cfg, name)
        evaluator.reset()
        for record in DatasetCatalog.get(name):
            found = Instances((record["height"], record["width"]))
            boxes = torch.tensor([a["bbox"] for a in record["annotations"]]).float()
            found.pred_boxes = Boxes(BoxMode.convert(boxes, BoxMode.XYWH_ABS, BoxMode.XYXY_ABS))
            found.pred_classes = torch.tensor([a["category_id"] for a in record["annotations"]])
            found.scores = torch.ones(len(boxes))
            evaluator.process([record], [{"instances": found}])
        figures = evaluator.evaluate()
        assert set(figures) == {"bbox"}
        assert [figures["bbox"][key] for key in ("AP", "APr", "APc", "APf")] == pytest.approx([100] * 4)
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("MODEL.VISFT.DETECTION.CLASS_LOSS", "focal", "MODEL.VISFT.DETECTION.CLASS_LOSS.*`focal`"),
        ("MODEL.VISFT.SEGMENTATION.FED_LOSS_CLASSES", "-1", "SEGMENTATION.FED_LOSS_CLASSES is -1"),
        ("DATASETS.TRAIN", "('coco_2017_train',)", "FED_LOSS_CLASSES is set.*coco_2017_train"),
        ("DATALOADER.REPEAT_THRESHOLD", "0.0", "DATALOADER.REPEAT_THRESHOLD is 0.0"),
    ],
)
def test_mistakes_are_named_before_anything_is_built(key, value, words):
    cfg = settings.load_config(CONFIG, ["MODEL.DEVICE", "cpu", "MODEL.CLIP_VIT.PRETRAINED", "", key, value])
    with pytest.raises(ConfigError, match=words):
        checks.check(cfg, train=False, test=False)


def test_rcnn_takes_the_configs_federated_loss_too():
    keys = {"MODEL.DEVICE": "cpu", "MODEL.CLIP_VIT.PRETRAINED": "", "MODEL.VISFT.DETECTION.HEAD": "RCNNHead"}
    cfg = settings.load_config(CONFIG, runs.words(keys))
    checks.check(cfg, train=False, test=False)
    assert cfg.MODEL.ROI_BOX_HEAD.USE_FED_LOSS and cfg.MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE
