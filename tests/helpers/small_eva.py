"""Small CLIPs whose towers are built as the authors' are (fused qkv, learned position, GELU), of any width and depth.

`register` makes timm and open_clip know one in this process.
"""

import json
import sys
import tempfile
from pathlib import Path

import open_clip
import timm
import torch
from timm.models.eva import Eva

TEXT = {"context_length": 8, "vocab_size": 100, "width": 32, "heads": 2, "layers": 1}


def register(
    width: int,
    depth: int,
    *,
    ratio: float = 4.0,
    heads: int = 2,
    post_norm: bool = False,
    image_size: int = 28,
) -> str:
    """Make such a CLIP known; returns open_clip's name of it."""
    name = f"test_eva_{width}_{depth}{'_post' if post_norm else ''}"

    def build(pretrained: bool = False, img_size: int = image_size, num_classes: int = 0, **_) -> Eva:
        tower = Eva(
            img_size=img_size,
            patch_size=14,
            embed_dim=width,
            depth=depth,
            num_heads=heads,
            mlp_ratio=ratio,
            num_classes=num_classes,
            global_pool="token",
            use_post_norm=post_norm,
        )
        tower.pretrained_cfg = tower.default_cfg = {"architecture": name, "num_classes": num_classes}
        return tower

    build.__name__ = name
    build.__module__ = __name__
    if not timm.is_model(name):
        sys.modules[__name__].__dict__.setdefault("__all__", [])
        timm.models.register_model(build)
    vision = {"timm_model_name": name, "timm_pool": "token", "timm_proj": None, "image_size": image_size}
    config = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": TEXT, "custom_text": True}
    path = Path(tempfile.mkdtemp()) / f"{name}.json"
    path.write_text(json.dumps(config))
    open_clip.add_model_config(path)
    return name


def draw(name: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """A whole CLIP's weights by open_clip's names, all random: biases and norms too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        shapes = open_clip.create_model(name, load_weights=False, device="meta").state_dict()
    tensors = {}
    for key, value in shapes.items():
        drawn = torch.randn(value.shape, generator=generator)
        tensors[key] = 1 + 0.1 * drawn if "norm" in key and key.endswith("weight") else 0.1 * drawn
    return tensors


def draw_lora(width: int, depth: int, rank: int = 4, seed: int = 1) -> dict[str, torch.Tensor]:
    """LoRA in the authors' layout."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for i in range(depth):
        name = f"visual.blocks.{i}.attn.qkv.lora_"
        tensors[f"{name}A"] = 0.3 * torch.randn(2 * rank, width, generator=generator)
        tensors[f"{name}B"] = 0.3 * torch.randn(2 * width, rank, generator=generator)
    return tensors


def merged(base: dict[str, torch.Tensor], lora: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What checkpoint_layout says, in double precision: q += (1 / r) B_q A_q, k += 0, v += (1 / r) B_v A_v."""
    out = dict(base)
    for i in range(sum(name.endswith("lora_A") for name in lora)):
        a, b = (lora[f"visual.blocks.{i}.attn.qkv.lora_{k}"].double() for k in "AB")
        rank, width = len(a) // 2, a.shape[1]
        name = f"visual.trunk.blocks.{i}.attn.qkv.weight"
        weight = base[name].double().clone()
        weight[:width] += b[:width] @ a[:rank] / rank
        weight[2 * width :] += b[width:] @ a[rank:] / rank
        out[name] = weight
    return out


def eva_clip_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same weights under the names of EVA-CLIP's files."""
    return {name.replace("visual.trunk.", "visual."): tensor for name, tensor in tensors.items()}


def bare_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tower alone under timm's names, as `eva_vit_g.pth`."""
    trunk = "visual.trunk."
    return {name.removeprefix(trunk): t for name, t in tensors.items() if name.startswith(trunk)}
