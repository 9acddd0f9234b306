"""A small data set in COCO format: coloured shapes, so that the image itself says where each object is."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from pycocotools import mask as mask_api

COLOURS = {7: (255, 0, 0), 3: (0, 255, 0), 11: (0, 0, 255)}
"""Fill colour by category id. The ids are not contiguous and not in the order of the file, as in many own data sets."""
CATEGORIES = [{"id": 7, "name": "red"}, {"id": 3, "name": "green"}, {"id": 11, "name": "blue"}]
CONTIGUOUS = {3: 0, 7: 1, 11: 2}


@dataclass
class Coco:
    json_file: Path
    images: Path

    def content(self) -> dict:
        return json.loads(self.json_file.read_text())

    def write(self, content: object) -> None:
        self.json_file.write_text(content if isinstance(content, str) else json.dumps(content))


def make_coco(folder: Path, *, count: int = 7, categories: list[dict] = CATEGORIES) -> Coco:
    """Pictures of three shapes, one a colour; masks are polygons in odd images and run lengths in even ones."""
    coco = Coco(folder / "instances.json", folder / "images")
    coco.images.mkdir(parents=True)
    rng = np.random.default_rng(1)
    content = {"images": [], "annotations": [], "categories": categories}
    for image_id in range(1, count + 1):
        width, height = int(rng.integers(200, 300)), int(rng.integers(160, 240))
        image = Image.new("RGB", (width, height))
        draw = ImageDraw.Draw(image)
        for column, (category, colour) in enumerate(COLOURS.items()):
            # A third of the width each: the shapes do not cover one another.
            left, right = column * width // 3 + 4, (column + 1) * width // 3 - 4
            top, bottom = int(rng.integers(8, 60)), int(rng.integers(100, height - 8))
            # Lopsided, so that a wrong flip shows; without thin tips, which resizing may lose.
            corners = [(left, bottom), (left, top), ((left + right) // 2, top), (right, bottom)]
            draw.polygon(corners, fill=colour)
            mask = (np.asarray(image) == colour).all(-1)
            ys, xs = np.nonzero(mask)
            x, y = int(xs.min()), int(ys.min())
            box = [x, y, int(xs.max()) + 1 - x, int(ys.max()) + 1 - y]
            if image_id % 2:
                # Pixel indices are pixel centres: half a pixel further in COCO's coordinates.
                segmentation: list | dict = [[c + 0.5 for corner in corners for c in corner]]
            else:
                rle = mask_api.encode(np.asfortranarray(mask.astype(np.uint8)))
                segmentation = {"size": rle["size"], "counts": rle["counts"].decode()}
            content["annotations"].append(
                {
                    "id": 100 + len(content["annotations"]),
                    "image_id": image_id,
                    "category_id": category,
                    "bbox": box,
                    "area": int(mask.sum()),
                    "iscrowd": 0,
                    "segmentation": segmentation,
                }
            )
        image.save(coco.images / f"{image_id}.png")
        entry = {"id": image_id, "file_name": f"{image_id}.png", "width": width, "height": height}
        content["images"].append(entry)
    coco.write(content)
    return coco
