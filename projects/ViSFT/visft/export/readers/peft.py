"""Run in a process of its own: load an adapter by peft over a model of transformers and embed given images.

Argument: a JSON file with `path` (the adapter's folder), `base` (the model's), `class`, `given` and `found` (tensor
files).
"""

import json
import os
import sys

import peft
import torch
import transformers
from safetensors.torch import load_file, save_file

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
with open(sys.argv[1], encoding="utf-8") as file:
    task = json.load(file)
base = getattr(transformers, task["class"]).from_pretrained(task["base"])
model = peft.PeftModel.from_pretrained(base, task["path"]).eval()
stored = load_file(os.path.join(task["path"], "adapter_model.safetensors"))
loaded = peft.get_peft_model_state_dict(model)
odd = sorted(loaded.keys() ^ stored.keys()) or [n for n in stored if not torch.equal(stored[n], loaded[n])]
if odd:
    raise SystemExit(f"peft holds other tensors than the file: {odd[:3]}")
pictures = load_file(task["given"])["pictures"]
with torch.no_grad():
    if hasattr(base, "get_image_features"):
        image = model.get_image_features(pixel_values=pictures)
    else:
        image = model(pixel_values=pictures)
    image = getattr(image, "image_embeds", image)
    image = getattr(image, "pooler_output", image)
save_file({"images": image.float().contiguous()}, task["found"])
print(json.dumps(f"peft {peft.__version__}, transformers {transformers.__version__}"))
