"""safetensors: only the vision tower, under open_clip's `visual.*` names."""

import json
import os
from pathlib import Path

from torch import nn

from visft.errors import ExportError
from visft.export import base_clip as bases
from visft.export import card, place, timm_file, writing
from visft.export.source import Source, resolve
from visft.export.writing import Export
from visft.modeling.backbone import CLIPViT, open_clip_models


def write(
    model: CLIPViT,
    path: str | os.PathLike,
    *,
    base: nn.Module | str | os.PathLike | None = None,
    interpolate: float = 1.0,
    facts: card.Facts | None = None,
) -> Path:
    """Write only the vision tower: the tensors below `visual` in open_clip's model, with `visual.` before each name.

    Preprocessing (mean, std, size, interpolation) is in the file's header, as JSON under `preprocess`.

    Args:
        model, path, interpolate, facts: as `export.open_clip`.
        base: needed only if the base's weights are (for a mixture, or a model in 16 bits) and the model does not know
            its base.

    Raises:
        ExportError: neither open_clip nor timm has such a tower, or it, in a process of its own, does not load the file
            strictly or computes other embeddings.
    """
    path = place.file(path, ".safetensors")
    source = resolve(model, base, interpolate, whole=False)
    return writing.write(path, source, plan(source, path), facts)


def plan(source: Source, path: Path) -> Export:
    """Return what will be written to a path.

    Raises:
        ExportError: neither open_clip nor timm has such a tower.
    """
    # A timm tower outside of open_clip's wrapper has the names below `trunk`.
    prefix = "visual.trunk." if hasattr(source.visual, "blocks") else "visual."
    builder = _builder(source)
    return Export(
        reader="safetensors",
        tensors={prefix + name: tensor for name, tensor in source.state.items()},
        library="open_clip",
        content="the vision tower alone, under open_clip's names (`visual.*`)",
        use="import open_clip\nfrom safetensors.torch import load_file\n\n"
        f'model = open_clip.create_model("{source.name or "NAME"}")\n'
        f'model.load_state_dict(load_file("{path.name}"), strict=False)  # the text tower is not in it',
        metadata={"format": "pt", "preprocess": json.dumps(source.preprocess)},
        task=builder,
    )


def _builder(source: Source) -> dict:
    """Return what the reader builds the tower from."""
    name = source.name or bases.named_tower(source.model.tower)
    if name is not None:
        source.name = name
        return {"config": open_clip_models.open_clip().get_model_config(name)}
    if hasattr(source.visual, "blocks"):
        found = timm_file.architecture(source.visual)
        return {"name": found.name, "arguments": found.arguments}
    raise ExportError(
        f"Neither open_clip nor timm has such a tower ({type(source.visual).__name__}): nobody could load the file."
    )
