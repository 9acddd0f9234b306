"""open_clip: the whole CLIP in one safetensors file, with its config beside it."""

import logging
import os
from pathlib import Path

from torch import nn

from visft.export import card, place, verification, writing
from visft.export.source import Source, resolve
from visft.export.writing import Export
from visft.modeling.backbone import CLIPViT

logger = logging.getLogger(__name__)


def write(
    model: CLIPViT,
    path: str | os.PathLike,
    *,
    base: nn.Module | str | os.PathLike | None = None,
    interpolate: float = 1.0,
    facts: card.Facts | None = None,
) -> Path:
    """Write the whole CLIP, with the tuned vision tower, as one safetensors file that open_clip loads by its path.

    `open_clip_config.json` is written beside it, so that `open_clip.create_model("local-dir:FOLDER")` needs no name,
    and a model card under the file's name. The text tower and all else is the base's. Patch and position embedding have
    the base's shapes: resampling to other strides and sizes happens in a CLIPViT's forward and is no part of its
    weights.

    Args:
        model: with LoRA, merged or not, or without LoRA. It is not changed.
        path: ends in `.safetensors`. An existing file is replaced only after the check.
        base: the whole CLIP: an open_clip model, a file, or a tag. None: the one that `from_open_clip` recorded.
        interpolate: 1: the tuned weights, 0: the base's; values between mix the weights (arXiv:2109.01903).
        facts: what the model card says about the origin of the weights.

    Returns:
        The path.

    Raises:
        ExportError: no base; the base is of another architecture; open_clip, in a process of its own, does not load the
            file, computes other embeddings than the model or prepares images otherwise.
    """
    path = place.file(path, ".safetensors")
    source = resolve(model, base, interpolate, whole=True)
    writing.write(path, source, plan(source, path), facts)
    others = sorted(file.name for file in path.parent.glob("*.safetensors") if file != path)
    if others:
        logger.info("%s has other weights beside it (%s): load it by its path", path, ", ".join(others[:3]))
    return path


def plan(source: Source, path: Path) -> Export:
    """Return what will be written to a path."""
    preprocess = {key: source.preprocess[key] for key in ("mean", "std", "interpolation", "resize_mode")}
    return Export(
        reader="open_clip",
        tensors=source.outside | {f"visual.{name}": tensor for name, tensor in source.state.items()},
        library="open_clip",
        content="the whole CLIP: vision tower, text tower, projections and scales",
        use="import open_clip\n\nmodel, transform = open_clip.create_model_from_pretrained("
        f'"{source.name}", pretrained="{path.name}")\n'
        '# or, from the folder alone: open_clip.create_model_from_pretrained("local-dir:FOLDER")',
        described=("open_clip_config.json", {"model_cfg": source.config, "preprocess_cfg": preprocess}),
        owner="model_cfg",
        texts=True,
        pixels=verification.EXACT,
    )
