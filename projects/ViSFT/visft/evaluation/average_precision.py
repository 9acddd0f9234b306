"""COCO's average precision of boxes and masks, by pycocotools or the faster faster-coco-eval."""

import contextlib
import io
import logging
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from visft.errors import ConfigError
from visft.evaluation.ground_truth import read_truth

logger = logging.getLogger(__name__)

IMPLEMENTATIONS = ("auto", "faster-coco-eval", "pycocotools")
"""Values of VISFT.COCO_METRIC."""


def is_fast(implementation: str) -> bool:
    """Whether a value of VISFT.COCO_METRIC means faster-coco-eval here.

    `auto` is faster-coco-eval where it is installed: its figures are pycocotools' own.

    Raises:
        ConfigError: another name, or a library that is not installed.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ConfigError(
            f"VISFT.COCO_METRIC is `{implementation}`; expected one of {', '.join(IMPLEMENTATIONS)}"
        )
    installed = find_spec("faster_coco_eval") is not None
    if implementation == "faster-coco-eval" and not installed:
        raise ConfigError(
            "VISFT.COCO_METRIC is `faster-coco-eval`, which is not installed: `pip install faster-coco-eval`, or set "
            "`auto` or `pycocotools`"
        )
    return installed and implementation != "pycocotools"


class COCOMetric:
    """AP over IoU 0.50:0.95, at 0.50 and 0.75, and of small, medium and large objects."""

    names = ("AP", "AP50", "AP75", "APs", "APm", "APl")

    def __init__(self, file: str | Path, fast: bool | None = None) -> None:
        """
        Args:
            file: annotations in COCO format.
            fast: by faster-coco-eval (True), pycocotools (False), or the former where it is installed (None).

        Raises:
            DataError: the file is not there, or not readable as such.
        """
        self._annotations, self._evaluation = _api(is_fast("auto") if fast is None else fast)
        self.truth = read_truth(file, "COCO")

    @property
    def annotated(self) -> bool:
        """Whether the file has annotations; test splits are published without."""
        return self.truth.annotated

    def counting(self, image_id: int | str, scores: Sequence[float], categories: Sequence[int]) -> list[int]:
        """Which of an image's detections can count, as indices: all."""
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
        with contextlib.redirect_stdout(io.StringIO()) as summary:
            truth, found = self._annotations(), self._annotations()
            # Copies, for what libraries write into them.
            truth.dataset = {
                **self.truth.dataset,
                "annotations": [dict(annotation) for annotation in self.truth.dataset["annotations"]],
            }
            truth.createIndex()
            if results:
                found = truth.loadRes(results)
            else:
                found.dataset = {**truth.dataset, "annotations": []}
                found.createIndex()
            scored = self._evaluation(truth, found, task)
            scored.evaluate()
            scored.accumulate()
            scored.summarize()
        logger.debug("%s:\n%s", task, summary.getvalue())
        figures = {name: per_cent(value) for name, value in zip(self.names, scored.stats, strict=False)}
        if len(class_names) > 1:
            precision = scored.eval["precision"]  # [IoU, recall, class, area, detections]
            for index, name in enumerate(class_names):
                figures[f"AP-{name}"] = mean(precision[:, :, index, 0, -1])
        return figures


def _api(fast: bool) -> tuple[type, type]:
    """The classes for annotations and for their evaluation."""
    if fast:
        from faster_coco_eval import COCO, COCOeval_faster

        return COCO, COCOeval_faster
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    return COCO, COCOeval


def mean(precision: np.ndarray) -> float:
    """Mean precision in per cent. Where there is no ground truth precision is -1, which does not count."""
    known = precision[precision > -1]
    return per_cent(float(np.mean(known)) if known.size else -1)


def per_cent(value: float) -> float:
    """COCO's -1 stands for no ground truth."""
    return 100 * float(value) if value >= 0 else float("nan")
