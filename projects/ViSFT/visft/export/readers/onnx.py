"""Run in a process of its own: run a file by onnxruntime alone on given images, in batches of several sizes.

Argument: a JSON file with `path`, `given` and `found` (tensor files).
"""

import json
import sys

import numpy
import onnx
import onnxruntime
from safetensors.numpy import load_file, save_file

with open(sys.argv[1], encoding="utf-8") as file:
    task = json.load(file)
onnx.checker.check_model(task["path"])
session = onnxruntime.InferenceSession(task["path"], providers=["CPUExecutionProvider"])
(entry,) = session.get_inputs()
pictures = load_file(task["given"])["pictures"]


def embed(batch):
    return session.run(None, {entry.name: numpy.ascontiguousarray(batch)})[0]


found = {
    "images": embed(pictures),
    "images one by one": numpy.concatenate([embed(pictures[i : i + 1]) for i in range(len(pictures))]),
}
save_file({name: numpy.ascontiguousarray(array) for name, array in found.items()}, task["found"])
if "preprocess" not in session.get_modelmeta().custom_metadata_map:
    raise SystemExit("the file does not say how images are prepared")
print(json.dumps(f"onnxruntime {onnxruntime.__version__}"))
