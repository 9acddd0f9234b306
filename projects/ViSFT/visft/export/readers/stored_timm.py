"""Run in a process of its own: load a folder by timm alone, strictly, and compare its model with the file in it.

Arguments: the folder; the weight file in it.
"""

import json
import sys

import timm
import torch
from safetensors.torch import load_file

folder, path = sys.argv[1:]
tensors = load_file(path)
with open(f"{folder}/config.json", encoding="utf-8") as file:
    about = json.load(file)
sizes = {**about["model_args"], "num_classes": about["num_classes"]}
model = timm.create_model(about["architecture"], checkpoint_path=path, **sizes)
for key, value in model.state_dict().items():
    if not torch.equal(value, tensors[key].to(value.dtype)):
        raise SystemExit(f"timm's model has other values in {key}")
print(json.dumps(f"timm {timm.__version__}"))
