"""The evaluator: detectron2's figures for each head, and sensible ones where there is nothing."""

import json
import math

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import COCOEvaluator
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.structures import Boxes, BoxMode, Instances
from pycocotools import mask as mask_api

from visft import model_zoo
from visft.errors import DataError
from visft.evaluation import HeadsEvaluator, build_evaluator

NAME = "evaluation_test"
SIZE = (90, 120)
IDS = (30, 7, 55)
"""Category ids in the file's order. detectron2 sorts them: its classes 0, 1, 2 are 7, 30, 55."""
NAMES = {7: "seven", 30: "thirty", 55: "fifty-five"}


def ellipse(box: list[float]) -> np.ndarray:
    """A mask within a box (x, y, w, h)."""
    ys, xs = np.mgrid[: SIZE[0], : SIZE[1]] + 0.5
    x, y, w, h = box
    return ((xs - x - w / 2) / (w / 2)) ** 2 + ((ys - y - h / 2) / (h / 2)) ** 2 <= 1


def random_box(rng: np.random.Generator) -> list[float]:
    w, h = rng.integers(8, 70, 2)
    return [float(v) for v in (rng.integers(0, SIZE[1] - w), rng.integers(0, SIZE[0] - h), w, h)]


@pytest.fixture(scope="module")
def truth(tmp_path_factory) -> dict:
    """Twelve images with random ellipses, registered under NAME; the annotations as a dict."""
    rng = np.random.default_rng(1)
    images, annotations = [], []
    for number in range(1, 13):
        images.append({"id": number, "file_name": f"{number}.png", "height": SIZE[0], "width": SIZE[1]})
        for _ in range(rng.integers(0, 5)):
            box = random_box(rng)
            rle = mask_api.encode(np.asfortranarray(ellipse(box).astype(np.uint8)))
            annotations.append(
                {"id": len(annotations) + 1, "image_id": number, "category_id": int(rng.choice(IDS))}
                | {"bbox": box, "area": float(mask_api.area(rle)), "iscrowd": int(rng.random() < 0.1)}
                | {"segmentation": {"size": rle["size"], "counts": rle["counts"].decode()}}
            )
    categories = [{"id": index, "name": NAMES[index]} for index in IDS]
    body = {"images": images, "annotations": annotations, "categories": categories}
    file = tmp_path_factory.mktemp("evaluation") / "annotations.json"
    file.write_text(json.dumps(body))
    register_coco_instances(NAME, {}, str(file), str(file.parent))
    DatasetCatalog.get(NAME)  # fills the metadata
    yield body
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


def predicted(boxes: list[list[float]], classes: list[int], scores: list[float], masks: bool) -> Instances:
    found = Instances(SIZE)
    corners = BoxMode.convert(torch.tensor(boxes).view(-1, 4).float(), BoxMode.XYWH_ABS, BoxMode.XYXY_ABS)
    found.pred_boxes = Boxes(corners)
    found.pred_classes = torch.tensor(classes, dtype=torch.int64)
    found.scores = torch.tensor(scores)
    if masks:
        drawn = [torch.from_numpy(ellipse(box)) for box in boxes]
        found.pred_masks = torch.stack(drawn) if drawn else torch.zeros(0, *SIZE, dtype=torch.bool)
    return found


def guesses(truth: dict, seed: int, masks: bool) -> list[Instances]:
    """Predictions: some annotations moved a little, some left out, some invented."""
    rng = np.random.default_rng(seed)
    outputs = []
    for image in truth["images"]:
        boxes, classes = [], []
        for annotation in truth["annotations"]:
            if annotation["image_id"] == image["id"] and rng.random() < 0.8:
                boxes.append([float(max(1, v + rng.normal(0, 2))) for v in annotation["bbox"]])
                classes.append(sorted(IDS).index(annotation["category_id"]))
        for _ in range(rng.integers(0, 4)):
            boxes.append(random_box(rng))
            classes.append(int(rng.integers(0, 3)))
        outputs.append(predicted(boxes, classes, rng.random(len(boxes)).tolist(), masks))
    return outputs


def run(evaluator, truth: dict, outputs: list[dict]) -> dict:
    inputs = [{"image_id": image["id"]} for image in truth["images"]]
    evaluator.reset()
    for start in range(0, len(inputs), 5):
        evaluator.process(inputs[start : start + 5], outputs[start : start + 5])
    return evaluator.evaluate()


def same(found: dict[str, float], expected: dict[str, float]) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        if math.isnan(value):
            assert math.isnan(found[name]), name
        else:
            assert found[name] == pytest.approx(value, abs=1e-6), name


def test_figures_are_detectron2s_for_each_head(truth):
    boxes, masks = guesses(truth, 1, masks=False), guesses(truth, 2, masks=True)
    outputs = [
        {"detection": d, "segmentation": s, "instances": s, "caption": "some words"}
        for d, s in zip(boxes, masks, strict=True)
    ]
    found = run(HeadsEvaluator(NAME, ("detection", "segmentation", "caption")), truth, outputs)
    assert list(found) == ["detection/bbox", "segmentation/bbox", "segmentation/segm"]
    for name, predictions in (("detection", boxes), ("segmentation", masks)):
        stock = COCOEvaluator(NAME, distributed=False, use_fast_impl=False)
        expected = run(stock, truth, [{"instances": p} for p in predictions])
        assert set(expected) == ({"bbox"} if name == "detection" else {"bbox", "segm"})
        for task, figures in expected.items():
            assert 1 < figures["AP50"] < 99 and f"AP-{NAMES[7]}" in figures
            same(found[f"{name}/{task}"], figures)


