"""LVIS's figures are those of the lvis package: as published (lvis_sample.py says how they were made), and as here."""

import json
import math

import lvis_sample
import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.structures import Boxes, BoxMode, Instances
from pycocotools import mask as mask_api

from visft.errors import DataError
from visft.evaluation import HeadsEvaluator
from visft.evaluation.lvis import LVISMetric


@pytest.fixture(scope="module")
def sample() -> dict:
    return json.loads(lvis_sample.FILE.read_text())


@pytest.fixture(scope="module")
def truth(sample, tmp_path_factory):
    file = tmp_path_factory.mktemp("lvis") / "truth.json"
    file.write_text(json.dumps(sample["truth"]))
    return file


@pytest.mark.parametrize("task", ["bbox", "segm"])
def test_the_published_packages_figures(sample, truth, task):
    found = LVISMetric(truth)(sample["results"][task], task)
    expected = {name: value for name, value in sample["figures"][task].items() if name.startswith("AP")}
    assert set(found) == set(expected) == set(LVISMetric.names)
    assert all(0 < value < 1 for value in expected.values())
    assert found == {name: pytest.approx(100 * value, abs=1e-9) for name, value in expected.items()}


@pytest.mark.parametrize("seed", [7, 8, 9])
def test_the_packages_figures_on_further_samples(tmp_path, monkeypatch, seed):
    """The lvis package as installed, with the name `np.float`, which numpy dropped in 1.24."""
    pytest.importorskip("lvis")
    monkeypatch.setattr(np, "float", float, raising=False)
    made, file = lvis_sample.make(seed), tmp_path / "truth.json"
    for annotation in made["truth"]["annotations"][::4]:
        annotation["iscrowd"] = 1  # which the package does not heed
    file.write_text(json.dumps(made["truth"]))
    for task, expected in lvis_sample.figures(made).items():
        found = LVISMetric(file)(made["results"][task], task)
        assert found == {name: pytest.approx(100 * expected[name], abs=1e-9) for name in LVISMetric.names}


def test_the_sample_is_what_its_script_makes(sample):
    again = json.loads(json.dumps(lvis_sample.make()))
    assert again == {key: sample[key] for key in ("truth", "results")}


def test_the_sample_has_every_case(sample):
    """What sets LVIS apart matters to the sample's figures."""
    images = {image["id"]: image for image in sample["truth"]["images"]}
    present = {(a["image_id"], a["category_id"]) for a in sample["truth"]["annotations"]}
    results = sample["results"]["bbox"]
    kinds = {"unknown": 0, "absent": 0, "open": 0}
    for result in results:
        image, category = images[result["image_id"]], result["category_id"]
        kinds["absent"] += category in image["neg_category_ids"]
        kinds["open"] += category in image["not_exhaustive_category_ids"]
        kinds["unknown"] += (
            category not in image["neg_category_ids"] and (image["id"], category) not in present
        )
    assert min(kinds.values()) > 20
    assert sum(r["image_id"] == 100 - lvis_sample.CROWDED for r in results) > 300
    assert any(not r["bbox"][2] for r in results)
    assert any(not a["area"] for a in sample["truth"]["annotations"])


@pytest.mark.parametrize("key", ["neg_category_ids", "not_exhaustive_category_ids"])
def test_what_is_known_of_an_image_changes_the_figures(sample, tmp_path, key):
    """Else the comparison with the package would say nothing of the federated part."""
    body = json.loads(json.dumps(sample["truth"]))
    for image in body["images"]:
        image[key] = []
    file = tmp_path / "truth.json"
    file.write_text(json.dumps(body))
    found = LVISMetric(file)(sample["results"]["bbox"], "bbox")
    assert abs(found["AP"] - 100 * sample["figures"]["bbox"]["AP"]) > 0.1


def test_nothing_found_scores_0(truth):
    for task in ("bbox", "segm"):
        assert LVISMetric(truth)([], task) == dict.fromkeys(LVISMetric.names, 0.0)


def test_classes_without_ground_truth_are_nan(sample, tmp_path):
    body = json.loads(json.dumps(sample["truth"]))
    rare = {c["id"] for c in body["categories"] if c["frequency"] == "r"}
    body["annotations"] = [a for a in body["annotations"] if a["category_id"] not in rare]
    file = tmp_path / "truth.json"
    file.write_text(json.dumps(body))
    found = LVISMetric(file)(sample["results"]["bbox"], "bbox")
    assert math.isnan(found["APr"]) and found["APf"] == pytest.approx(100 * sample["figures"]["bbox"]["APf"])


