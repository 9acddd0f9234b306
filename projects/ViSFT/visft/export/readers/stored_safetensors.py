"""Run in a process of its own: open a file by safetensors alone and read every tensor.

Arguments: the folder; the weight file in it.
"""

import json
import sys

import safetensors
from safetensors import safe_open

_, path = sys.argv[1:]
with safe_open(path, framework="pt") as file:
    for name in file.keys():
        file.get_tensor(name)
print(json.dumps(f"safetensors {safetensors.__version__}"))
