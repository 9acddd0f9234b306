"""COCO's average precision of boxes and masks, by pycocotools or the faster faster-coco-eval."""

import contextlib
import io
import logging
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError

logger = logging.getLogger(__name__)

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


def api(fast: bool | None = None) -> tuple[type, type]:
    """The classes for annotations and for their evaluation.

    Args:
        fast: faster-coco-eval (True), pycocotools (False), or the former where it is installed (None).
    """
    if find_spec("faster_coco_eval") is not None if fast is None else fast:
        from faster_coco_eval import COCO, COCOeval_faster

        return COCO, COCOeval_faster
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    return COCO, COCOeval


def load_annotations(file: str | Path, fast: bool | None = None) -> Any:
    """Annotations in COCO format, indexed.

    Raises:
        DataError: the file is not there, or not readable as such.
    """
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return api(fast)[0](str(file))
    except FileNotFoundError as error:
        raise DataError(f"{file}: not found; the evaluation needs a data set's annotations there") from error
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise DataError(f"{file}: no annotations in COCO format ({error}); correct or replace it") from error


def average_precision(
    truth: Any, results: Sequence[dict], task: str, class_names: Sequence[str] = (), fast: bool | None = None
) -> dict[str, float]:
    """AP over IoU 0.50:0.95, at 0.50 and 0.75, and of small, medium and large objects, in per cent.

    Without any result, what has ground truth scores 0, as it must: no object was found.

    Args:
        truth: as `load_annotations` returns it.
        results: in COCO's results format, with the data set's category ids.
        task: `bbox` or `segm`.
        class_names: in the order of the category ids; each is reported as `AP-name` too.
        fast: as for `api`.

    Returns:
        By metric; nan where there is no ground truth of the kind.
    """
    annotations, evaluation = api(fast)
    if task == "segm":
        # With boxes in the results, COCO's code would sort small from large by the box's area, not the mask's.
        results = [{key: value for key, value in result.items() if key != "bbox"} for result in results]
    with contextlib.redirect_stdout(io.StringIO()) as summary:
        if results:
            found = truth.loadRes(list(results))
        else:
            found = annotations()
            found.dataset = {**truth.dataset, "annotations": []}
            found.createIndex()
        scored = evaluation(truth, found, task)
        scored.evaluate()
        scored.accumulate()
        scored.summarize()
    logger.debug("%s:\n%s", task, summary.getvalue())
    figures = {name: _per_cent(value) for name, value in zip(METRICS, scored.stats, strict=False)}
    if len(class_names) > 1:
        precision = scored.eval["precision"]  # [IoU, recall, class, area, detections]
        for index, name in enumerate(class_names):
            values = precision[:, :, index, 0, -1]
            values = values[values > -1]
            figures[f"AP-{name}"] = _per_cent(np.mean(values) if values.size else -1)
    return figures


def _per_cent(value: float) -> float:
    """COCO's -1 stands for no ground truth."""
    return 100 * float(value) if value >= 0 else float("nan")
