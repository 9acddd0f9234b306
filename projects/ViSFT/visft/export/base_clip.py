"""The base CLIP of an export, which supplies everything but the tuned tower, and its architecture in open_clip."""

import os
from typing import Any

import torch
from torch import nn

from visft.errors import ExportError
from visft.modeling.backbone import CLIPViT, open_clip_models


def whole_clip(
    model: CLIPViT, base: nn.Module | str | os.PathLike | None
) -> tuple[nn.Module, str, dict[str, Any]]:
    """Return the whole base, the name of its architecture in open_clip, and open_clip's config of it.

    Args:
        base: an open_clip model, a file or a tag. None: the one that `from_open_clip` recorded.

    Raises:
        ExportError: there is no base, or it is not a whole CLIP of an architecture that open_clip knows.
    """
    name = model.base.name if model.base is not None else None
    if base is None:
        if name is None:
            raise ExportError(
                "The model is a bare tower and the format needs the whole CLIP; pass base=: an open_clip model, a "
                "weight file or a tag."
            )
        clip = model.base_clip()
    elif isinstance(base, nn.Module):
        if not hasattr(base, "visual"):
            raise ExportError(
                f"base is a {type(base).__name__} without `visual`; pass a whole open_clip model."
            )
        clip = base
        if not (name and _fits(name, clip)):
            name = next((n for n in _names(clip.visual) if _fits(n, clip)), None)
    else:
        clip, name = _built(model, os.fspath(base), name)
    if name is None:
        raise ExportError(
            "The base is no architecture that open_clip knows by name; register it with "
            "open_clip.add_model_config."
        )
    return clip, name, open_clip_models.open_clip().get_model_config(name)


def named_tower(tower: nn.Module) -> str | None:
    """Return the name of an open_clip architecture with a vision tower like this one, or None."""
    return next((n for n in _names(tower) if alike(open_clip_models.meta_tower(n), tower)), None)


def alike(left: nn.Module, right: nn.Module) -> bool:
    """Whether two modules have the same submodules, shapes and settings. Weights do not matter."""
    return _shapes(left) == _shapes(right) and _kinds(left) == _kinds(right)


def is_adapter(name: str) -> bool:
    """Whether this is the name of a LoRA tensor."""
    return name.endswith((".lora_A", ".lora_B"))


def _built(model: CLIPViT, base: str, name: str | None) -> tuple[nn.Module, str]:
    """Build a CLIP from a tag or file: of the model's architecture or, if unknown, of one with such a tower."""
    names = (
        [name]
        if name
        else [n for n in _names(model.tower) if alike(open_clip_models.meta_tower(n), model.tower)]
    )
    faults = [f"no architecture of open_clip has this tower ({type(model.tower).__name__})"]
    for candidate in names:
        try:
            return open_clip_models.create_clip(candidate, base)[0], candidate
        except Exception as error:
            faults.append(str(error))
    raise ExportError(f"base `{base}`: {faults[-1]}")


def _names(tower: nn.Module) -> list[str]:
    """Architectures that may have this tower, judged by the sizes in their configs, which is cheap."""
    module, names = open_clip_models.open_clip(), []
    trunk = getattr(tower, "trunk", tower)
    timm_name = (getattr(trunk, "default_cfg", None) or {}).get("architecture")
    for name in module.list_models():
        vision = module.get_model_config(name)["vision_cfg"]
        if "timm_model_name" in vision:
            found = vision["timm_model_name"].split(".")[0] == timm_name
        else:
            width, depth = vision.get("width", 768), vision.get("layers", 12)
            conv, blocks = getattr(tower, "conv1", None), getattr(tower, "transformer", None)
            found = conv is not None and (width, depth) == (conv.out_channels, len(blocks.resblocks))
        if found:
            names.append(name)
    return names


def _fits(name: str, clip: nn.Module) -> bool:
    """Whether a CLIP has this architecture, judged by the config and by all names and shapes."""
    module = open_clip_models.open_clip()
    config = module.get_model_config(name)
    if config["embed_dim"] != _embed_dim(clip) or "hf_model_name" in config["text_cfg"]:
        return False
    if not alike(open_clip_models.meta_tower(name), clip.visual):
        return False
    with torch.device("meta"):
        other = module.create_model(name, load_weights=False, pretrained_text=False, device="meta")
    return type(other) is type(clip) and alike(other, clip)


def _embed_dim(clip: nn.Module) -> int | None:
    projection = getattr(getattr(clip, "text", clip), "text_projection", None)
    if isinstance(projection, nn.Linear):
        return projection.out_features
    return None if projection is None else projection.shape[1]


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {n: tuple(t.shape) for n, t in module.state_dict().items() if not is_adapter(n)}


def _kinds(module: nn.Module) -> dict[str, Any]:
    """Classes and plain settings of all submodules, which shapes do not show (activations, pooling, image size)."""
    plain = (bool, int, float, str, tuple, type(None))
    found: dict[str, Any] = {}
    for name, part in module.named_modules():
        # Dropout of any kind has no effect in evaluation mode.
        if ".lora" not in f".{name}" and "drop" not in name.rpartition(".")[2]:
            settings = {k: v for k, v in vars(part).items() if isinstance(v, plain) and k[0] != "_"}
            for changing in ("training", "image_mean", "image_std", "output_dict"):
                settings.pop(changing, None)
            found[name] = (type(part).__name__, settings)
    return found
