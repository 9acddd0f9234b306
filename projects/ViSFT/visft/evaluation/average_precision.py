"""COCO's average precision of boxes and masks by faster-coco-eval, which gives the figures of pycocotools."""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster

from visft.evaluation.ground_truth import read_truth

logger = logging.getLogger(__name__)

MAX_DETECTIONS = 100
"""Detections per image and class that count: the best ones."""


class COCOMetric:
    """AP over IoU 0.50:0.95, at 0.50 and 0.75, and of small, medium and large objects."""

    names = ("AP", "AP50", "AP75", "APs", "APm", "APl")
    format = "COCO"

    def __init__(self, file: str | Path) -> None:
        """
        Args:
            file: annotations in the format that the metric is of.

        Raises:
            DataError: the file is not there, or not readable as such.
        """
        self.truth = read_truth(file, self.format)

    @property
    def annotated(self) -> bool:
        """Whether the file has annotations; test splits are published without."""
        return self.truth.annotated

    def counting(self, image_id: int | str, scores: Sequence[float], categories: Sequence[int]) -> list[int]:
        """Which of an image's detections can count, as indices."""
        return list(range(len(scores)))

    def __call__(
        self, results: Sequence[dict], task: str, class_names: Sequence[str] = ()
    ) -> dict[str, float]:
        """Figures in per cent; nan where there is no ground truth of the kind.

        Without any result, classes with ground truth score 0, since no object was found.

        Args:
            results: in COCO's results format, with the data set's ids.
            task: `bbox` or `segm`.
            class_names: unique, in the order of the category ids. Each class is also reported as `AP-name`.

        Raises:
            DataError: a result is of an image or category that the data set does not have.
        """
        results = self.truth.results(results, task)
        precision = precision_of(self.truth.dataset, results, task, max_detections=MAX_DETECTIONS)
        figures = average_precisions(precision)
        if len(class_names) > 1:
            figures |= {f"AP-{name}": mean(precision[:, :, k, 0]) for k, name in enumerate(class_names)}
        return figures


def precision_of(
    truth: dict, results: list[dict], task: str, *, max_detections: int, federated: bool = False
) -> np.ndarray:
    """Precision [10 IoUs, 101 recalls, classes, areas]; -1 where there is no ground truth. The areas are all, small,
    medium and large.

    Args:
        truth: `images`, `annotations` and `categories`, as `GroundTruth` numbers them.
        results: with the same numbers. The library writes into them.
        task: `bbox` or `segm`.
        max_detections: per image and class.
        federated: use what LVIS's images say about classes.
    """
    # The library writes into annotations too, so it gets copies.
    annotated = COCO({**truth, "annotations": [dict(annotation) for annotation in truth["annotations"]]})
    found = annotated.loadRes(results) if results else COCO({**truth, "annotations": []})
    scored = COCOeval_faster(annotated, found, task, lvis_style=federated, print_function=logger.debug)
    scored.params.maxDets = [max_detections]
    scored.evaluate()
    scored.accumulate()
    return scored.eval["precision"][..., -1]


def average_precisions(precision: np.ndarray) -> dict[str, float]:
    """The figures that COCO and LVIS have in common, from what `precision_of` returns."""
    figures = {
        "AP": mean(precision[..., 0]),
        "AP50": mean(precision[0, ..., 0]),
        "AP75": mean(precision[5, ..., 0]),
    }
    return figures | {f"AP{size}": mean(precision[..., area]) for area, size in enumerate("sml", 1)}


def mean(precision: np.ndarray) -> float:
    """Mean precision in per cent. Entries of -1, where there is no ground truth, do not count."""
    known = precision[precision > -1]
    return 100 * float(np.mean(known)) if known.size else float("nan")
