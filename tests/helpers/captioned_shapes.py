"""Shapes with captions, and the keys of a small caption head."""

import json
from pathlib import Path

import shapes

SMALL = {
    "MODEL.VISFT.HEADS": "('detection', 'captioning')",
    "MODEL.VISFT.CAPTIONING.MIN_WORD_COUNT": 1,
    "MODEL.VISFT.CAPTIONING.EMBEDDING_DIM": 8,
    "MODEL.VISFT.CAPTIONING.ATTENTION_DIM": 8,
    "MODEL.VISFT.CAPTIONING.HIDDEN_DIM": 8,
    "MODEL.VISFT.CAPTIONING.GRID": 4,
    "MODEL.VISFT.CAPTIONING.MAX_LENGTH": 6,
}


def captioned(folder: Path, *, seed: int = 0) -> tuple[Path, Path, Path]:
    """Shapes, with two captions an image; the last image has none."""
    instances, images = shapes.make(folder, seed=seed)
    content = json.loads(instances.read_text())
    names = {category["id"]: category["name"] for category in content["categories"]}
    annotations = []
    for image in content["images"][:-1]:
        found = [names[a["category_id"]] for a in content["annotations"] if a["image_id"] == image["id"]]
        for text in (" and ".join(f"a {name}" for name in found), f"{len(found)} shapes, a {found[0]} first"):
            annotations.append({"id": len(annotations), "image_id": image["id"], "caption": text})
    captions = folder / "captions.json"
    captions.write_text(json.dumps({"images": content["images"], "annotations": annotations}))
    return instances, images, captions
