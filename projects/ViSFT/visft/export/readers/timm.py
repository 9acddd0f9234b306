"""Run in a process of its own: load a file by timm alone, in both of its ways, and embed given images.

Argument: a JSON file with `path` (the weights), `name` and `arguments` for `timm.create_model`, `given` and `found`
(tensor files) and `photographs`.
"""

import json
import os
import sys

import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

with open(sys.argv[1], encoding="utf-8") as file:
    task = json.load(file)
pictures = load_file(task["given"])["pictures"]
model = timm.create_model(task["name"], checkpoint_path=task["path"], **task["arguments"]).eval()
folder = timm.create_model(f"local-dir:{os.path.dirname(task['path'])}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(folder), is_training=False)
with torch.no_grad():
    found = {
        "images": model(pictures),
        "images by local-dir": folder(pictures),
        "pixels": torch.stack([transform(Image.open(file)) for file in task["photographs"]]),
    }
save_file({name: tensor.float().contiguous() for name, tensor in found.items()}, task["found"])
print(json.dumps(f"timm {timm.__version__}"))
