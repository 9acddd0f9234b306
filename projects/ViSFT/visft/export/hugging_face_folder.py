"""Hugging Face: a folder that the CLIP or SigLIP classes of transformers load."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from visft.checkpoint import hugging_face_base
from visft.checkpoint.files import write_json, write_safetensors
from visft.errors import ExportError
from visft.export import card, hugging_face_text, place, verification, writing
from visft.export.hugging_face_text import ACTIVATIONS
from visft.export.source import Source, resolve
from visft.export.timm_file import activation
from visft.export.writing import Export
from visft.modeling.backbone import CLIPViT

WEIGHTS, CONFIG = "model.safetensors", "config.json"
_SIGLIP = {
    r"^patch_embed\.proj\b": "embeddings.patch_embedding",
    r"^pos_embed$": "embeddings.position_embedding.weight",
    r"^norm\b": "post_layernorm",
    r"^blocks\b": "encoder.layers",
    r"\.norm([12])\b": r".layer_norm\1",
    r"\.attn\.([qkv])\b": r".self_attn.\1_proj",
    r"\.attn\.proj\b": ".self_attn.out_proj",
    r"^attn_pool\.latent$": "head.probe",
    r"^attn_pool\.in_proj_": "head.attention.in_proj_",
    r"^attn_pool\.proj\b": "head.attention.out_proj",
    r"^attn_pool\.norm\b": "head.layernorm",
    r"^attn_pool\.mlp\b": "head.mlp",
}
"""Replacements, in this order, that turn timm's VisionTransformer names into names of SigLIP in transformers."""


@dataclass(frozen=True)
class Converted:
    """A transformers model: the `classes` that load it (the first is its own), config and tensors."""

    classes: tuple[str, ...]
    config: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def has_text(self) -> bool:
        """Whether it includes the text encoder."""
        return "text_config" in self.config


def write(
    model: CLIPViT,
    path: str | os.PathLike,
    *,
    base: nn.Module | str | os.PathLike | None = None,
    interpolate: float = 1.0,
    facts: card.Facts | None = None,
) -> Path:
    """Write a folder for `from_pretrained` of transformers: config, weights, preprocessing and model card.

    open_clip's own towers become a `CLIPModel` (which `CLIPVisionModelWithProjection` loads too), SigLIP's a
    `SiglipModel`, each with the base's text tower. Without a base, or where transformers lacks such a text tower, it is
    the vision tower alone. Files of other names in the folder stay.

    Args:
        model, interpolate, facts: as `export.open_clip`.
        path: the folder.
        base: as `export.open_clip`; may be missing for a bare tower.

    Raises:
        ExportError: transformers has no such tower (EVA, CoCa, PE-Core...). Or transformers, in a fresh process, cannot
            load the folder, computes other embeddings or prepares images differently.
    """
    path = place.folder(path)
    place.require("hf", "transformers")
    fits(model.tower)
    source = resolve(model, base, interpolate, whole=base is not None or model.base is not None)
    converted = convert(source)
    name = converted.classes[-1]
    export = Export(
        reader="hugging_face",
        tensors=converted.tensors,
        library="transformers",
        content="the whole CLIP" if converted.has_text else "the vision tower alone",
        use=f"from transformers import AutoImageProcessor, {name}\n\n"
        f'model = {name}.from_pretrained("FOLDER")\n'
        'processor = AutoImageProcessor.from_pretrained("FOLDER")',
        weights=WEIGHTS,
        described=(CONFIG, converted.config),
        fill=lambda folder: _put_rest(folder, source, converted),
        task={"classes": converted.classes, **hugging_face_text.sentences(source, converted.has_text)},
        texts=converted.has_text,
        pixels=verification.SIMILAR,
    )
    return writing.write(path, source, export, facts)


def put_model(folder: Path, source: Source, converted: Converted) -> None:
    """Write the files of a model into a new folder.

    Raises:
        ExportError: transformers cannot prepare images this way.
    """
    folder.mkdir()
    write_safetensors(folder / WEIGHTS, converted.tensors, {"format": "pt"})
    write_json(folder / CONFIG, converted.config)
    _put_rest(folder, source, converted)


def _put_rest(folder: Path, source: Source, converted: Converted) -> None:
    write_json(folder / "preprocessor_config.json", _processor(source, converted))
    if converted.has_text:
        hugging_face_text.put_tokenizer(folder, source)


