"""Shards of captioned shapes, written by the webdataset library."""

import io
import json
from pathlib import Path

import shapes
import webdataset
from PIL import Image


def jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "JPEG")
    return buffer.getvalue()


def samples(folder: Path, *, seed: int = 0, images: int = 6) -> list[dict]:
    """Samples as img2dataset writes them: `jpg`, `txt` and `json`. Some have only one of the latter two."""
    instances, root = shapes.make(folder, seed=seed, images=images)
    found = []
    for number, entry in enumerate(json.loads(instances.read_text())["images"]):
        caption = f"image {number} of shapes, é"
        sample = {
            "__key__": f"{number:09d}",
            "jpg": jpeg(Image.open(root / entry["file_name"])),
            "txt": caption.encode(),
            "json": json.dumps({"caption": caption, "key": f"{number:09d}", "status": "success"}).encode(),
        }
        if number % 3:
            del sample["txt" if number % 3 == 1 else "json"]
        found.append(sample)
    return found


def write(path: Path, found: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path)) as writer:
        for sample in found:
            writer.write(sample)
    return path


def make(folder: Path, *, seed: int = 0, images: int = 6, shards: int = 2) -> Path:
    """Write the samples to `folder/00000.tar`, ..., and return the folder."""
    found = samples(folder / "unpacked", seed=seed, images=images)
    each = -(-len(found) // shards)
    for shard in range(shards):
        write(folder / f"{shard:05d}.tar", found[shard * each : (shard + 1) * each])
    return folder
