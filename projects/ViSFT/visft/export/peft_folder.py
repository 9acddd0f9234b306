"""peft: LoRA as an adapter folder for the tower in transformers."""

import os
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from visft.errors import ExportError
from visft.export import card, hugging_face_folder, place, writing
from visft.export.source import resolve
from visft.export.writing import Export
from visft.modeling.backbone import CLIPViT, lora

_LAYERS = "vision_model.encoder.layers."
_MODULES = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "proj": "self_attn.out_proj",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
}


def write(
    model: CLIPViT,
    path: str | os.PathLike,
    *,
    base: Any = None,
    interpolate: float = 1.0,
    facts: card.Facts | None = None,
) -> Path:
    """Write `adapter_config.json` and `adapter_model.safetensors`, which peft loads over the base in transformers.

    That base is what `export.hugging_face` writes of the same model with `interpolate=0`; the same tower from elsewhere
    (as `openai/clip-vit-base-patch16`) will do. Only the vision tower's layers are named, so that peft leaves a text
    tower alone.

    Args:
        model, base, interpolate, facts: as `export.lora`.
        path: the folder.

    Raises:
        ExportError: no LoRA; transformers has no such tower; peft, in a process of its own, does not load the folder or
            computes other embeddings.
    """
    path = place.folder(path)
    place.require("peft", "peft", "transformers")
    hugging_face_folder.fits(model.tower)
    plain = resolve(model, base, 0.0, whole=base is not None or model.base is not None)
    converted = hugging_face_folder.convert(plain)
    if converted.classes == ("SiglipVisionModel",):
        raise ExportError(
            f"{path}: the layers of a SigLIP tower without its text tower have other names in each transformers; "
            "give base= with SigLIP's text tower, or export `lora`."
        )
    name = converted.classes[-1]
    export = Export(
        reader="peft",
        tensors=_tensors(model, plain.state, interpolate),
        library="peft",
        content="LoRA alone, as an adapter for the vision tower in transformers",
        use=f"from peft import PeftModel\nfrom transformers import {name}\n\n"
        "# BASE: the base as transformers has it (visft: the format `hf` with --interpolate 0)\n"
        f'model = PeftModel.from_pretrained({name}.from_pretrained("BASE"), "FOLDER")',
        weights="adapter_model.safetensors",
        described=("adapter_config.json", _config(model)),
        fill=lambda folder: hugging_face_folder.put_model(folder.with_name("base"), plain, converted),
        task={"class": name},
    )
    return writing.write(path, resolve(model, base, interpolate, whole=False), export, facts)


def _config(model: CLIPViT) -> dict[str, Any]:
    settings = model.lora_config
    layers = sorted({site.block for site in lora.sites(model)})
    modules = sorted({_MODULES[site.projection.key] for site in lora.sites(model)})
    layers, modules = "|".join(map(str, layers)), "|".join(re.escape(module) for module in modules)
    pattern = rf"(.*\.)?{re.escape(_LAYERS)}({layers})\.({modules})"
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": "",
        "inference_mode": True,
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "target_modules": pattern,
    }


def _tensors(model: CLIPViT, state: dict[str, Tensor], interpolate: float) -> dict[str, Tensor]:
    found = {}
    for site in lora.sites(model):
        key = site.projection.key
        up = interpolate * site.adapter.lora_B.detach().cpu().float()
        after_attention, after_mlp = hugging_face_folder.layer_scales(state, site.block)
        scale = {"proj": after_attention, "fc2": after_mlp}.get(key)
        if scale is not None:  # part of the weight in transformers, and therefore of its update
            up = scale[:, None] * up
        name = f"base_model.model.{_LAYERS}{site.block}.{_MODULES[key]}"
        found[f"{name}.lora_A.weight"] = site.adapter.lora_A.detach().cpu().float()
        found[f"{name}.lora_B.weight"] = up
    return found
