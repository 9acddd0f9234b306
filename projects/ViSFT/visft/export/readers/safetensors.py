"""Run in a process of its own: load a vision tower's file into open_clip's or timm's tower and embed given images.

Argument: a JSON file with `path`, `config` (open_clip's) or `name` and `arguments` (timm's), `given` and `found`
(tensor files).
"""

import json
import sys

import torch
from safetensors.torch import load_file, save_file

with open(sys.argv[1], encoding="utf-8") as file:
    task = json.load(file)
state = {name.removeprefix("visual."): tensor for name, tensor in load_file(task["path"]).items()}
if "config" in task:
    import open_clip
    from open_clip.model import _build_vision_tower

    config = task["config"]
    tower = _build_vision_tower(config["embed_dim"], config["vision_cfg"], config.get("quick_gelu", False))
    version = f"open_clip {open_clip.__version__}"
else:
    import timm

    tower = timm.create_model(task["name"], **task["arguments"])
    state = {name.removeprefix("trunk."): tensor for name, tensor in state.items()}
    version = f"timm {timm.__version__}"
tower.load_state_dict(state, strict=True)
with torch.no_grad():
    images = tower.eval()(load_file(task["given"])["pictures"])
images = images[0] if isinstance(images, tuple) else images
save_file({"images": images.float().contiguous()}, task["found"])
print(json.dumps(version))
