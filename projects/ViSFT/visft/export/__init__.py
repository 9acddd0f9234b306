"""Exports of a tuned tower: for open_clip, timm, transformers, onnxruntime and peft, and of LoRA alone.

Every export is written to a temporary file, reopened by its library in a fresh process and compared. Only then does it
get its name. The model is never changed.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from visft.export import (
    hugging_face_folder,
    lora_file,
    onnx_file,
    open_clip_file,
    place,
    timm_file,
    tower_file,
)
from visft.export.card import Facts

open_clip = open_clip_file.write
timm = timm_file.write
hugging_face = hugging_face_folder.write
onnx = onnx_file.write
safetensors = tower_file.write
lora = lora_file.write


def _anything(visual: nn.Module) -> None:
    """Accept every tower."""


@dataclass(frozen=True)
class Format:
    """An export format.

    Attributes:
        write: `write(model, path, *, base=None, interpolate=1.0, facts=None)`, which returns the path.
        file_name: its name below `OUTPUT_DIR/export` in a run.
        suffixes: valid suffixes of the path; `""`: it is a folder.
        packages: packages needed beyond visft's own requirements.
        fits: raises ExportError for a tower that the format cannot hold. The tower may be on `meta`.
        needs_lora: whether the model must have LoRA.
    """

    write: Callable[..., Path]
    file_name: str
    suffixes: tuple[str, ...] = (".safetensors",)
    packages: tuple[str, ...] = ()
    fits: Callable[[nn.Module], object] = _anything
    needs_lora: bool = False


FORMATS = {
    "open_clip": Format(open_clip, "visft_backbone.safetensors"),
    "timm": Format(timm, "timm/model.safetensors", fits=timm_file.architecture),
    "hf": Format(hugging_face, "hf", ("",), ("transformers",), hugging_face_folder.fits),
    "onnx": Format(onnx, "onnx/visft_backbone.onnx", (".onnx",), onnx_file.PACKAGES),
    "safetensors": Format(safetensors, "tower/visft_tower.safetensors"),
    "lora": Format(lora, "lora/visft_lora.safetensors", needs_lora=True),
    "authors": Format(
        functools.partial(lora, layout="authors"),
        "lora/visft_lora_authors.pt",
        (".pt", ".safetensors"),
        needs_lora=True,
    ),
    "peft": Format(
        functools.partial(lora, layout="peft"),
        "peft",
        ("",),
        ("peft", "transformers"),
        hugging_face_folder.fits,
        needs_lora=True,
    ),
}
"""The formats of `VISFT.EXPORT` and `--format`."""


def check(name: str, visual: nn.Module) -> None:
    """Check, before long work, for what would make an export fail at its end.

    Args:
        name: of `FORMATS`.
        visual: the tower. Its weights do not matter; they may be on `meta`.

    Raises:
        ExportError: a package is missing, or the format cannot hold such a tower.
    """
    place.require(name, *FORMATS[name].packages)
    FORMATS[name].fits(visual)


__all__ = [
    "FORMATS",
    "Facts",
    "Format",
    "check",
    "hugging_face",
    "lora",
    "onnx",
    "open_clip",
    "safetensors",
    "timm",
]
