"""ONNX: a graph from images to CLIP embeddings, for any batch size, checked by onnxruntime."""

import contextlib
import copy
import json
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from visft.errors import ExportError
from visft.export import card, place, writing
from visft.export.source import Source, resolve
from visft.export.writing import Export
from visft.modeling.backbone import CLIPViT

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
INPUT, OUTPUT = "images", "embedding"
_LARGE = 1_500_000_000  # bytes; one ONNX file may hold 2 GB


class _Embedding(nn.Module):
    """The forward pass of a tower that returns only the embedding."""

    def __init__(self, visual: nn.Module):
        super().__init__()
        self.visual = visual

    def forward(self, images: Tensor) -> Tensor:
        output = self.visual(images)
        return output[0] if isinstance(output, tuple) else output


def write(
    model: CLIPViT,
    path: str | os.PathLike,
    *,
    base: nn.Module | str | os.PathLike | None = None,
    interpolate: float = 1.0,
    facts: card.Facts | None = None,
) -> Path:
    """Write the image embedding as an ONNX graph: `images` `[batch, 3, h, w]`, normalised, to `embedding` `[batch, D]`.

    `h` and `w` are the tower's native size; `batch` is dynamic. Preprocessing is in the file's metadata, as JSON under
    `preprocess`. Weights of 1.5 GB and more are in `PATH.data` beside the graph.

    Args:
        model, path, base, interpolate, facts: as `export.safetensors`; the path ends in `.onnx`.

    Raises:
        ExportError: a package is missing, or onnxruntime, in a process of its own, does not run the graph or computes
            other embeddings.
    """
    path = place.file(path, ".onnx")
    place.require("onnx", *PACKAGES)
    source = resolve(model, base, interpolate, whole=False)
    export = Export(
        reader="onnx",
        tensors={},
        library="onnx",
        content=f"the image embedding as a graph: `{INPUT}` to `{OUTPUT}`, any batch size",
        use="import onnxruntime\n\n"
        f'session = onnxruntime.InferenceSession("{path.name}")\n'
        f'(embedding,) = session.run(None, {{"{INPUT}": images}})  # float32 [N, 3, '
        f"{source.preprocess['size'][0]}, {source.preprocess['size'][1]}], normalised",
        fill=lambda folder: _export(source, folder / path.name),
    )
    return writing.write(path, source, export, facts)


def _export(source: Source, path: Path) -> None:
    tower = copy.deepcopy(source.visual).cpu().float()
    tower.load_state_dict(
        source.state, strict=False
    )  # LoRA adapters, which the tower's own forward pass does not use
    size = sum(tensor.numel() * tensor.element_size() for tensor in source.state.values())
    example = torch.zeros(2, 3, *source.preprocess["size"])
    try:
        with _quietly(), torch.no_grad():
            program = torch.onnx.export(
                _Embedding(tower).eval(),
                (example,),
                dynamo=True,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
                verbose=False,
            )
            program.model.metadata_props["preprocess"] = json.dumps(source.preprocess)
            program.save(path, external_data=size >= _LARGE)
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ExportError(
            f"torch {torch.__version__} does not turn the tower into ONNX: {lines[0]}"
        ) from error


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """The exporter's remarks are about its own insides; fused attention kernels have no ONNX counterpart."""
    fast = torch.backends.mha.get_fastpath_enabled()
    level = logging.getLogger("torch.onnx").level
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        logging.getLogger("torch.onnx").setLevel(level)
