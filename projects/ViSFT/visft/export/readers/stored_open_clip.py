"""Run in a process of its own: load a folder by open_clip alone, and compare its model with the file, tensor by tensor.

Arguments: the folder; the weight file in it.
"""

import json
import sys

import open_clip
import torch
from safetensors import safe_open

folder, path = sys.argv[1:]
model = open_clip.create_model(f"local-dir:{folder}").eval()
state = model.state_dict()
with safe_open(path, framework="pt") as file:
    names = set(file.keys())
    if names != set(state):
        raise SystemExit(f"names differ: {sorted(names ^ set(state))[:3]}")
    for name in names:
        if not torch.equal(
            state[name], file.get_tensor(name).to(state[name].dtype).reshape(state[name].shape)
        ):
            raise SystemExit(f"open_clip's model has other values in {name}")
size = model.visual.image_size
height, width = (size, size) if isinstance(size, int) else size
with torch.no_grad():
    embedding = model.encode_image(torch.zeros(1, 3, height, width))
if not torch.isfinite(embedding).all():
    raise SystemExit("the embedding of an image is not finite")
print(json.dumps(f"open_clip {open_clip.__version__}"))
