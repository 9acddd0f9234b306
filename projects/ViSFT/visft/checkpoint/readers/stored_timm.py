"""Run in a process of its own: load a file by timm alone, strictly, and compare its model with it, tensor by tensor.

Arguments: the folder; the weight file in it; timm's name of the architecture.
"""

import json
import sys

import timm
import torch
from safetensors.torch import load_file

_, path, name = sys.argv[1:]
tensors = load_file(path)
classes = len(tensors["head.weight"]) if "head.weight" in tensors else 0
model = timm.create_model(name.rpartition("/")[2], checkpoint_path=path, num_classes=classes).eval()
if "visft" in sys.modules:
    raise SystemExit("visft was imported: this process would not show what a user without it sees")
for key, value in model.state_dict().items():
    if not torch.equal(value, tensors[key].to(value.dtype)):
        raise SystemExit(f"timm's model has other values in {key}")
print(json.dumps({"tensors": len(tensors)}))
