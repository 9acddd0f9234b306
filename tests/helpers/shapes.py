"""A data set of coloured shapes in COCO format: small, made at once, and learnable."""

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

CLASSES = ("square", "disc", "bar")


def make(
    folder: Path, *, images: int = 12, size: int | tuple[int, int] = 64, seed: int = 0
) -> tuple[Path, Path]:
    """Write `images` images of a side or (height, width); returns the annotation file and the folder of images."""
    height, width = (size, size) if isinstance(size, int) else size
    side = min(height, width)
    rng = np.random.default_rng(seed)
    pictures = folder / "pictures"
    pictures.mkdir(parents=True)
    content = {"images": [], "annotations": [], "categories": []}
    # Ids with gaps, as COCO's have.
    content["categories"] = [{"id": 3 * i + 2, "name": name} for i, name in enumerate(CLASSES)]
    for number in range(1, images + 1):
        image = Image.new("RGB", (width, height), tuple(int(v) for v in rng.integers(0, 90, 3)))
        pen = ImageDraw.Draw(image)
        for _ in range(int(rng.integers(1, 4))):
            kind = int(rng.integers(3))
            w = h = int(rng.integers(side // 6, side // 3))
            if kind == 2:
                h = max(4, h // 3)
            x, y = (int(rng.integers(0, room - 1)) for room in (width - w, height - h))
            colour = tuple(int(v) for v in rng.integers(120, 256, 3))
            if kind == 1:
                pen.ellipse([x, y, x + w, y + h], fill=colour)
                angles = np.linspace(0, 2 * np.pi, 16, endpoint=False)
                circle = 1 + np.stack([np.cos(angles), np.sin(angles)], axis=1)
                polygon = ((x, y) + circle * (w / 2, h / 2)).flatten().tolist()
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
        content["images"].append({"id": number, "file_name": name, "height": height, "width": width})
    file = folder / "annotations.json"
    file.write_text(json.dumps(content))
    return file, pictures
