"""Exports of the shipped tower, reopened in processes of their own by libraries that have never heard of visft."""

import json
import os
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from visft.backbone import CLIPViT, lora
from visft.checkpoint import export, export_check
from visft.checkpoint.export import onnx_file
from visft.engine import export_backbone
from visft.errors import ExportError


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    found = lora.inject(CLIPViT.from_open_clip("visft-tiny", "demo"), rank=4, alpha=4.0)
    for site in lora.sites(found):
        nn.init.normal_(site.adapter.lora_B, std=0.02)
    return found.eval()


@pytest.mark.parametrize("name", ["timm", "hf", "safetensors", "authors", "peft"])
def test_a_fresh_process_agrees(backbone, tmp_path, name, monkeypatch, caplog):
    if name == "authors":
        pytest.importorskip("timm")
        from timm.models.eva import Eva

        tower = Eva(img_size=28, patch_size=14, embed_dim=32, depth=2, num_heads=2, num_classes=0)
        backbone = lora.inject(CLIPViT(tower), rank=4, alpha=3.0)
        for site in lora.sites(backbone):
            nn.init.normal_(site.adapter.lora_B)
    processes, run = [], export_check.subprocess.run

    def seen(command, **options):
        processes.append(options["env"]["PYTHONPATH"])
        return run(command, **options)

    monkeypatch.setattr(export_check.subprocess, "run", seen)
    kind = export.FORMATS[name]
    with caplog.at_level("INFO", logger="visft"):
        path = kind.write(backbone, tmp_path / kind.file_name)
    assert path.exists() and len(processes) == 1 and "ViSFT" not in processes[0]
    assert "in a process of its own, largest relative distance" in caplog.text


def test_onnx_of_any_batch_size(backbone, tmp_path, monkeypatch):
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
    # A graph of other weights is noticed, and the file stays.
    before = path.read_bytes()
    right = onnx_file._export

    def wrong(source, target):
        name = next(n for n in source.state if n.endswith("1.attn.in_proj_weight"))
        source.state[name] = source.state[name] * 1.01
        right(source, target)

    monkeypatch.setattr(onnx_file, "_export", wrong)
    with pytest.raises(ExportError, match="computes other embeddings of images"):
        export.onnx(backbone, path)
    assert path.read_bytes() == before and sorted(os.listdir(tmp_path)) == ["tower.onnx", "tower.onnx.md"]


@pytest.mark.parametrize("tower", ["small-quickgelu", "small-siglip", "small-eva02", "small-coca"])
def test_onnx_of_every_kind_of_tower(towers, tmp_path, in_process, tower, monkeypatch):
    monkeypatch.setattr(onnx_file, "_LARGE", 10_000)  # weights beside the graph, as of towers of gigabytes
    backbone = towers.tuned(tower)
    path = export.onnx(backbone, tmp_path / "tower.onnx")
    assert sorted(os.listdir(tmp_path)) == ["tower.onnx", "tower.onnx.data", "tower.onnx.md"]
    assert path.stat().st_size < (tmp_path / "tower.onnx.data").stat().st_size


def test_the_tool_writes_folders_one_a_mixture(backbone, tmp_path, in_process, capsys, monkeypatch):
    weights = export.lora(backbone, tmp_path / "lora.safetensors")
    command = ["--weights", str(weights), "--format", "hf", "--output", str(tmp_path / "out" / "v1.0")]
    monkeypatch.setattr(sys, "argv", ["tools/export_backbone.py", *command])
    assert export_backbone.main([*command, "--interpolate", "0", "0.5"]) == 0
    assert sorted(os.listdir(tmp_path / "out")) == ["v1.0-0.00", "v1.0-0.50"]
    card = (tmp_path / "out" / "v1.0-0.50" / "README.md").read_text()
    assert "0.5 x tuned + 0.5 x base" in card and f"`{weights}`" in card


def test_the_tool_refuses_a_format_that_does_not_fit_before_it_builds(tmp_path, towers, in_process, capsys):
    weights = export.lora(towers.tuned("small-eva02"), tmp_path / "lora.safetensors")
    command = ["--weights", str(weights), "--format", "hf", "--output", str(tmp_path / "out")]
    assert export_backbone.main(command) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "have no place for timm's Eva" in error and not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "tower"),
    [("hf", "ViT-B-32-quickgelu"), ("timm", "ViT-B-32"), ("hf", "ViT-B-16-SigLIP"), ("timm", "EVA02-B-16")],
)
def test_towers_of_real_size(tmp_path, name, tower):
    found = lora.inject(CLIPViT.from_open_clip(tower), rank=8, alpha=8.0)
    for site in lora.sites(found):
        nn.init.normal_(site.adapter.lora_B, std=0.01)
    kind = export.FORMATS[name]
    assert kind.write(found, tmp_path / kind.file_name).exists()
