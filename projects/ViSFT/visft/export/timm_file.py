"""timm: the tower under timm's names, for `timm.create_model(name, checkpoint_path=...)`."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from visft.errors import ExportError
from visft.export import base_clip as bases
from visft.export import card, place, verification, writing
from visft.export.source import Source, resolve
from visft.export.writing import Export
from visft.modeling.backbone import CLIPViT

_CROPS = {"shortest": "center", "squash": "squash"}
_BLOCK = {
    "ln_1": "norm1",
    "attn.in_proj_": "attn.qkv.",
    "attn.out_proj": "attn.proj",
    "ls_1": "ls1",
    "ln_2": "norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "ls_2": "ls2",
}
_ACTIVATIONS = {"QuickGELU": "quick_gelu", "GELUTanh": "gelu_tanh", "GELU": "gelu"}


@dataclass(frozen=True)
class Architecture:
    """Arguments of `timm.create_model`. `name` has a tag if timm has one with the same number of outputs."""

    name: str
    arguments: dict[str, Any]


def write(
    model: CLIPViT,
    path: str | os.PathLike,
    *,
    base: nn.Module | str | os.PathLike | None = None,
    interpolate: float = 1.0,
    facts: card.Facts | None = None,
) -> Path:
    """Write the tower as one safetensors file that timm loads strictly.

    The classifier `head` is the projection to the CLIP embedding if the tower has a linear one, with a zero bias if it
    has none. Otherwise there is no head (`num_classes=0`). `config.json` beside it has architecture and preprocessing,
    so that `timm.create_model("local-dir:FOLDER", pretrained=True)` needs no name.

    Args:
        model, path, base, interpolate, facts: as `export.safetensors`.

    Raises:
        ExportError: timm has no such tower, or it, in a process of its own, does not load the file strictly, computes
            other embeddings or prepares images otherwise.
    """
    path = place.file(path, ".safetensors")
    source = resolve(model, base, interpolate, whole=False)
    return writing.write(path, source, plan(source, path), facts)


def plan(source: Source, path: Path) -> Export:
    """Return what will be written to a path.

    Raises:
        ExportError: timm has no such tower, or cannot prepare images this way.
    """
    found, state = architecture(source.visual), tensors(source.visual, source.state)
    if "head.weight" not in state and found.arguments["num_classes"]:  # a bare tower without its projection
        found = Architecture(found.name.split(".")[0], {**found.arguments, "num_classes": 0})
    arguments = "".join(f", {key}={value!r}" for key, value in found.arguments.items())
    return Export(
        reader="timm",
        tensors=state,
        library="timm",
        content="the vision tower; its outputs are the CLIP embedding, not of unit length",
        use=f'import timm\n\nmodel = timm.create_model("{found.name}", checkpoint_path="{path.name}"{arguments})\n'
        '# or, from the folder alone: timm.create_model("local-dir:FOLDER", pretrained=True)',
        described=("config.json", _config(source.preprocess, source.model.embed_dim, found)),
        owner="architecture",
        task={"name": found.name, "arguments": found.arguments},
        pixels=verification.EXACT,
    )


def architecture(visual: nn.Module) -> Architecture:
    """Return the name of a tower in timm and the arguments that give its sizes. Its weights may be on `meta`.

    Args:
        visual: open_clip's VisionTransformer or TimmModel, or timm's own VisionTransformer or Eva.

    Raises:
        ExportError: timm has no such tower.
    """
    if hasattr(visual, "transformer"):
        return _of_open_clip(visual)
    return _of_timm(visual)


def tensors(visual: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a tower's tensors by timm's names.

    Args:
        state: by open_clip's names below `visual.`.
    """
    if hasattr(visual, "transformer"):
        return _renamed(visual, state)
    if not hasattr(visual, "trunk"):
        return state
    found = {n.removeprefix("trunk."): t for n, t in state.items() if n.startswith("trunk.")}
    if "head.proj.weight" in state:
        found["head.weight"] = state["head.proj.weight"]
        found["head.bias"] = state.get("head.proj.bias", torch.zeros(found["head.weight"].shape[0]))
    return found


