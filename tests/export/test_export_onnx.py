"""The image embedding as an ONNX graph, run by onnxruntime."""

import json
import os

import numpy as np
import onnx
import onnxruntime
import pytest
import small_towers
import torch
from torch import nn

from visft import export
from visft.errors import ExportError
from visft.export import onnx_file, verification
from visft.modeling.backbone import CLIPViT, lora


def test_onnx_of_any_batch_size(tmp_path, monkeypatch):
    torch.manual_seed(0)
    backbone = lora.inject(CLIPViT.from_open_clip("visft-tiny", "demo"), rank=4, alpha=4.0)
    for site in lora.sites(backbone):
        nn.init.normal_(site.adapter.lora_B, std=0.02)
    path = export.onnx(backbone, tmp_path / "tower.onnx")
    model = onnx.load(path)
    (entry,), (exit_,) = model.graph.input, model.graph.output
    names = [(d.dim_param or d.dim_value) for d in entry.type.tensor_type.shape.dim]
    assert entry.name == "images" and exit_.name == "embedding" and names[1:] == [3, 64, 64]
    assert isinstance(names[0], str)
    preprocess = json.loads({p.key: p.value for p in model.metadata_props}["preprocess"])
    assert preprocess["mean"] == list(backbone.mean) and preprocess["size"] == [64, 64]
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch in (1, 2, 5):
        images = torch.randn(batch, 3, 64, 64)
        (found,) = session.run(None, {"images": images.numpy()})
        with torch.no_grad():
            expected = backbone.image_embedding(images).numpy()
        assert np.linalg.norm(found - expected) < 1e-5 * np.linalg.norm(expected)
    # A graph of other weights (here: not half way to the base) is noticed, and the file stays.
    before = path.read_bytes()
    monkeypatch.setattr(onnx_file, "_export", lambda source, target: target.write_bytes(before))
    monkeypatch.setattr(verification, "read", small_towers.read_here)
    with pytest.raises(ExportError, match="computes other embeddings of images"):
        export.onnx(backbone, path, interpolate=0.5)
    assert path.read_bytes() == before and sorted(os.listdir(tmp_path)) == ["tower.onnx", "tower.onnx.md"]


@pytest.mark.parametrize(
    "tower",
    [
        "small-coca",
        pytest.param("small-eva02", marks=pytest.mark.slow),
        pytest.param("small-quickgelu", marks=pytest.mark.slow),
        pytest.param("small-siglip", marks=pytest.mark.slow),
    ],
)
def test_onnx_of_every_kind_of_tower(towers, tmp_path, in_process, tower, monkeypatch):
    monkeypatch.setattr(onnx_file, "_LARGE", 10_000)  # weights beside the graph, as of towers of gigabytes
    backbone = towers.tuned(tower)
    path = export.onnx(backbone, tmp_path / "tower.onnx")
    assert sorted(os.listdir(tmp_path)) == ["tower.onnx", "tower.onnx.data", "tower.onnx.md"]
    assert path.stat().st_size < (tmp_path / "tower.onnx.data").stat().st_size
