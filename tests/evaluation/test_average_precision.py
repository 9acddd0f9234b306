"""COCO's figures are pycocotools', on samples made to tell them apart."""

import json

import numpy as np
import pytest
from pycocotools import mask as mask_api
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from visft.evaluation.average_precision import COCOMetric

IDS = (3, 90, 17, 44)
NAMES = [str(i) for i in sorted(IDS)]


class Sample:
    """Annotations and detections, boxes and masks, drawn from a seed."""

    def __init__(self, seed: int, *, images: int, side: int, scales: tuple[float, float], crowds: float):
        self.rng = np.random.default_rng(seed)
        self.side, self.scales = side, scales
        self.images = [{"id": 7 * n + 5, "height": side, "width": side} for n in range(images)]
        self.annotations: list[dict] = []
        self.results: list[dict] = []
        for image in self.images:
            for _ in range(self.rng.integers(0, 6)):
                self.annotate(image["id"], int(self.rng.random() < crowds))

    def box(self) -> list[float]:
        w, h = self.side * self.rng.uniform(*self.scales, 2)
        return [
            float(v) for v in (self.rng.uniform(0, self.side - w), self.rng.uniform(0, self.side - h), w, h)
        ]

    def mask(self, box: list[float]) -> dict:
        x, y, w, h = box
        polygon = [x, y, x + w, y + h / 4, x + w, y + h, x + w / 3, y + h]
        rle = mask_api.frPyObjects([polygon], self.side, self.side)[0]
        return {"size": rle["size"], "counts": rle["counts"].decode()}

    def annotate(self, image: int, crowd: int) -> None:
        box = self.box()
        rle = self.mask(box)
        entry = {"id": len(self.annotations) + 1, "image_id": image, "category_id": int(self.rng.choice(IDS))}
        entry |= {"bbox": box, "segmentation": rle, "area": float(mask_api.area(rle)), "iscrowd": crowd}
        self.annotations.append(entry)

    def detect(self, image: int, box: list[float], category: int, digits: int = 12) -> None:
        score = round(float(self.rng.random()), digits)
        found = {"image_id": image, "category_id": category, "score": score, "bbox": box}
        self.results.append(found | {"segmentation": self.mask(box)})

    def follow(self, noise: float, digits: int = 12) -> None:
        """Detections near the annotations, up to three of each, some of another class."""
        for a in self.annotations:
            for _ in range(self.rng.integers(0, 4)):
                box = [max(1.0, v + float(self.rng.normal(0, noise))) for v in a["bbox"]]
                box[0], box[1] = min(box[0], self.side - 2.0), min(box[1], self.side - 2.0)
                other = self.rng.random() < 0.2
                self.detect(
                    a["image_id"], box, int(self.rng.choice(IDS)) if other else a["category_id"], digits
                )

    def write(self, folder):
        categories = [{"id": i, "name": str(i)} for i in IDS]
        body = {"images": self.images, "annotations": self.annotations, "categories": categories}
        file = folder / "annotations.json"
        file.write_text(json.dumps(body))
        return file


def crowded() -> Sample:
    """Crowds, which a detection may match any number of times, and more than a hundred detections of one class."""
    sample = Sample(1, images=25, side=200, scales=(0.05, 0.6), crowds=0.4)
    sample.follow(noise=5)
    image = sample.images[3]["id"]
    for n in range(160):
        box = sample.box()
        if n % 8 == 0:  # some are found by the first hundred, some by those that do not count
            sample.annotate(image, 0)
            sample.annotations[-1]["category_id"] = IDS[0]
            box = sample.annotations[-1]["bbox"]
        sample.detect(image, box, IDS[0])
    return sample


def tied() -> Sample:
    """Equal scores everywhere, so that the order in the file decides; small, medium and large objects."""
    sample = Sample(2, images=30, side=300, scales=(0.02, 0.9), crowds=0.1)
    sample.follow(noise=2, digits=1)
    return sample


