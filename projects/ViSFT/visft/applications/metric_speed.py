"""`tools/benchmark_metric.py`: how long the two implementations of average precision take, and how far they differ."""

import argparse
import contextlib
import json
import logging
import math
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from pycocotools import mask as mask_api

from visft.evaluation.average_precision import COCOMetric
from visft.evaluation.lvis import FREQUENCIES, LVISMetric

_SIZE = (480, 640)


def run(args: argparse.Namespace) -> None:
    """Time both on drawn annotations and detections, and print a line for boxes and one for masks."""
    with tempfile.TemporaryDirectory() as folder, _quiet():
        truth, results = draw(args.images, args.detections, args.classes)
        file = Path(folder) / "annotations.json"
        file.write_text(json.dumps(truth))
        metric = LVISMetric if args.format == "lvis" else COCOMetric
        print(
            f"{args.images} images, {args.detections} detections each, {args.classes} classes, {args.format}"
        )
        for task in ("bbox", "segm"):
            seconds, figures = time_both(metric, file, results, task, args.repeats)
            fast, slow = (statistics.median(seconds[fast]) for fast in (True, False))
            print(
                f"{task}: faster-coco-eval {fast:.1f} s, {'lvis' if args.format == 'lvis' else 'pycocotools'} "
                f"{slow:.1f} s ({slow / fast:.1f} times), largest difference {difference(*figures):.1e}"
            )


def time_both(
    metric: type, file: Path, results: list[dict], task: str, repeats: int
) -> tuple[dict[bool, list[float]], list[dict[str, float]]]:
    """Seconds of each run by `fast`, loading included, in turns; the figures of both."""
    seconds: dict[bool, list[float]] = {True: [], False: []}
    figures = {}
    for _ in range(repeats):
        for fast, times in seconds.items():
            start = time.perf_counter()
            figures[fast] = metric(file, fast)(results, task)
            times.append(time.perf_counter() - start)
    return seconds, list(figures.values())


def difference(one: dict[str, float], other: dict[str, float]) -> float:
    """The largest between figures (per cent) that are numbers; infinite if one is nan and the other not."""
    gaps = [
        abs(one[name] - other[name]) if math.isnan(one[name]) == math.isnan(other[name]) else math.inf
        for name in one
    ]
    return max(gap for gap in gaps if not math.isnan(gap))


def draw(images: int, detections: int, classes: int) -> tuple[dict, list[dict]]:
    """Annotations (about 7 an image, as COCO has) and results, boxes and masks, in COCO's and LVIS's format alike."""
    rng = np.random.default_rng(0)
    truth: dict[str, list[dict]] = {"images": [], "annotations": [], "categories": []}
    for number in range(1, classes + 1):
        truth["categories"].append(
            {"id": number, "name": f"class {number}", "frequency": FREQUENCIES[number % 3]}
        )
    results = []
    for image in range(1, images + 1):
        here = rng.integers(1, classes + 1, 3)
        truth["images"].append(
            {"id": image, "height": _SIZE[0], "width": _SIZE[1]}
            | {
                "neg_category_ids": rng.integers(1, classes + 1, 6).tolist(),
                "not_exhaustive_category_ids": [],
            }
        )
        boxes = []
        for _ in range(rng.poisson(7)):
            box, category = _box(rng), int(rng.choice(here))
            boxes.append((box, category))
            mask = _mask(box)
            truth["annotations"].append(
                {"id": len(truth["annotations"]) + 1, "image_id": image, "category_id": category, "bbox": box}
                | {"segmentation": mask, "area": float(mask_api.area(mask)), "iscrowd": 0}
            )
        for number in range(detections):
            if number < len(boxes):
                box, category = boxes[number]
                box = [max(1.0, v + float(rng.normal(0, 4))) for v in box]
            else:
                box, category = _box(rng), int(rng.integers(1, classes + 1))
            results.append(
                {"image_id": image, "category_id": category, "score": float(rng.random()), "bbox": box}
                | {"segmentation": _mask(box)}
            )
    return truth, results


def _box(rng: np.random.Generator) -> list[float]:
    h, w = np.array(_SIZE) * np.exp(rng.uniform(-4, -0.2))
    return [float(v) for v in (rng.uniform(0, _SIZE[1] - w), rng.uniform(0, _SIZE[0] - h), w, h)]


def _mask(box: list[float]) -> dict:
    x, y, w, h = box
    angles = np.linspace(0, 2 * np.pi, 16, endpoint=False)
    outline = np.stack((x + w / 2 * (1 + np.cos(angles)), y + h / 2 * (1 + np.sin(angles))), axis=1)
    rle = mask_api.frPyObjects([outline.flatten().tolist()], *_SIZE)[0]
    return {"size": rle["size"], "counts": rle["counts"].decode()}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The lvis package reports each step at the level of a warning."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(level)
