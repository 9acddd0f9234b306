"""Run in a process of its own: load a folder by open_clip alone and embed given images and texts.

Argument: a JSON file with `path` (the folder), `given` and `found` (tensor files) and `photographs`.
"""

import json
import sys

import open_clip
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

with open(sys.argv[1], encoding="utf-8") as file:
    task = json.load(file)
given = load_file(task["given"])
model, transform = open_clip.create_model_from_pretrained(f"local-dir:{task['path']}")
with torch.no_grad():
    found = {
        "images": model.eval().encode_image(given["pictures"], normalize=False),
        "texts": model.encode_text(given["texts"], normalize=False),
        "pixels": torch.stack([transform(Image.open(file)) for file in task["photographs"]]),
    }
save_file({name: tensor.float().contiguous() for name, tensor in found.items()}, task["found"])
print(json.dumps(f"open_clip {open_clip.__version__}"))
