"""Exports of LoRA alone: in our layout, in the authors', and (in `peft_folder`) in peft's."""

import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor

from visft.checkpoint import authors
from visft.checkpoint.run_folder import describe_base
from visft.errors import ExportError
from visft.export import card, peft_folder, place, verification, writing
from visft.export.source import untouched
from visft.export.writing import Export
from visft.modeling.backbone import CLIPViT
from visft.modeling.backbone import lora as adapters

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
    """Write only LoRA.

    Args:
        model: with LoRA, merged or not. It is not changed.
        path: `.safetensors`; for the authors' layout also `.pt`, which their code reads. For peft, a folder.
        base: the whole CLIP, as for `export.open_clip`. Only peft's layout needs it.
        layout: `visft`: our names, with rank, alpha and base in the header. `authors`: q and v of every block under the
            released files' names, scaled so that the factor 1 / rank of their code is right. `peft`: an adapter folder
            for the tower in transformers.
        interpolate: a factor on the update.
        facts: what the model card says about the origin of the weights.

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
    updates = {
        f"{site.block}.{site.projection.key}": interpolate * site.adapter.delta().cpu()
        for site in adapters.sites(model)
    }
    task = {"layout": layout, "scaling": config.alpha / config.rank}
    content, use, metadata = _described(model, layout, path)
    export = Export(
        reader="lora",
        tensors=_ours(model, interpolate) if layout == "visft" else _theirs(model, path, interpolate),
        library="visft",
        content=content,
        use=use,
        metadata=metadata,
    )
    source = untouched(model, interpolate)
    return writing.write(
        path, source, export, facts, lambda file: verification.run_updates(file, updates, task)
    )


def _described(model: CLIPViT, layout: str, path: Path) -> tuple[str, str, dict[str, str]]:
    """Return what the card says about content and use, and the metadata of the file."""
    merging = (
        f"# merged into the base's weights, on the command line:\n# tools/export_backbone.py --weights {path.name} "
        "--format open_clip --output tower.safetensors MODEL.CLIP_VIT.PRETRAINED BASE\n"
    )
    if layout == "authors":
        content = "LoRA alone, q and v of every block, in the layout of the files released with the paper"
        return content, f"{merging}# each holds q above v; the update is B A / rank", {"format": "pt"}
    config = model.lora_config
    settings = {key: getattr(config, key) for key in ("rank", "alpha", "targets", "last_blocks")}
    about = {"stage": "lora", "base": describe_base(model.base), "settings": {"lora": settings}}
    use = (
        f"{merging}from visft.modeling.backbone import CLIPViT, lora\nfrom visft.checkpoint import load\n\n"
        "backbone = lora.inject(CLIPViT.from_open_clip(NAME, BASE), rank=RANK, alpha=ALPHA)\n"
        f'load.load_tower(backbone, "{path.name}")'
    )
    return "LoRA alone, in visft's layout", use, {"format": "pt", "visft": json.dumps(about)}


def _ours(model: CLIPViT, interpolate: float) -> dict[str, Tensor]:
    tensors = {f"backbone.{name}": tensor.detach() for name, tensor in adapters.state_dict(model).items()}
    return {name: t * (interpolate if name.endswith("lora_B") else 1) for name, t in tensors.items()}


def _theirs(model: CLIPViT, path: Path, interpolate: float) -> dict[str, Tensor]:
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
            interpolate * site.adapter.lora_B.detach(),
        )
        for site in adapters.sites(model)
    }
    return authors.join_lora(pairs, config.rank, config.alpha, len(model.blocks), model.embed_dim)
