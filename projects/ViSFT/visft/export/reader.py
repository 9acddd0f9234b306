"""Loads an export as its users do, in a process without visft, and writes what it computes.

Argument: a JSON file with `reader` (of `READERS`), `folder` and `file` of the export, `given` and `found` (tensor
files), `photographs`, and what only that reader needs. The reader computes embeddings of the given `pictures` and
`texts`, and `pixels` of the photographs. If nothing is given, it compares the loaded model with the file, tensor by
tensor.
"""

import importlib
import json
import os
import re
import sys

import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file


def open_clip(task, given):
    import open_clip

    model, transform = open_clip.create_model_from_pretrained(f"local-dir:{task['folder']}")
    if not given:
        return compared(model, task)
    return {
        "images": model.eval().encode_image(given["pictures"], normalize=False),
        "texts": model.encode_text(given["texts"], normalize=False),
        "pixels": torch.stack([transform(picture) for picture in photographs(task)]),
    }


def timm(task, given):
    """Loaded in both ways that timm has."""
    import timm

    model = timm.create_model(task["name"], checkpoint_path=task["file"], **task["arguments"]).eval()
    if not given:
        return compared(model, task)
    folder = timm.create_model(f"local-dir:{task['folder']}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(folder), is_training=False)
    return {
        "images": model(given["pictures"]),
        "images by local-dir": folder(given["pictures"]),
        "pixels": torch.stack([transform(picture) for picture in photographs(task)]),
    }


def safetensors(task, given):
    """The file of a vision tower, loaded into open_clip's tower (`config`) or timm's (`name`, `arguments`)."""
    if not given:  # a bare tower may lack parts that the library has
        with safe_open(task["file"], framework="pt") as file:
            return {name: file.get_tensor(name).reshape(-1)[:1] for name in file.keys()}
    state = {name.removeprefix("visual."): tensor for name, tensor in load_file(task["file"]).items()}
    if "config" in task:
        from open_clip.model import _build_vision_tower

        config = task["config"]
        tower = _build_vision_tower(
            config["embed_dim"], config["vision_cfg"], config.get("quick_gelu", False)
        )
    else:
        import timm

        tower = timm.create_model(task["name"], **task["arguments"])
        state = {name.removeprefix("trunk."): tensor for name, tensor in state.items()}
    tower.load_state_dict(state, strict=True)
    images = tower.eval()(given["pictures"])
    return {"images": images[0] if isinstance(images, tuple) else images}


def hugging_face(task, given):
    """Loaded by each of the `classes`."""
    transformers, found = quiet_transformers(), {}
    for name in task["classes"]:
        loaded = getattr(transformers, name).from_pretrained(task["folder"], output_loading_info=True)
        model, report = loaded[0].eval(), loaded[1]
        odd = report["missing_keys"] or report["mismatched_keys"]
        if odd:
            raise SystemExit(f"{name} misses {sorted(odd)[:3]}")
        if hasattr(model, "get_text_features"):
            texts = model.get_text_features(input_ids=given["texts"])
            found["texts"] = getattr(texts, "pooler_output", texts)
        found["images" if "images" not in found else f"images by {name}"] = image_features(model, given)
    processor = transformers.AutoImageProcessor.from_pretrained(task["folder"])
    pixels = [processor(picture, return_tensors="pt")["pixel_values"] for picture in photographs(task)]
    found["pixels"] = torch.cat(pixels)
    if os.path.exists(os.path.join(task["folder"], "tokenizer_config.json")):
        tokenizer = transformers.AutoTokenizer.from_pretrained(task["folder"])
        tokens = tokenizer(task["sentences"], padding="max_length", return_tensors="pt")
        found["tokens"] = tokens["input_ids"]
    return found


def peft(task, given):
    """An adapter on a transformers model (`class`), which is in the folder `base` beside it."""
    import peft

    base = os.path.join(os.path.dirname(task["folder"]), "base")
    base = getattr(quiet_transformers(), task["class"]).from_pretrained(base)
    model = peft.PeftModel.from_pretrained(base, task["folder"]).eval()
    stored, loaded = load_file(task["file"]), peft.get_peft_model_state_dict(model)
    odd = sorted(loaded.keys() ^ stored.keys()) or [
        n for n in stored if not torch.equal(stored[n], loaded[n])
    ]
    if odd:
        raise SystemExit(f"peft holds other tensors than the file: {odd[:3]}")
    return {"images": image_features(model, given)}


def onnx(task, given):
    """Run with batches of several sizes."""
    import onnx
    import onnxruntime

    onnx.checker.check_model(task["file"])
    session = onnxruntime.InferenceSession(task["file"], providers=["CPUExecutionProvider"])
    if "preprocess" not in session.get_modelmeta().custom_metadata_map:
        raise SystemExit("the file does not say how images are prepared")
    (entry,) = session.get_inputs()

    def embed(batch):
        return torch.from_numpy(session.run(None, {entry.name: batch.contiguous().numpy()})[0])

    one_by_one = torch.cat([embed(picture[None]) for picture in given["pictures"]])
    return {"images": embed(given["pictures"]), "images one by one": one_by_one}


def lora(task, given):
    """Return the dense update of each `<block>.<projection>`.

    Of the `layout` `visft` there is one pair a projection, `scaling` given; of `authors` q lies above v in one pair,
    scaled by 1 / rank.
    """
    path, found = task["file"], {}
    tensors = torch.load(path, weights_only=True) if path.endswith(".pt") else load_file(path)
    for name in [name for name in tensors if name.endswith("lora_A")]:
        a, b = tensors[name], tensors[f"{name[:-1]}B"]
        if task["layout"] == "authors":
            block = re.fullmatch(r"visual\.blocks\.(\d+)\.attn\.qkv\.lora_A", name)[1]
            for target, half_a, half_b in zip("qv", a.chunk(2), b.chunk(2), strict=True):
                found[f"{block}.{target}"] = half_b @ half_a / len(half_a)
        else:
            block, target = re.fullmatch(r"backbone\..*blocks\.(\d+)\.lora\.(\w+)\.lora_A", name).groups()
            found[f"{block}.{target}"] = task["scaling"] * (b @ a)
    return found


def quiet_transformers():
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def image_features(model, given):
    features = getattr(model, "get_image_features", model)(pixel_values=given["pictures"])
    features = getattr(features, "image_embeds", features)
    return getattr(features, "pooler_output", features)


def photographs(task):
    return [Image.open(file) for file in task["photographs"]]


def compared(model, task):
    state = model.state_dict()
    with safe_open(task["file"], framework="pt") as file:
        if set(file.keys()) != set(state):
            raise SystemExit(f"names differ: {sorted(set(file.keys()) ^ set(state))[:3]}")
        for name, tensor in state.items():
            if not torch.equal(tensor, file.get_tensor(name).to(tensor.dtype).reshape(tensor.shape)):
                raise SystemExit(f"the loaded model has other values in {name}")
    return {}


READERS = {
    "open_clip": (open_clip, "open_clip"),
    "timm": (timm, "timm"),
    "safetensors": (safetensors, "safetensors"),
    "hugging_face": (hugging_face, "transformers"),
    "peft": (peft, "peft", "transformers"),
    "onnx": (onnx, "onnxruntime"),
    "lora": (lora, "torch"),
}
"""Readers by name, each with the packages that its check is attributed to."""


def main(path):
    with open(path, encoding="utf-8") as file:
        task = json.load(file)
    read, *packages = READERS[task["reader"]]
    given = load_file(task["given"])
    if read is safetensors and given:
        packages = ["open_clip" if "config" in task else "timm"]
    with torch.no_grad():
        found = read(task, given)
    save_file({name: tensor.float().contiguous() for name, tensor in found.items()}, task["found"])
    versions = {name: importlib.import_module(name).__version__.split("+")[0] for name in packages}
    print(json.dumps(", ".join(f"{name} {version}" for name, version in versions.items())))


if __name__ == "__main__":
    main(sys.argv[1])
