"""A generated sample in LVIS's format, small and with every case in it, and the lvis package's figures for it.

`python tests/evaluation/lvis_sample.py` writes lvis_sample.json: the annotations, the detections, and the figures of
the lvis package as it is published. That package runs on numpy < 1.24 only, so it needs an environment of its own:

    pip install "numpy<1.24" "pycocotools==2.0.6" "lvis==0.5.3" "opencv-python-headless<4.8" "matplotlib<3.8"
"""

import json
from pathlib import Path

import numpy as np

FILE = Path(__file__).with_suffix(".json")
SIZES = ((60, 80), (200, 280), (150, 110))
CATEGORIES = {2: "r", 3: "r", 5: "c", 8: "c", 9: "c", 13: "f", 21: "f", 34: "f", 35: "r", 40: "c"}
CROWDED = 6
"""The image with more detections than count."""


def make(seed: int = 7) -> dict:
    """Annotations and detections (boxes and masks), drawn from a seed; the file's is 7."""
    from pycocotools import mask as mask_api

    rng = np.random.default_rng(seed)
    ids = list(CATEGORIES)
    categories = [
        {"id": i, "name": f"class {i}", "frequency": f, "image_count": {"r": 4, "c": 40, "f": 400}[f]}
        for i, f in CATEGORIES.items()
    ]
    images, annotations, boxes, masks = [], [], [], []
    for number in range(1, 26):
        height, width = SIZES[number % 3]
        # Nothing is known of some classes; 40 is in no image at all.
        classes = [int(c) for c in rng.permutation(ids[:-1])]
        here, absent = classes[: rng.integers(0, 4)], classes[4:7]
        image = {"id": 100 - number, "height": height, "width": width, "neg_category_ids": absent}
        image["not_exhaustive_category_ids"] = [c for c in here if rng.random() < 0.6]
        image["coco_url"] = f"http://images.cocodataset.org/val2017/{image['id']:012d}.jpg"
        images.append(image)

        def polygon(box: list[float]) -> list[float]:
            x, y, w, h = box
            corners = [x + w / 2, y, x + w, y + h / 2, x + w / 2, y + h, x, y + h / 3]
            return [round(v, 1) for v in corners]

        def encode(box: list[float], height=height, width=width) -> dict:
            rle = mask_api.merge(mask_api.frPyObjects([polygon(box)], height, width))
            return {"size": [height, width], "counts": rle["counts"].decode()}

        def draw(height=height, width=width) -> list[float]:
            scale = rng.choice([0.1, 0.3, 0.8])
            w, h = scale * width * rng.uniform(0.5, 1), scale * height * rng.uniform(0.5, 1)
            return [round(float(v), 1) for v in (rng.uniform(0, width - w), rng.uniform(0, height - h), w, h)]

        def detect(box: list[float], category: int, image=image, encode=encode) -> None:
            # Coarse scores: many are equal.
            found = {"image_id": image["id"], "category_id": category, "score": round(float(rng.random()), 1)}
            boxes.append({**found, "bbox": box})
            masks.append({**found, "segmentation": encode(box)})

        for category in here:
            for _ in range(rng.integers(1, 4)):
                box = draw()
                rle = encode(box)
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": image["id"],
                        "category_id": category,
                        "bbox": box,
                        "segmentation": [polygon(box)],
                        "area": float(mask_api.area(rle)),
                    }
                )
                for _ in range(rng.integers(0, 3)):
                    moved = [round(max(1.0, v + float(rng.normal(0, 4))), 1) for v in box]
                    detect(moved, category if rng.random() < 0.8 else int(rng.choice(ids)))
        for _ in range(rng.integers(0, 5)):
            detect(draw(), int(rng.choice([*ids, *(5 * here)])))
        if number % 6 == 0:
            detect([10.0, 10.0, 0.0, 5.0], classes[0])  # without area
            detect([10.0, 10.0, 0.0, 5.0], absent[0])
        if number == CROWDED:
            for _ in range(320):
                detect(draw(), int(rng.choice([*here, *absent, ids[-1]])))
    # An object without area: the package does not count it.
    annotations[5]["area"] = 0.0
    truth = {"images": images, "annotations": annotations, "categories": categories}
    return {"truth": truth, "results": {"bbox": boxes, "segm": masks}}


def figures(sample: dict) -> dict[str, dict[str, float]]:
    """What the lvis package says of a sample, for boxes and for masks."""
    import tempfile

    from lvis import LVISEval

    found = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "truth.json"
        file.write_text(json.dumps(sample["truth"]))
        for task, results in sample["results"].items():
            scored = LVISEval(str(file), json.loads(json.dumps(results)), task)
            scored.run()
            found[task] = {name: float(value) for name, value in scored.get_results().items()}
    return found


def main() -> None:
    """Write the sample with the figures of the lvis package, as published, beside this file."""
    sample = make()
    sample["figures"] = figures(sample)
    FILE.write_text(json.dumps(sample, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
