"""Converts a CLIP from its names in transformers (`CLIPModel`: `vision_model.encoder.layers...`) to open_clip's."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visft.checkpoint import files
from visft.errors import CheckpointError

WEIGHTS = (
    "model.safetensors",
    "pytorch_model.bin",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
)
"""Weight files in a Hugging Face model folder."""

_TOWERS = {"vision_model.": "visual.", "text_model.": ""}
_LAYER = re.compile(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")
_IN_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+?)[._](weight|bias)")
_OUTSIDE = {
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm.weight": "visual.ln_pre.weight",
    "vision_model.pre_layrnorm.bias": "visual.ln_pre.bias",
    "vision_model.post_layernorm.weight": "visual.ln_post.weight",
    "vision_model.post_layernorm.bias": "visual.ln_post.bias",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
    "logit_scale": "logit_scale",
}
_TRANSPOSED = {"visual_projection.weight": "visual.proj", "text_projection.weight": "text_projection"}


def weights_in(folder: Path) -> Path:
    """Return the weight file in a model's folder.

    Raises:
        CheckpointError: there is none, or there are several parts.
    """
    for name in WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    parts = sorted(file.name for file in folder.glob("*.index.json"))
    reason = (
        f"its weights are in several parts ({parts[0]})"
        if parts
        else f"none of {', '.join(WEIGHTS)} is in it"
    )
    raise CheckpointError(
        f"{folder}: is a folder, and {reason}; give a folder with one weight file (transformers' save_pretrained "
        "with a larger max_shard_size writes one), or the file itself."
    )


def is_clip(names: Iterable[str]) -> bool:
    """Whether these are names of a CLIP in transformers, or of one of its towers."""
    return any(name.startswith("vision_model.encoder.layers.") for name in names)


def config_of(path: Path) -> dict[str, Any]:
    """Return the `config.json` beside a weight file; {} if there is none."""
    file = path.with_name("config.json")
    content = files.read_json(file) if file.is_file() else {}
    return content if isinstance(content, dict) else {}


def activation_of(path: Path) -> str:
    """Return the activation in its MLPs: `gelu`, `quick_gelu`... "": unknown, for lack of a config.json."""
    config = config_of(path)
    if config.get("model_type") != "clip":
        return ""
    return config.get("vision_config", {}).get(
        "hidden_act", "quick_gelu"
    )  # transformers does not write its default


def to_open_clip(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Return a CLIP's tensors by open_clip's names.

    Raises:
        CheckpointError: it is not a CLIP (SigLIP has other parts), only a tower, or has a name that no CLIP has.
    """
    if any(name.startswith("vision_model.head.") for name in tensors):
        raise CheckpointError(
            f"{path}: is a SigLIP of transformers (vision_model.head. ...), of which only CLIP is converted; give the "
            "same weights as open_clip has them (its tag, or the file open_clip_model.safetensors)."
        )
    lacking = [tower for tower in _TOWERS if not any(name.startswith(tower) for name in tensors)]
    lacking += [name for name in (*_TRANSPOSED, "logit_scale") if name not in tensors]
    if lacking:
        raise CheckpointError(
            f"{path}: is a part of a CLIP of transformers, without {', '.join(lacking)}; give the whole CLIPModel."
        )
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith("embeddings.position_ids") or ".self_attn." in name and "out_proj" not in name:
            continue  # indices that follow from the length; joined below
        if name in _OUTSIDE:
            found[_OUTSIDE[name]] = tensor
        elif name in _TRANSPOSED:
            found[_TRANSPOSED[name]] = tensor.T.contiguous()
        else:
            found[_in_layer(name, path)] = tensor
    for tower, ours in _TOWERS.items():
        for name in [n for n in tensors if n.startswith(tower) and ".self_attn.q_proj." in n]:
            layer, part = name[len(f"{tower}encoder.layers.") :].split(".")[0], name.rpartition(".")[2]
            rows = [name.replace("q_proj", f"{letter}_proj") for letter in "qkv"]
            missing = next((row for row in rows if row not in tensors), None)
            if missing is not None:
                raise CheckpointError(f"{path}: lacks {missing}; fetch it again.")
            joined = torch.cat([tensors[row] for row in rows])
            found[f"{ours}transformer.resblocks.{layer}.attn.in_proj_{part}"] = joined
    return found


def _in_layer(name: str, path: Path) -> str:
    tower = next((tower for tower in _TOWERS if name.startswith(tower)), None)
    match = _LAYER.fullmatch(name.removeprefix(tower)) if tower else None
    if match is None or match[2] not in _IN_LAYER:
        raise CheckpointError(
            f"{path}: has {name}, which a CLIP of transformers has not; give the weights of a CLIPModel."
        )
    return f"{_TOWERS[tower]}transformer.resblocks.{match[1]}.{_IN_LAYER[match[2]]}.{match[3]}"


def from_open_clip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `to_open_clip`. Tensors that CLIP in transformers lacks are left out."""
    outside, transposed, in_block = (
        {ours: name for name, ours in table.items()} for table in (_OUTSIDE, _TRANSPOSED, _IN_LAYER)
    )
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name in outside:
            found[outside[name]] = tensor
        elif name in transposed:
            found[transposed[name]] = tensor.T.contiguous()
        elif match := _BLOCK.fullmatch(name):
            tower, number, inner, part = match.groups()
            layer = f"{'vision_model' if tower else 'text_model'}.encoder.layers.{number}."
            if inner == "attn.in_proj":
                rows = zip("qkv", tensor.chunk(3), strict=True)
                found |= {f"{layer}self_attn.{letter}_proj.{part}": three for letter, three in rows}
            elif inner in in_block:
                found[f"{layer}{in_block[inner]}.{part}"] = tensor
    return found
