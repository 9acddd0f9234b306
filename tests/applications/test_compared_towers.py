"""Towers for the benchmarks as visft loads them."""

import pytest
import torch
from open_clip import create_model
from safetensors.torch import load_file, save_file

from demoworld import tower as demo_tower
from visft.applications import compared_towers
from visft.errors import CheckpointError, ConfigError
from visft.modeling.backbone import CLIPViT


def test_heads_file_is_no_tower(tmp_path):
    save_file({"heads.detection.x": torch.zeros(2)}, tmp_path / "heads.safetensors")
    with pytest.raises(CheckpointError, match="--compare .*holds no whole CLIP"):
        compared_towers.check(demo_tower.NAME, "demo", [str(tmp_path / "heads.safetensors")])
    with pytest.raises(ConfigError, match="given twice"):
        compared_towers.labels(["a.pt", "a.pt"])


def test_files_that_open_clip_alone_cannot_read_are_compared_by_clip_vits_maps(tmp_path):
    wrapped = {f"_orig_mod.{name}": value for name, value in load_file(demo_tower.WEIGHTS_FILE).items()}
    save_file(wrapped, tmp_path / "compiled.safetensors")
    tower = compared_towers.load(demo_tower.NAME, str(tmp_path / "compiled.safetensors"), device="cpu")
    assert isinstance(tower.encoder, CLIPViT) and tower.has_map
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    plain = compared_towers.load(demo_tower.NAME, "demo", device="cpu")
    for found, expected in zip(
        tower.encode(images, dense=True), plain.encode(images, dense=True), strict=True
    ):
        assert torch.equal(found, expected)


def test_a_tower_without_a_map(monkeypatch):
    clip = create_model("RN50", load_weights=False)
    base = type("Base", (), {"sha256": "0"})
    monkeypatch.setattr(
        compared_towers.open_clip_models, "create_clip", lambda name, pretrained: (clip, base)
    )
    assert not compared_towers.load("RN50", None, device="cpu").has_map