def test_classes_are_taken_some_at_a_time(sample, truth, monkeypatch):
    """LVIS has 1,203 classes: pieces must not change a figure."""
    monkeypatch.setattr("visft.evaluation.lvis._CHUNK", 3)
    found = LVISMetric(truth)(sample["results"]["segm"], "segm")
    assert found["AP"] == pytest.approx(100 * sample["figures"]["segm"]["AP"], abs=1e-9)


def test_the_evaluator_counts_lvis_classes_from_one(sample, truth):
    """Predictions have contiguous classes, from 0; the file's are those plus one."""
    name = "lvis_v1_evaluation_test"
    classes = [f"class {i + 1}" for i in range(max(lvis_sample.CATEGORIES))]
    MetadataCatalog.get(name).set(json_file=str(truth), evaluator_type="lvis", thing_classes=classes)
    try:
        evaluator = HeadsEvaluator(name, ("detection", "segmentation"))
        for image in sample["truth"]["images"]:
            size = image["height"], image["width"]
            boxes, masks = (
                [r for r in sample["results"][task] if r["image_id"] == image["id"]]
                for task in ("bbox", "segm")
            )
            corners = torch.tensor([r["bbox"] for r in boxes], dtype=torch.float64).view(-1, 4)
            found = Instances(size, scores=torch.tensor([r["score"] for r in boxes], dtype=torch.float64))
            found.pred_boxes = Boxes(torch.zeros(len(boxes), 4))
            # Boxes holds float32, which moves a box by 1e-6.
            found.pred_boxes.tensor = BoxMode.convert(corners, BoxMode.XYWH_ABS, BoxMode.XYXY_ABS)
            found.pred_classes = torch.tensor([r["category_id"] - 1 for r in boxes], dtype=torch.int64)
            drawn = [torch.from_numpy(mask_api.decode(r["segmentation"])).bool() for r in masks]
            masked = Instances(size, **found.get_fields())
            masked.pred_masks = torch.stack(drawn) if drawn else torch.zeros(0, *size, dtype=torch.bool)
            evaluator.process([{"image_id": image["id"]}], [{"detection": found, "segmentation": masked}])
        kept = evaluator._results["segmentation"]
        figures = evaluator.evaluate()
    finally:
        MetadataCatalog.remove(name)
    # What cannot count is not kept.
    known = {i["id"]: set(i["neg_category_ids"]) for i in sample["truth"]["images"]}
    for annotation in sample["truth"]["annotations"]:
        known[annotation["image_id"]].add(annotation["category_id"])
    assert 0 < len(kept) < 0.8 * len(sample["results"]["segm"])
    assert all(result["category_id"] in known[result["image_id"]] for result in kept)
    assert list(figures) == ["detection/bbox", "segmentation/bbox", "segmentation/segm"]
    for head, task in (key.split("/") for key in figures):
        expected = {n: 100 * sample["figures"][task][n] for n in LVISMetric.names}
        assert figures[f"{head}/{task}"] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("content", [None, "{", "[1]", "{}"])
def test_annotations_that_are_missing_or_broken_are_named(tmp_path, content):
    file = tmp_path / "lvis_v1_val.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(DataError, match=r"lvis_v1_val\.json"):
        LVISMetric(file)


@pytest.mark.parametrize(
    ("where", "key"),
    [
        ("images", "neg_category_ids"),
        ("images", "not_exhaustive_category_ids"),
        ("categories", "frequency"),
    ],
)
def test_a_file_in_cocos_format_is_told_what_it_lacks(sample, tmp_path, where, key):
    body = json.loads(json.dumps(sample["truth"]))
    del body[where][0][key]
    file = tmp_path / "truth.json"
    file.write_text(json.dumps(body))
    with pytest.raises(DataError, match=f"{key}' is missing"):
        LVISMetric(file)


def test_splits_without_annotations_are_not_scored(sample, tmp_path):
    """Nothing is known of their images either."""
    images = [
        {key: image[key] for key in ("id", "height", "width", "coco_url")}
        for image in sample["truth"]["images"]
    ]
    file = tmp_path / "image_info_test_dev.json"
    file.write_text(json.dumps({"images": images, "categories": sample["truth"]["categories"]}))
    metric = LVISMetric(file)
    assert not metric.annotated and metric.counting(images[0]["id"], [0.5], [2]) == []
