"""Run in a process of its own: load a folder by transformers alone and embed given images and texts.

Argument: a JSON file with `path` (the folder), `classes`, `given` and `found` (tensor files), `photographs` and
`sentences`.
"""

import json
import os
import sys

import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
with open(sys.argv[1], encoding="utf-8") as file:
    task = json.load(file)
given, found = load_file(task["given"]), {}
for name in task["classes"]:
    loaded = getattr(transformers, name).from_pretrained(task["path"], output_loading_info=True)
    model, report = loaded[0].eval(), loaded[1]
    if report["missing_keys"] or report["mismatched_keys"]:
        raise SystemExit(f"{name} misses {sorted(report['missing_keys'] or report['mismatched_keys'])[:3]}")
    whole = hasattr(model, "get_image_features")
    with torch.no_grad():
        if whole:
            image = model.get_image_features(pixel_values=given["pictures"])
            text = model.get_text_features(input_ids=given["texts"])
            found["texts"] = getattr(text, "pooler_output", text)
        else:
            image = model(pixel_values=given["pictures"])
            image = getattr(image, "image_embeds", image)
        found["images" if "images" not in found else f"images by {name}"] = getattr(
            image, "pooler_output", image
        )
processor = transformers.AutoImageProcessor.from_pretrained(task["path"])
photographs = [Image.open(file) for file in task["photographs"]]
found["pixels"] = torch.cat([processor(one, return_tensors="pt")["pixel_values"] for one in photographs])
if os.path.exists(os.path.join(task["path"], "tokenizer_config.json")):
    tokenizer = transformers.AutoTokenizer.from_pretrained(task["path"])
    found["tokens"] = tokenizer(task["sentences"], padding="max_length", return_tensors="pt")["input_ids"]
save_file({name: tensor.float().contiguous() for name, tensor in found.items()}, task["found"])
print(json.dumps(f"transformers {transformers.__version__}"))
