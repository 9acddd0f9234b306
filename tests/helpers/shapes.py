"""A data set of coloured shapes in COCO format: small, made at once, and learnable."""

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

CLASSES = ("square", "disc", "bar")


def make(folder: Path, *, images: int = 12, size: int = 64, seed: int = 0) -> tuple[Path, Path]:
    """Write `images` images; returns the annotation file and the folder of images."""
    rng = np.random.default_rng(seed)
    pictures = folder / "pictures"
    pictures.mkdir(parents=True)
    content = {"images": [], "annotations": [], "categories": []}
    # Ids with gaps, as COCO's have.
    content["categories"] = [{"id": 3 * i + 2, "name": name} for i, name in enumerate(CLASSES)]
    for number in range(1, images + 1):
        image = Image.new("RGB", (size, size), tuple(int(v) for v in rng.integers(0, 90, 3)))
        pen = ImageDraw.Draw(image)
        for _ in range(int(rng.integers(1, 4))):
            kind = int(rng.integers(3))
            w = h = int(rng.integers(size // 6, size // 3))
            if kind == 2:
                h = max(4, h // 3)
            x, y = (int(rng.integers(0, size - side - 1)) for side in (w, h))
            colour = tuple(int(v) for v in rng.integers(120, 256, 3))
            if kind == 1:
                pen.ellipse([x, y, x + w, y + h], fill=colour)
                angles = np.linspace(0, 2 * np.pi, 16, endpoint=False)
                outline = np.stack(
                    [x + w / 2 * (1 + np.cos(angles)), y + h / 2 * (1 + np.sin(angles))], axis=1
                )
                polygon = [float(v) for v in outline.flatten()]
            else:
                pen.rectangle([x, y, x + w, y + h], fill=colour)
                polygon = [float(v) for v in (x, y, x + w, y, x + w, y + h, x, y + h)]
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) + 1,
                    "image_id": number,
                    "category_id": 3 * kind + 2,
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "segmentation": [polygon],
                    "iscrowd": 0,
                }
            )
        name = f"{number:06d}.png"
        image.save(pictures / name)
        content["images"].append({"id": number, "file_name": name, "height": size, "width": size})
    file = folder / "annotations.json"
    file.write_text(json.dumps(content))
    return file, pictures
