"""Exports of the shipped tower, reopened in processes of their own by libraries that have never heard of visft."""

import os
import sys

import pytest
import torch
from torch import nn

from visft import export
from visft.commands import export_backbone
from visft.export import verification
from visft.modeling.backbone import CLIPViT, lora


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
        from timm.models.eva import Eva

        tower = Eva(img_size=28, patch_size=14, embed_dim=32, depth=2, num_heads=2, num_classes=0)
        backbone = lora.inject(CLIPViT(tower), rank=4, alpha=3.0)
        for site in lora.sites(backbone):
            nn.init.normal_(site.adapter.lora_B)
    processes, run = [], verification.subprocess.run

    def seen(command, **options):
        processes.append(options["env"]["PYTHONPATH"])
        return run(command, **options)

    monkeypatch.setattr(verification.subprocess, "run", seen)
    kind = export.FORMATS[name]
    with caplog.at_level("INFO", logger="visft"):
        path = kind.write(backbone, tmp_path / kind.file_name)
    assert path.exists() and len(processes) == 1 and "ViSFT" not in processes[0]
    assert "in a process of its own, largest relative distance" in caplog.text


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
