"""open_clip: the complete CLIP in one safetensors file, its configuration beside it."""

import json
import logging
import os
from pathlib import Path

from torch import nn

from visft.checkpoint.files import folder_aside, write_json, write_safetensors
from visft.export import card, place, verification
from visft.export.source import Source, clip_state, open_clip_preprocess, resolve
from visft.modeling.backbone import CLIPViT

logger = logging.getLogger(__name__)

CONFIG_NAME = "open_clip_config.json"
CONTENT = "the whole CLIP: vision tower, text tower, projections and scales"


def write(
    model: CLIPViT,
    path: str | os.PathLike,
    *,
    base: nn.Module | str | os.PathLike | None = None,
    interpolate: float = 1.0,
    facts: card.Facts | None = None,
) -> Path:
    """Write the complete CLIP, its vision tower tuned, as one safetensors file that open_clip loads by its path.

    `open_clip_config.json` is written beside it, so that `open_clip.create_model("local-dir:FOLDER")` needs no name,
    and a model card under the file's name. The text tower and all else is the base's. Patch and position embedding have
    the base's shapes: resampling to other strides and sizes happens in a CLIPViT's forward and is no part of its
    weights.

    Args:
        model: with LoRA, merged or not, or without. It is left as it is.
        path: ends in `.safetensors`. What is there is replaced after the check alone.
        base: the whole CLIP: an open_clip model, a file, or a tag. None: what `from_open_clip` remembers.
        interpolate: 1 is the tuned tower, 0 the base's, in between a mixture of the weights (arXiv:2109.01903).
        facts: what the model card says of how the weights came to be.

    Returns:
        The path.

    Raises:
        ExportError: no base; the base is of another architecture; open_clip, in a process of its own, does not load the
            file, computes other embeddings than the model or prepares images otherwise.
    """
    path = place.file(path, ".safetensors")
    source = resolve(model, base, interpolate, whole=True)
    place.refuse_other(path.parent / CONFIG_NAME, "model_cfg", source.config)
    with folder_aside(path) as folder:
        check = _write_aside(source, folder, path.name)
        about = card.text(
            source,
            facts or card.Facts(),
            check,
            library="open_clip",
            content=CONTENT,
            use=use(source.name, path),
        )
        card.publish(folder, path, about, CONFIG_NAME)
    others = sorted(file.name for file in path.parent.glob("*.safetensors") if file != path)
    if others:
        logger.info("%s has other weights beside it (%s): load it by its path", path, ", ".join(others[:3]))
    check.log(path)
    return path


def use(name: str, path: Path) -> str:
    """Python that loads the file."""
    return (
        "import open_clip\n\nmodel, transform = open_clip.create_model_from_pretrained("
        f'"{name}", pretrained="{path.name}")\n'
        '# or, from the folder alone: open_clip.create_model_from_pretrained("local-dir:FOLDER")'
    )


def _write_aside(source: Source, folder: Path, name: str) -> verification.Check:
    state = clip_state(source)
    write_safetensors(folder / name, state, {"format": "pt"})
    config = {"model_cfg": source.config, "preprocess_cfg": open_clip_preprocess(source)}
    write_json(folder / CONFIG_NAME, json.loads(json.dumps(config)))
    verification.stored(folder / name, state)
    return verification.run(
        "open_clip", folder, source.embed, source.preprocess, clip=source.clip, pixels=verification.EXACT
    )
