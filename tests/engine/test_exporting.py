"""The exports of a run: their places, their cards, and what is refused before the run."""

import json
import sys
from pathlib import Path

import pytest
import small_towers
import torch
from detectron2.config import get_cfg
from torch import nn

from visft import add_visft_config
from visft.engine import checks, exporting, key_rules
from visft.errors import ConfigError, ExportError
from visft.export import verification
from visft.modeling.backbone import CLIPViT, lora


@pytest.fixture
def cfg():
    cfg = get_cfg()
    add_visft_config(cfg)
    cfg.DATASETS.TRAIN = ("coco_2017_train",)
    return cfg


def test_a_run_writes_every_format_asked_for_and_its_figures(cfg, tmp_path, monkeypatch):
    monkeypatch.setattr(verification, "read", small_towers.read_here)
    monkeypatch.setattr(sys, "argv", ["/some/where/train_net.py", "--config-file", "a b.yaml"])
    torch.manual_seed(0)
    backbone = lora.inject(CLIPViT.from_open_clip("visft-tiny", "demo"), rank=2)
    nn.init.normal_(next(lora.sites(backbone)).adapter.lora_B)
    cfg.VISFT.EXPORT = ("open_clip", "timm", "hf", "safetensors", "lora", "peft")
    run = {"seed": 1, "evaluations": {"start": {}, "lora": {"detection/bbox/AP": 12.345}}}
    (tmp_path / "run.json").write_text(json.dumps(run))
    (tmp_path / "config.yaml").write_text(cfg.dump())
    cfg.DATASETS.TRAIN = ("another",)  # the run's own config tells
    written = exporting.export(cfg, backbone, tmp_path / "export")
    assert [path.relative_to(tmp_path / "export").as_posix() for path in written] == [
        "visft_backbone.safetensors",
        "timm/model.safetensors",
        "hf",
        "tower/visft_tower.safetensors",
        "lora/visft_lora.safetensors",
        "peft",
    ]
    # open_clip's folder stays one that `local-dir:` understands: no other weights lie in it.
    assert [p.name for p in (tmp_path / "export").glob("*.safetensors")] == ["visft_backbone.safetensors"]
    for path in written:
        card = (path / "README.md" if path.is_dir() else Path(f"{path}.md")).read_text()
        assert "| detection/bbox/AP | 12.35 |" in card or "| detection/bbox/AP | 12.34 |" in card
        assert "`coco_2017_train`" in card and "`train_net.py --config-file 'a b.yaml'`" in card


def test_a_lora_file_has_no_figures_and_no_data(cfg, tmp_path):
    facts = exporting.facts(cfg, tmp_path / "lora.safetensors")
    assert facts.figures == {} and facts.data == () and facts.run.endswith("lora.safetensors")


def test_what_a_run_could_not_export_is_said_before_it(cfg):
    cfg.VISFT.EXPORT = ("open_clip", "hf")
    checks._exports(cfg)
    cfg.MODEL.CLIP_VIT.NAME = "EVA02-B-16"
    with pytest.raises(ExportError, match="have no place for timm's Eva"):
        checks._exports(cfg)
    cfg.VISFT.EXPORT = ("lora",)
    checks._exports(cfg)
    cfg.VISFT.STAGES = ("heads",)
    with pytest.raises(ConfigError, match="VISFT.EXPORT has lora, which only writes LoRA"):
        checks._exports(cfg)
    cfg.VISFT.EXPORT = ("timmm",)
    with pytest.raises(ConfigError, match="VISFT.EXPORT: `timmm` is unknown; the nearest is `timm`"):
        key_rules.check_keys(cfg, key_rules.RUN)
