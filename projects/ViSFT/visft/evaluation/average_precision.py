"""COCO's average precision of boxes and masks, by faster-coco-eval, whose figures are pycocotools' own."""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster

from visft.evaluation.ground_truth import read_truth

logger = logging.getLogger(__name__)

MAX_DETECTIONS = 100
"""Of an image and a class: the rest does not count."""


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

        Without any result, what has ground truth scores 0, as it must: no object was found.

        Args:
            results: in COCO's results format, with the data set's ids.
            task: `bbox` or `segm`.
            class_names: in the order of the category ids, each once; each is reported as `AP-name` too.

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
    """Precision [10 IoUs, 101 recalls, classes, areas]; -1 where there is no ground truth. Areas are all, small,
    medium and large.

    Args:
        truth: `images`, `annotations` and `categories`, as `GroundTruth` numbers them.
        results: of the same numbers. The library writes into them.
        task: `bbox` or `segm`.
        max_detections: of an image and a class.
        federated: heed what LVIS's images say of classes.
    """
    # Copies, for the library writes into annotations too.
    annotated = COCO({**truth, "annotations": [dict(annotation) for annotation in truth["annotations"]]})
    found = annotated.loadRes(results) if results else COCO({**truth, "annotations": []})
    scored = COCOeval_faster(annotated, found, task, lvis_style=federated, print_function=logger.debug)
    scored.params.maxDets = [max_detections]
    scored.evaluate()
    scored.accumulate()
    return scored.eval["precision"][..., -1]


def average_precisions(precision: np.ndarray) -> dict[str, float]:
    """The figures that COCO and LVIS have in common, of what `precision_of` returns."""
    figures = {
        "AP": mean(precision[..., 0]),
        "AP50": mean(precision[0, ..., 0]),
        "AP75": mean(precision[5, ..., 0]),
    }
    return figures | {f"AP{size}": mean(precision[..., area]) for area, size in enumerate("sml", 1)}


def mean(precision: np.ndarray) -> float:
    """Mean precision in per cent. Where there is no ground truth precision is -1, which does not count."""
    known = precision[precision > -1]
    return 100 * float(np.mean(known)) if known.size else float("nan")
