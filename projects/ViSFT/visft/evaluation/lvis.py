"""LVIS's average precision of boxes and masks (arXiv 1908.03195), by faster-coco-eval.

LVIS is annotated in a federated way. Each image lists classes that it shows, classes that it does not show
(`neg_category_ids`), and classes that are not annotated everywhere in it (`not_exhaustive_category_ids`). Detections of
unlisted classes do not count, nor do surplus detections of classes that are not annotated everywhere.
"""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pycocotools import mask as mask_api

from visft.errors import DataError
from visft.evaluation.average_precision import COCOMetric, average_precisions, mean, precision_of

MAX_DETECTIONS = 300
"""Detections per image, over all classes, that count: the best ones."""

FREQUENCIES = ("r", "c", "f")
"""Rare, common and frequent classes: in up to 10, up to 100 and more images of the training set."""

_CHUNK = 64  # classes evaluated at once: the library keeps a place for each of these times each image


class LVISMetric(COCOMetric):
    """As COCOMetric, with AP of rare, common and frequent classes. The figures are those of the lvis package, which
    does not run on numpy 1.24 and later."""

    names = (*COCOMetric.names, "APr", "APc", "APf")
    format = "LVIS"

    def __init__(self, file: str | Path) -> None:
        super().__init__(file)
        dataset = self.truth.dataset
        try:
            self._categories = sorted(dataset["categories"], key=lambda category: category["id"])
            self._known = _known_classes(dataset) if self.annotated else {}
            self._frequency = np.array([FREQUENCIES.index(c["frequency"]) for c in self._categories])
        except KeyError as error:
            raise DataError(
                f"{file}: no annotations in LVIS format, {error} is missing (expected in each image "
                "`neg_category_ids` and `not_exhaustive_category_ids`, in each category `frequency`)"
            ) from error
        except (ValueError, TypeError, AttributeError) as error:
            raise DataError(
                f"{file}: no annotations in LVIS format ({error}); correct or replace it"
            ) from error

    def counting(self, image_id: int | str, scores: Sequence[float], categories: Sequence[int]) -> list[int]:
        """Indices of the detections that can count: among an image's best 300, those of its listed classes.

        An image lists some ten of the 1,203 classes, so most masks need not be kept.
        """
        known = self._known.get(self.truth.images.get(image_id), ())
        return [i for i in _best(scores) if self.truth.categories.get(categories[i]) in known]

    def __call__(
        self, results: Sequence[dict], task: str, class_names: Sequence[str] = ()
    ) -> dict[str, float]:
        """As COCOMetric's; `class_names` are not used: LVIS has more classes than a report has room for."""
        results = self.truth.results(_limited(results), task)
        precision = self._precision(results, task)
        figures = average_precisions(precision)
        for index, letter in enumerate(FREQUENCIES):
            figures[f"AP{letter}"] = mean(precision[:, :, self._frequency == index, 0])
        return figures

    def _precision(self, results: list[dict], task: str) -> np.ndarray:
        """As `precision_of`, of all classes.

        A chunk of classes is scored at a time, with the images that have any of them: 1,203 classes of 20,000 images
        would take many gigabytes.
        """
        truth, found = defaultdict(list), defaultdict(list)
        for annotation in self.truth.dataset["annotations"]:
            # The lvis package has no crowds and skips objects without area.
            if annotation["area"] > 0:
                truth[annotation["category_id"]].append({**annotation, "iscrowd": 0})
        for result in results:
            known = result["category_id"] in self._known[result["image_id"]]
            if known and _area(result, task) > 0:
                found[result["category_id"]].append(result)

        images = {image["id"]: image for image in self.truth.dataset["images"]}
        precision = -np.ones((10, 101, len(self._categories), 4))
        for start in range(0, len(self._categories), _CHUNK):
            categories = self._categories[start : start + _CHUNK]
            ids = [category["id"] for category in categories]
            annotations = [annotation for c in ids for annotation in truth[c]]
            detections = [result for c in ids for result in found[c]]
            if not annotations:
                continue
            used = sorted({entry["image_id"] for entry in (*annotations, *detections)})
            part = {"images": [images[i] for i in used], "categories": categories, "annotations": annotations}
            precision[:, :, start : start + len(ids)] = precision_of(
                part, detections, task, max_detections=MAX_DETECTIONS, federated=True
            )
        return precision


def _known_classes(truth: dict) -> dict[int, set[int]]:
    """Listed classes by image id: those annotated, and those known to be absent."""
    known = {}
    for image in truth["images"]:
        if "not_exhaustive_category_ids" not in image:
            raise KeyError("not_exhaustive_category_ids")
        known[image["id"]] = set(image["neg_category_ids"])
    for annotation in truth["annotations"]:
        known[annotation["image_id"]].add(annotation["category_id"])
    return known


def _best(scores: Sequence[float]) -> list[int]:
    """Indices of an image's detections that count, in the order that the lvis package gives them."""
    order = list(range(len(scores)))
    if len(order) > MAX_DETECTIONS:
        order = sorted(order, key=lambda index: scores[index], reverse=True)[:MAX_DETECTIONS]
    return order


def _limited(results: Sequence[dict]) -> list[dict]:
    """The best detections of each image."""
    by_image = defaultdict(list)
    for result in results:
        by_image[result["image_id"]].append(result)
    return [found[i] for found in by_image.values() for i in _best([r["score"] for r in found])]


def _area(result: dict, task: str) -> float:
    if task == "segm":
        return float(mask_api.area(result["segmentation"]))
    return result["bbox"][2] * result["bbox"][3]
