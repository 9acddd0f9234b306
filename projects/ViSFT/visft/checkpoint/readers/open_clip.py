"""Run in a process of its own: load a folder by open_clip alone and embed given pictures and texts.

Arguments: the folder; a safetensors file with `pictures` and `texts`; where to write `images` and `texts`.
"""

import json
import sys

import open_clip
import torch
from safetensors.torch import load_file, save_file

folder, given, found = sys.argv[1:]
inputs = load_file(given)
model = open_clip.create_model(f"local-dir:{folder}").eval()
with torch.no_grad():
    outputs = {
        "images": model.encode_image(inputs["pictures"], normalize=False),
        "texts": model.encode_text(inputs["texts"], normalize=False),
    }
if "visft" in sys.modules:
    raise SystemExit("visft was imported: this process would not show what a user without it sees")
save_file({name: tensor.float().contiguous() for name, tensor in outputs.items()}, found)
print(json.dumps({"mean": model.visual.image_mean, "std": model.visual.image_std}))
