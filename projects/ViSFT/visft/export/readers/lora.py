"""Run in a process of its own: read LoRA by torch and safetensors alone and multiply each update out.

Argument: a JSON file with `path`, `layout` (`visft`: one pair a projection, `scaling` given; `authors`: q above v in
one pair, scaled by 1 / rank) and `found` (a tensor file): `<block>.<projection>` -> the dense update.
"""

import json
import re
import sys

import torch
from safetensors.torch import load_file, save_file

with open(sys.argv[1], encoding="utf-8") as file:
    task = json.load(file)
path = task["path"]
tensors = torch.load(path, weights_only=True) if path.endswith(".pt") else load_file(path)
found = {}
for name, a in tensors.items():
    if not name.endswith("lora_A"):
        continue
    b = tensors[f"{name[:-1]}B"]
    if task["layout"] == "authors":
        block = re.fullmatch(r"visual\.blocks\.(\d+)\.attn\.qkv\.lora_A", name)[1]
        for target, half_a, half_b in zip("qv", a.chunk(2), b.chunk(2), strict=True):
            found[f"{block}.{target}"] = half_b @ half_a / len(half_a)
    else:
        block, target = re.fullmatch(r"backbone\..*blocks\.(\d+)\.lora\.(\w+)\.lora_A", name).groups()
        found[f"{block}.{target}"] = task["scaling"] * (b @ a)
save_file({name: tensor.contiguous() for name, tensor in found.items()}, task["found"])
print(json.dumps(f"torch {torch.__version__.split('+')[0]}"))