def test_a_head_that_finds_everything_scores_100(truth):
    outputs = []
    for image in truth["images"]:
        own = [a for a in truth["annotations"] if a["image_id"] == image["id"] and not a["iscrowd"]]
        classes = [sorted(IDS).index(a["category_id"]) for a in own]
        found = predicted([a["bbox"] for a in own], classes, [0.9] * len(own), masks=True)
        outputs.append({"segmentation": found})
    figures = flatten_results_dict(run(HeadsEvaluator(NAME, ("segmentation",)), truth, outputs))
    for key in ("bbox/AP", "bbox/AP50", "segm/AP", "segm/AP75", "segm/APs", "segm/AP-thirty"):
        assert figures[f"segmentation/{key}"] == pytest.approx(100), key


@pytest.mark.parametrize("masks", [False, True])
def test_a_head_that_finds_nothing_scores_0(truth, masks):
    outputs = [{"detection": predicted([], [], [], masks)} for _ in truth["images"]]
    found = run(HeadsEvaluator(NAME, ("detection",)), truth, outputs)
    assert set(found) == ({"detection/bbox", "detection/segm"} if masks else {"detection/bbox"})
    for figures in found.values():
        assert [figures[name] for name in ("AP", "AP50", "AP75", "AP-seven")] == [0, 0, 0, 0]


def test_reset_forgets(truth):
    evaluator = HeadsEvaluator(NAME, ("segmentation",))
    good = [{"segmentation": p} for p in guesses(truth, 2, masks=True)]
    first = run(evaluator, truth, good)
    again = run(evaluator, truth, good)
    same(flatten_results_dict(first), flatten_results_dict(again))
    # As boxes alone, nothing of the masks is left.
    boxes = [{"segmentation": p} for p in guesses(truth, 2, masks=False)]
    assert set(run(evaluator, truth, boxes)) == {"segmentation/bbox"}


def test_a_class_that_the_data_set_has_not_is_an_error(truth):
    outputs = [{"detection": predicted([[1.0, 1, 5, 5]], [3], [0.5], False)} for _ in truth["images"]]
    with pytest.raises(DataError, match="3 classes.*class 3"):
        run(HeadsEvaluator(NAME, ("detection",)), truth, outputs)


def test_classes_are_matched_by_name(truth):
    """A model that numbers the classes otherwise, and knows one more, has the same figures."""
    own = [NAMES[index] for index in sorted(IDS)]
    learnt = ["another", *reversed(own)]
    guessed = guesses(truth, 1, masks=True)
    expected = run(HeadsEvaluator(NAME, ("detection",)), truth, [{"detection": p} for p in guessed])
    outputs = []
    for found in guessed:
        other = predicted([[1.0, 1.0, 5.0, 5.0]], [0], [0.99], masks=True)  # of the class that is not there
        other.pred_masks = torch.zeros(1, *found.image_size, dtype=torch.bool)
        numbers = torch.tensor([learnt.index(own[c]) for c in found.pred_classes.tolist()], dtype=torch.int64)
        moved = Instances(found.image_size, **{**found.get_fields(), "pred_classes": numbers})
        outputs.append({"detection": Instances.cat([other, moved])})
    found = run(HeadsEvaluator(NAME, ("detection",), class_names=learnt), truth, outputs)
    same(flatten_results_dict(found), flatten_results_dict(expected))
    with pytest.raises(DataError, match=rf"it has {own[0]}; rename"):
        run(HeadsEvaluator(NAME, ("detection",), class_names=learnt[:-1]), truth, outputs)


def test_a_data_set_of_another_format_is_converted(truth):
    """What has no `json_file` is evaluated by its dataset dicts."""
    name = "evaluation_test_dicts"
    DatasetCatalog.register(name, lambda: DatasetCatalog.get(NAME))
    MetadataCatalog.get(name).set(thing_classes=[NAMES[index] for index in sorted(IDS)])
    try:
        outputs = [{"detection": p} for p in guesses(truth, 1, masks=False)]
        found = run(HeadsEvaluator(name, ("detection",)), truth, outputs)["detection/bbox"]
        expected = run(HeadsEvaluator(NAME, ("detection",)), truth, outputs)["detection/bbox"]
        # Areas differ: detectron2 writes those of the masks it decodes. AP over all sizes does not.
        for key in ("AP", "AP50", "AP75", "AP-seven", "AP-thirty", "AP-fifty-five"):
            assert found[key] == pytest.approx(expected[key], abs=1e-6), key
        assert not hasattr(MetadataCatalog.get(name), "json_file")
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.mark.parametrize("content", [None, "{", "[1]"])
def test_annotations_that_are_missing_or_broken_are_named(tmp_path, content):
    file = tmp_path / "val.json"
    if content is not None:
        file.write_text(content)
    name = "evaluation_test_broken"
    MetadataCatalog.get(name).set(json_file=str(file), thing_classes=["a"])
    try:
        with pytest.raises(DataError, match=r"val\.json"):
            HeadsEvaluator(name, ("detection",))
    finally:
        MetadataCatalog.remove(name)


def test_annotations_without_any_are_not_scored(tmp_path, truth):
    """As the test splits of COCO are published."""
    file = tmp_path / "test.json"
    body = {key: value for key, value in truth.items() if key != "annotations"}
    file.write_text(json.dumps(body))
    name = "evaluation_test_unannotated"
    MetadataCatalog.get(name).set(json_file=str(file), thing_classes=["a", "b", "c"])
    try:
        outputs = [{"detection": p} for p in guesses(truth, 1, masks=False)]
        assert run(HeadsEvaluator(name, ("detection",)), truth, outputs) == {}
    finally:
        MetadataCatalog.remove(name)


def test_the_config_names_the_heads(truth):
    cfg = model_zoo.get_config("visft_demo")
    cfg.MODEL.VISFT.HEADS = ("segmentation",)
    assert build_evaluator(cfg, NAME).heads == ("segmentation",)