def sparse() -> Sample:
    """Most images have no detection, one class neither annotations nor detections, another detections alone."""
    sample = Sample(3, images=40, side=120, scales=(0.1, 0.5), crowds=0.0)
    sample.annotations = [a for a in sample.annotations if a["category_id"] in IDS[:2]]
    sample.follow(noise=3)
    sample.results = [
        r
        for r in sample.results
        if r["image_id"] in [i["id"] for i in sample.images[:8]] and r["category_id"] != IDS[3]
    ]
    sample.detect(sample.images[0]["id"], sample.box(), IDS[2])
    return sample


SAMPLES = {"crowded": crowded, "tied": tied, "sparse": sparse}


@pytest.fixture(params=SAMPLES)
def sample(request, tmp_path):
    made = SAMPLES[request.param]()
    return made.write(tmp_path), made.results


def by_pycocotools(file, results, task) -> dict[str, float]:
    """What pycocotools makes of a file and results, without code of ours; in per cent, nan for its -1."""
    kept = ("image_id", "category_id", "score", {"bbox": "bbox", "segm": "segmentation"}[task])
    truth, found = COCO(str(file)), COCO()
    if results:
        found = truth.loadRes([{key: result[key] for key in kept} for result in results])
    else:  # which loadRes does not take
        found.dataset = {**truth.dataset, "annotations": []}
        found.createIndex()
    scored = COCOeval(truth, found, task)
    scored.evaluate(), scored.accumulate(), scored.summarize()
    figures = dict(zip(COCOMetric.names, scored.stats, strict=False))
    for index, name in enumerate(NAMES):
        precision = scored.eval["precision"][:, :, index, 0, -1]
        figures[f"AP-{name}"] = precision[precision > -1].mean() if (precision > -1).any() else -1
    return {name: 100 * value if value >= 0 else np.nan for name, value in figures.items()}


def same(found: dict[str, float], expected: dict[str, float]) -> None:
    assert list(found) == list(expected)
    np.testing.assert_allclose(
        list(found.values()), list(expected.values()), rtol=0, atol=1e-9, equal_nan=True
    )


@pytest.mark.parametrize("task", ["bbox", "segm"])
def test_figures_are_pycocotools(sample, task):
    file, results = sample
    expected = by_pycocotools(file, results, task)
    assert 1 < expected["AP"] < 99
    same(COCOMetric(file)(results, task, NAMES), expected)


@pytest.mark.parametrize("task", ["bbox", "segm"])
def test_without_predictions_both_are_0(sample, task):
    expected = by_pycocotools(sample[0], [], task)
    assert expected["AP"] == 0
    np.testing.assert_equal(COCOMetric(sample[0])([], task, NAMES), expected)


def test_the_results_are_left_as_they_were(sample):
    """The library writes into what it gets."""
    file, results = sample
    before = json.dumps(results)
    for task in ("bbox", "segm"):
        COCOMetric(file)(results, task)
    assert json.dumps(results) == before


@pytest.mark.parametrize("task", ["bbox", "segm"])
def test_what_files_may_leave_out_changes_no_figure(tmp_path, task):
    """`iscrowd` and `area` are optional in COCO's format for trainings; scorers read both."""
    sample = tied()
    for folder in ("whole", "sparse"):
        (tmp_path / folder).mkdir()
    whole = sample.write(tmp_path / "whole")
    for annotation in sample.annotations:
        del annotation["area"]
        if not annotation["iscrowd"]:
            del annotation["iscrowd"]
    figures = [COCOMetric(file)(sample.results, task) for file in (whole, sample.write(tmp_path / "sparse"))]
    assert figures[0] == figures[1] and figures[0]["AP"] > 1
    for annotation in sample.annotations:
        del annotation["segmentation"]
    boxes = COCOMetric(sample.write(tmp_path))(sample.results, "bbox")
    assert boxes["AP"] == COCOMetric(whole)(sample.results, "bbox")["AP"]
