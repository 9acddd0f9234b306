"""Writes an export to a temporary folder, checks it there, and then moves it to its place."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visft.checkpoint.files import Lazy, folder_aside, write_json, write_safetensors
from visft.export import card, place, verification
from visft.export.source import Source


def _nothing(folder: Path) -> None:
    """Write no further files."""


@dataclass(frozen=True)
class Export:
    """A tower in a format, ready to be written.

    Attributes:
        reader: of `reader.py`.
        tensors: by the format's names.
        library: the library that loads the export, by its name on the Hub.
        content: a phrase that says what is in the export.
        use: Python code that loads it.
        weights: file name of the weights if the export is a folder. "": the export is that file.
        metadata: for the header of a safetensors file.
        described: name and content of a JSON file beside the weights. None: there is none.
        owner: the part of that JSON that tells models apart. "": all of it.
        fill: writes further files into the folder.
        task: what the reader needs.
        texts: whether the reader also embeds texts.
        pixels: the tolerance of images that it prepares. None: it prepares none.
    """

    reader: str
    tensors: Mapping[str, Tensor | Lazy]
    library: str
    content: str
    use: str
    weights: str = ""
    metadata: Mapping[str, str] = field(default_factory=lambda: {"format": "pt"})
    described: tuple[str, dict[str, Any]] | None = None
    owner: str = ""
    fill: Callable[[Path], None] = _nothing
    task: Mapping[str, Any] = field(default_factory=dict)
    texts: bool = False
    pixels: float | None = None


def write(
    path: Path,
    source: Source,
    export: Export,
    facts: card.Facts | None,
    check: Callable[[Path], verification.Check] | None = None,
) -> Path:
    """Write an export and return its path.

    Args:
        path: of the weights, or of the folder for them.
        facts: for the model card.
        check: checks the temporary weights, after they were read back. None: the reader's embeddings are compared.

    Raises:
        ExportError: the description of another model is there, the written file reads back differently, or the reader
            disagrees. Existing files stay.
    """
    target = path if export.weights else path.parent
    if export.described is not None:
        name, content = export.described
        place.refuse_other(target / name, content, export.owner)
    with folder_aside(path) as aside:
        folder = aside / "files"
        folder.mkdir()
        weights = folder / (export.weights or path.name)
        if weights.suffix == ".pt":
            torch.save({name: tensor.cpu() for name, tensor in export.tensors.items()}, weights)
        elif export.tensors:
            write_safetensors(weights, export.tensors, export.metadata)
        if export.described is not None:
            write_json(folder / name, content)
        export.fill(folder)
        if export.tensors:
            verification.stored(weights, export.tensors)
        found = check(weights) if check else _read(weights, source, export)
        about = card.text(
            source,
            facts or card.Facts(),
            found.phrase,
            library=export.library,
            content=export.content,
            use=export.use,
        )
        (folder / ("README.md" if export.weights else f"{path.name}.md")).write_text(about, encoding="utf-8")
        place.put_all(folder, target)
    found.log(path)
    return path


def _read(weights: Path, source: Source, export: Export) -> verification.Check:
    return verification.run(
        export.reader,
        weights,
        source.embed,
        source.preprocess,
        clip=source.clip if export.texts else None,
        task=export.task,
        pixels=export.pixels,
    )