def fits(visual: nn.Module) -> None:
    """Raise ExportError, with the reason, unless transformers has such a tower. Weights do not matter."""
    reason = _clip_lacks(visual) if hasattr(visual, "transformer") else _siglip_lacks(visual)
    if reason:
        raise ExportError(
            f"The formats `hf` and `peft`: transformers' CLIP and SigLIP towers have no place for {reason}; use "
            "open_clip, timm, safetensors or onnx."
        )


def convert(source: Source) -> Converted:
    """The tower, with the base's text encoder if it fits, in the layout of transformers.

    Raises:
        ExportError: as `fits`.
    """
    visual = source.visual
    fits(visual)
    kind = "clip" if hasattr(visual, "transformer") else "siglip"
    config, tensors = (_clip_vision if kind == "clip" else _siglip_vision)(visual, source.state)
    text = hugging_face_text.convert(kind, source.clip)
    config = {"model_type": f"{kind}_vision_model", **config}
    if text is None:
        alone = "CLIPVisionModelWithProjection" if kind == "clip" else "SiglipVisionModel"
        return Converted((alone,), {"architectures": [alone], **config}, tensors)
    classes = ("CLIPModel", "CLIPVisionModelWithProjection") if kind == "clip" else ("SiglipModel",)
    whole: dict[str, Any] = {"architectures": [classes[0]], "model_type": kind}
    if kind == "clip":
        whole["projection_dim"] = config["projection_dim"]
    text_config, text_tensors = text
    whole |= {
        "text_config": {"model_type": f"{kind}_text_model", **text_config},
        "vision_config": config,
    }
    return Converted(classes, whole, tensors | text_tensors)


def layer_scales(state: dict[str, Tensor], block: int) -> tuple[Tensor | None, Tensor | None]:
    """Return the LayerScale after attention and MLP of an open_clip block. CLIP in transformers has none, so it is
    multiplied into the weights."""
    name = f"transformer.resblocks.{block}"
    return state.get(f"{name}.ls_1.gamma"), state.get(f"{name}.ls_2.gamma")


def _processor(source: Source, converted: Converted) -> dict[str, Any]:
    preprocess, (height, width) = source.preprocess, source.preprocess["size"]
    mode = preprocess["resize_mode"]
    if mode == "longest":
        raise ExportError(
            "The format `hf`: the tower's images are padded (resize_mode `longest`), which transformers' CLIP "
            "processors do not do; use open_clip."
        )
    squash = {"height": height, "width": width}
    clip = converted.config["model_type"].startswith("clip")
    found = {
        "image_processor_type": "CLIPImageProcessor" if clip else "SiglipImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": height} if mode == "shortest" else squash,
        "resample": {"bilinear": 2, "bicubic": 3}[preprocess["interpolation"]],
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": preprocess["mean"],
        "image_std": preprocess["std"],
    }
    if clip:
        found |= {"do_center_crop": mode == "shortest", "crop_size": squash}
    elif mode == "shortest":
        # SigLIP's own processor cannot crop.
        found |= {
            "image_processor_type": "CLIPImageProcessor",
            "do_center_crop": True,
            "crop_size": squash,
        }
    return found


# open_clip's own VisionTransformer as CLIP


def _clip_lacks(visual: nn.Module) -> str | None:
    blocks = visual.transformer.resblocks
    if visual.attn_pool is not None:
        return "an attentional pooler (CoCa's)"
    if visual.pool_type != "tok":
        return "averaged tokens (CLIPA's)"
    if not hasattr(visual.ln_pre, "weight"):
        return "a tower without a norm before the blocks"
    if visual.proj is None:
        return "a tower without a projection to the embedding"
    if visual.image_size[0] != visual.image_size[1]:
        return f"images of {visual.image_size[0]} x {visual.image_size[1]} pixels (they are square)"
    if len({norm.eps for norm in (visual.ln_pre, visual.ln_post, blocks[0].ln_1, blocks[0].ln_2)}) > 1:
        return "norms with several epsilons"
    if activation(blocks[0].mlp.gelu) not in ACTIVATIONS:
        return f"the activation {type(blocks[0].mlp.gelu).__name__}"
    return None


