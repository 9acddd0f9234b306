"""safetensors: the vision tower alone, under open_clip's `visual.*` names."""

import json
import os
from pathlib import Path

from torch import nn

from visft.checkpoint.files import folder_aside, write_safetensors
from visft.errors import ExportError
from visft.export import base_clip as bases
from visft.export import card, place, timm_file, verification
from visft.export.source import Source, resolve
from visft.modeling.backbone import CLIPViT, open_clip_models

CONTENT = "the vision tower alone, under open_clip's names (`visual.*`)"


def write(
    model: CLIPViT,
    path: str | os.PathLike,
    *,
    base: nn.Module | str | os.PathLike | None = None,
    interpolate: float = 1.0,
    facts: card.Facts | None = None,
) -> Path:
    """Write the vision tower alone: what is below `visual` in open_clip's model, with `visual.` before each name.

    Preprocessing (mean, std, size, interpolation) is in the file's header, as JSON under `preprocess`.

    Args:
        model, path, interpolate, facts: as `export.open_clip`.
        base: needed only where the base's weights are, for a mixture or a model in 16 bits, and the model does not
            remember it.

    Raises:
        ExportError: neither open_clip nor timm has such a tower, or it, in a process of its own, does not load the file
            strictly or computes other embeddings.
    """
    path = place.file(path, ".safetensors")
    source = resolve(model, base, interpolate, whole=False)
    # A tower of timm that is not within open_clip's wrapper has the names below `trunk`.
    prefix = "visual.trunk." if hasattr(source.visual, "blocks") else "visual."
    state = {prefix + name: tensor for name, tensor in source.state.items()}
    with folder_aside(path) as folder:
        write_safetensors(
            folder / path.name, state, {"format": "pt", "preprocess": json.dumps(source.preprocess)}
        )
        verification.stored(folder / path.name, state)
        check = verification.run(
            "safetensors", folder / path.name, source.embed, source.preprocess, task=_builder(source)
        )
        about = card.text(
            source,
            facts or card.Facts(),
            check,
            library="open_clip",
            content=CONTENT,
            use=use(source.name, path),
        )
        card.publish(folder, path, about)
    check.log(path)
    return path


def use(name: str | None, path: Path) -> str:
    """Python that loads the file."""
    return (
        "import open_clip\nfrom safetensors.torch import load_file\n\n"
        f'model = open_clip.create_model("{name or "NAME"}")\n'
        f'model.load_state_dict(load_file("{path.name}"), strict=False)  # the text tower is not in it'
    )


def _builder(source: Source) -> dict:
    """What the reader makes the tower from."""
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