def activation(module: nn.Module) -> str:
    """Return the name of an activation function in timm."""
    if isinstance(module, nn.GELU) and module.approximate == "tanh":
        return "gelu_tanh"
    return _ACTIVATIONS.get(type(module).__name__, type(module).__name__)


def _config(preprocess: Mapping[str, Any], width: int, found: Architecture) -> dict[str, Any]:
    """Return the config that timm reads beside the weights. `width` is that of the tower's tokens."""
    size, classes = preprocess["size"], found.arguments["num_classes"]
    if preprocess["resize_mode"] not in _CROPS:
        raise ExportError(
            "The format `timm`: the tower's images are padded with black (resize_mode `longest`), timm pads with "
            "their mean; use open_clip."
        )
    return {
        "architecture": found.name.split(".")[0],
        "num_classes": classes,
        "num_features": width,
        "model_args": {key: value for key, value in found.arguments.items() if key != "num_classes"},
        "pretrained_cfg": {
            "tag": "visft",
            "custom_load": False,
            "input_size": [3, *size],
            "fixed_input_size": True,
            "interpolation": preprocess["interpolation"],
            "crop_pct": 1.0,
            "crop_mode": _CROPS[preprocess["resize_mode"]],
            "mean": preprocess["mean"],
            "std": preprocess["std"],
            "num_classes": classes,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def _create(name: str, **arguments: Any) -> nn.Module:
    import timm

    with torch.device("meta"):
        return timm.create_model(name, **arguments)


def _tagged(name: str, classes: int) -> str:
    """Add a tag whose weights have as many outputs, so that the number of outputs need not be given."""
    import timm

    tags = [n for n in timm.list_models(f"{name}.*", pretrained=True) if n.split(".")[0] == name]
    return next((n for n in tags if timm.get_pretrained_cfg(n).num_classes == classes), name)


# open_clip's own VisionTransformer


def _of_open_clip(visual: nn.Module) -> Architecture:
    import timm

    for part, there in (
        ("an attentional pooler", visual.attn_pool is not None),
        ("a pool of no tokens", visual.pool_type not in ("tok", "avg")),
    ):
        if there:
            raise ExportError(
                f"The format `timm`: the tower has {part}, which timm's VisionTransformer lacks; use open_clip, "
                "safetensors or onnx."
            )
    block = visual.transformer.resblocks[0]
    height, width = visual.image_size
    patch, classes = visual.patch_size[0], 0 if visual.proj is None else visual.proj.shape[1]
    act, average = activation(block.mlp.gelu), visual.pool_type == "avg"
    shapes = {n: tuple(t.shape) for n, t in _renamed(visual, _meta(visual)).items()}
    plain = not average and hasattr(visual.ln_pre, "weight") and height == width
    for name in timm.list_models(f"vit_*_patch{patch}_*clip*_{height}") if plain else ():
        known = _create(name, num_classes=classes)
        heads = known.blocks[0].attn.num_heads == block.attn.num_heads
        found = {n: tuple(t.shape) for n, t in known.state_dict().items()}
        if found == shapes and heads and activation(known.blocks[0].mlp.act) == act:
            return Architecture(_tagged(name, classes), {"num_classes": classes})
    arguments: dict[str, Any] = {
        "num_classes": classes,
        "img_size": [height, width],
        "patch_size": patch,
        "embed_dim": visual.conv1.out_channels,
        "depth": len(visual.transformer.resblocks),
        "num_heads": block.attn.num_heads,
        "mlp_ratio": block.mlp.c_fc.out_features / visual.conv1.out_channels,
        "act_layer": act,
    }
    if average:
        arguments |= {"global_pool": "avg", "fc_norm": bool(visual.final_ln_after_pool)}
    if not hasattr(visual.ln_pre, "weight"):
        arguments["pre_norm"] = False
    if hasattr(block.ls_1, "gamma"):
        arguments["init_values"] = 1.0
    return Architecture("vit_base_patch16_clip_224", arguments)


def _meta(visual: nn.Module) -> dict[str, Tensor]:
    return {n: t.to("meta") for n, t in visual.state_dict().items() if not bases.is_adapter(n)}


def _renamed(visual: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    norm = "fc_norm" if visual.pool_type == "avg" and visual.final_ln_after_pool else "norm"
    found: dict[str, Tensor] = {
        "cls_token": state["class_embedding"][None, None],
        "pos_embed": state["positional_embedding"][None],
        "patch_embed.proj.weight": state["conv1.weight"],
        f"{norm}.weight": state["ln_post.weight"],
        f"{norm}.bias": state["ln_post.bias"],
    }
    if "ln_pre.weight" in state:
        found |= {"norm_pre.weight": state["ln_pre.weight"], "norm_pre.bias": state["ln_pre.bias"]}
    else:  # without that norm, timm's patch embedding has a bias
        found["patch_embed.proj.bias"] = torch.zeros_like(state["class_embedding"])
    for name, tensor in state.items():
        if name.startswith("transformer.resblocks."):
            block, inner = name.removeprefix("transformer.resblocks.").split(".", 1)
            for old, new in _BLOCK.items():
                if inner.startswith(old):
                    found[f"blocks.{block}.{new}{inner.removeprefix(old)}"] = tensor
    if "proj" in state:
        found["head.weight"] = state["proj"].T.contiguous()
        found["head.bias"] = torch.zeros_like(found["head.weight"][:, 0])
    return found


# timm's own towers, alone or within open_clip's TimmModel


def _of_timm(visual: nn.Module) -> Architecture:
    trunk, head = getattr(visual, "trunk", visual), getattr(visual, "head", nn.Sequential())
    classes = trunk.num_classes
    if trunk is not visual:
        odd = [n for n, part in head.named_children() if n not in ("proj", "drop")]
        if odd or (classes and "proj" in dict(head.named_children())):
            raise ExportError(
                f"The format `timm`: after the tower comes open_clip's {', '.join(odd) or 'second projection'}, for "
                "which timm has no place; use open_clip, safetensors or onnx."
            )
        classes = head.proj.out_features if hasattr(head, "proj") else classes
    name = trunk.default_cfg["architecture"]
    arguments = _arguments(trunk, name)
    plain = not arguments
    return Architecture(
        _tagged(name, classes) if plain and classes else name, {"num_classes": classes, **arguments}
    )


def _arguments(trunk: nn.Module, name: str) -> dict[str, Any]:
    """Return the fewest arguments of `create_model` that give a trunk like this one."""
    pool = {"global_pool": trunk.global_pool}
    norm = {"fc_norm": not isinstance(trunk.fc_norm, nn.Identity)} if hasattr(trunk, "fc_norm") else {}
    attention = trunk.blocks[0].attn
    sizes = {
        "img_size": list(trunk.patch_embed.img_size),
        "patch_size": trunk.patch_embed.patch_size[0],
        "embed_dim": trunk.embed_dim,
        "depth": len(trunk.blocks),
        "num_heads": attention.num_heads,
    }
    resized = False
    for arguments in ({}, pool, pool | norm, sizes, sizes | pool, sizes | pool | norm):
        if "depth" not in arguments and resized:
            continue
        try:
            known = _create(name, num_classes=trunk.num_classes, **arguments)
        except (TypeError, ValueError, RuntimeError, AssertionError):
            continue  # this kind of tower has no such argument
        if bases.alike(known, trunk):
            return arguments
        resized = (len(known.blocks), known.embed_dim) != (len(trunk.blocks), trunk.embed_dim)
    raise ExportError(
        f"The format `timm`: `{name}` of timm is another tower than this one, whatever its sizes; use open_clip, "
        "safetensors or onnx."
    )
