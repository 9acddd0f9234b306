"""LoRA alone: our layout, the authors', and (in `peft_folder`) peft's."""

import json
import logging
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visft.checkpoint import authors
from visft.checkpoint.files import folder_aside, write_safetensors
from visft.checkpoint.run_folder import describe_base
from visft.errors import ExportError
from visft.export import card, peft_folder, place, verification
from visft.export.source import untouched
from visft.modeling.backbone import CLIPViT
from visft.modeling.backbone import lora as adapters

logger = logging.getLogger(__name__)

LAYOUTS = ("visft", "authors", "peft")


def write(
    model: CLIPViT,
    path: str | os.PathLike,
    *,
    base: Any = None,
    layout: str = "visft",
    interpolate: float = 1.0,
    facts: card.Facts | None = None,
) -> Path:
    """Write LoRA alone.

    Args:
        model: with LoRA, merged or not. It is left as it is.
        path: `.safetensors`; for the authors' layout also `.pt`, which their code reads; for peft a folder.
        base: the whole CLIP, as for `export.open_clip`; asked for by peft's layout alone.
        layout: `visft`: our names, with rank, alpha and base in the header. `authors`: q and v of every block under the
            released files' names, scaled so that the factor 1 / rank of their code is right. `peft`: an adapter folder
            for the tower in transformers.
        interpolate: a factor on the update.
        facts: what the model card says of how the weights came to be.

    Returns:
        The path.

    Raises:
        ExportError: no LoRA; an unknown layout; a tower or targets that the layout has no place for; the file, read in
            a process of its own, holds other updates.
    """
    if layout not in LAYOUTS:
        raise ExportError(f"{path}: there is no LoRA layout `{layout}`; choose {', '.join(LAYOUTS)}.")
    if not adapters.has_lora(model):
        raise ExportError(f"{path}: there is no LoRA in the model to be written; export another format.")
    if layout == "peft":
        return peft_folder.write(model, path, base=base, interpolate=interpolate, facts=facts)
    path = place.file(path, *((".pt", ".safetensors") if layout == "authors" else (".safetensors",)))
    if not 0 <= interpolate <= 1:
        raise ExportError(f"interpolate is {interpolate:g}; expected 0 (no update) to 1 (all of it).")
    config = model.lora_config
    if layout == "authors":
        tensors = _authors_lora(model, path, interpolate)
    else:
        tensors = {f"backbone.{name}": tensor for name, tensor in adapters.state_dict(model).items()}
        tensors = {n: t.detach() * (interpolate if n.endswith("lora_B") else 1) for n, t in tensors.items()}
    with folder_aside(path) as folder:
        if path.suffix == ".pt":
            torch.save({name: tensor.cpu() for name, tensor in tensors.items()}, folder / path.name)
        else:
            about = {"visft": json.dumps(_about(model))} if layout == "visft" else {}
            write_safetensors(folder / path.name, tensors, {"format": "pt", **about})
        verification.stored(folder / path.name, tensors)
        updates = {
            f"{site.block}.{site.projection.key}": interpolate * site.adapter.delta().cpu()
            for site in adapters.sites(model)
        }
        task = {"layout": layout, "scaling": config.alpha / config.rank}
        check = verification.run_updates(folder / path.name, updates, task)
        content, use = _use(layout, path)
        source = untouched(model, interpolate)
        text = card.text(source, facts or card.Facts(), check, library="visft", content=content, use=use)
        card.publish(folder, path, text)
    check.log(path)
    return path


def _about(model: CLIPViT) -> dict[str, Any]:
    config = model.lora_config
    settings = {
        "rank": config.rank,
        "alpha": config.alpha,
        "targets": list(config.targets),
        "last_blocks": config.last_blocks,
    }
    return {"stage": "lora", "base": describe_base(model.base), "settings": {"lora": settings}}


def _use(layout: str, path: Path) -> tuple[str, str]:
    merging = (
        f"# merged into the base's weights, on the command line:\n# tools/export_backbone.py --weights {path.name} "
        "--format open_clip --output tower.safetensors MODEL.CLIP_VIT.PRETRAINED BASE\n"
    )
    if layout == "authors":
        return (
            "LoRA alone, q and v of every block, in the layout of the files released with the paper",
            f"{merging}# each holds q above v; the update is B A / rank",
        )
    return (
        "LoRA alone, in visft's layout",
        f"{merging}from visft.modeling.backbone import CLIPViT, lora\nfrom visft.checkpoint import load\n\n"
        "backbone = lora.inject(CLIPViT.from_open_clip(NAME, BASE), rank=RANK, alpha=ALPHA)\n"
        f'load.load_tower(backbone, "{path.name}")',
    )


def _authors_lora(model: CLIPViT, path: Path, interpolate: float) -> dict[str, Tensor]:
    config = model.lora_config
    fused = all(getattr(block.attn, "qkv", None) is not None for block in model.blocks)
    if set(config.targets) != {"q", "v"} or not fused:
        raise ExportError(
            f"{path}: the authors' layout holds q and v of fused qkv projections as EVA-g and EVA-E have; the model "
            f"has LoRA on {', '.join(config.targets)} of {type(model.blocks[0].attn).__name__}: use the format `lora`."
        )
    pairs = {
        (site.block, site.projection.key): (
            site.adapter.lora_A.detach(),
            site.adapter.lora_B.detach() * interpolate,
        )
        for site in adapters.sites(model)
    }
    return authors.join_lora(pairs, config.rank, config.alpha, len(model.blocks), model.embed_dim)