def _clip_vision(visual: nn.Module, state: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    block = visual.transformer.resblocks[0]
    config = {
        "hidden_size": visual.conv1.out_channels,
        "intermediate_size": block.mlp.c_fc.out_features,
        "projection_dim": visual.proj.shape[1],
        "num_hidden_layers": len(visual.transformer.resblocks),
        "num_attention_heads": block.attn.num_heads,
        "image_size": visual.image_size[0],
        "patch_size": visual.patch_size[0],
        "hidden_act": ACTIVATIONS[activation(block.mlp.gelu)],
        "layer_norm_eps": visual.ln_post.eps,
    }
    state = dict(state)
    for i in range(config["num_hidden_layers"]):
        for inner, scale in zip(("attn.out_proj", "mlp.c_proj"), layer_scales(state, i), strict=True):
            if scale is not None:
                name = f"transformer.resblocks.{i}.{inner}"
                state[f"{name}.weight"] = scale[:, None] * state[f"{name}.weight"]
                state[f"{name}.bias"] = scale * state[f"{name}.bias"]
    return config, hugging_face_base.from_open_clip({f"visual.{n}": t for n, t in state.items()})


# timm's VisionTransformer with its attention pool, as SigLIP


def _siglip_lacks(visual: nn.Module) -> str | None:
    trunk = getattr(visual, "trunk", visual)
    if type(trunk).__name__ != "VisionTransformer":
        return f"timm's {type(trunk).__name__} (EVA's and PE-Core's towers)"
    pool, block = getattr(trunk, "attn_pool", None), trunk.blocks[0]
    if pool is None or trunk.global_pool != "map":
        return f"timm's VisionTransformer with the pool `{trunk.global_pool}`"
    if trunk.num_prefix_tokens or trunk.num_classes or hasattr(getattr(visual, "head", None), "proj"):
        return "class tokens or a projection in a tower with an attention pool"
    lacking = {
        "several latents in the attention pool": pool.latent_len != 1 or pool.pool != "token",
        "positions in the attention pool": pool.pos_embed is not None,
        "a pool without its own query": isinstance(pool.q, nn.Identity) or pool.mlp is None,
        "norms of queries and keys": not isinstance(pool.q_norm, nn.Identity)
        or hasattr(block.attn.q_norm, "weight"),
        "LayerScale": hasattr(block.ls1, "gamma"),
        "a norm before the blocks": hasattr(trunk.norm_pre, "weight"),
        "several activations": activation(block.mlp.act) != activation(pool.mlp.act),
        "several numbers of heads": block.attn.num_heads != pool.num_heads,
        "another width of the pool's MLP": block.mlp.fc1.out_features != pool.mlp.fc1.out_features,
        f"the activation {type(block.mlp.act).__name__}": activation(block.mlp.act) not in ACTIVATIONS,
        "images that are not square": trunk.patch_embed.img_size[0] != trunk.patch_embed.img_size[1],
    }
    return next((what for what, there in lacking.items() if there), None)


def _siglip_vision(visual: nn.Module, state: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    trunk = getattr(visual, "trunk", visual)
    block = trunk.blocks[0]
    state = {name.removeprefix("trunk."): tensor for name, tensor in state.items()}
    config = {
        "hidden_size": trunk.embed_dim,
        "intermediate_size": block.mlp.fc1.out_features,
        "num_hidden_layers": len(trunk.blocks),
        "num_attention_heads": block.attn.num_heads,
        "image_size": trunk.patch_embed.img_size[0],
        "patch_size": trunk.patch_embed.patch_size[0],
        "hidden_act": ACTIVATIONS[activation(block.mlp.act)],
        "layer_norm_eps": trunk.norm.eps,
    }
    for part in ("weight", "bias"):
        parts = [state.pop(f"attn_pool.{name}.{part}") for name in ("q", "kv")]
        state[f"attn_pool.in_proj_{part}"] = torch.cat(parts)
        for i in range(len(trunk.blocks)):
            rows = state.pop(f"blocks.{i}.attn.qkv.{part}").chunk(3)
            state |= {f"blocks.{i}.attn.{q}.{part}": tensor for q, tensor in zip("qkv", rows, strict=True)}
    state["pos_embed"] = state["pos_embed"][0]
    return config, {f"vision_model.{_siglip_name(name)}": tensor for name, tensor in state.items()}


def _siglip_name(name: str) -> str:
    """Return the name in transformers of a tensor of timm's trunk."""
    for old, new in _SIGLIP.items():
        name = re.sub(old, new, name)
    return name
