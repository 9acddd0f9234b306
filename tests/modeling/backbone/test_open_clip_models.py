"""Towers by name: the demo tower in open_clip, bases with their hashes, and bad names and files."""

import hashlib
import json
import pickle
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
import torch
from detectron2.config import get_cfg
from families import relative, small_clip
from safetensors.torch import load_file, save_file

import visft
from demoworld import tower as demo_tower
from visft.engine import checks
from visft.errors import CheckpointError, ConfigError
from visft.modeling.backbone import CLIPViT, open_clip_models


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    torch.manual_seed(3)
    clip = open_clip_models.open_clip().create_model("visft-tiny")
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_file({n: t.contiguous() for n, t in clip.state_dict().items()}, path)
    return path


@pytest.mark.parametrize("order", ["import visft; import open_clip", "import open_clip; import visft"])
def test_open_clip_knows_the_demo_tower_in_either_order(order):
    looked_for = "import importlib.util; importlib.util.find_spec('open_clip')"  # looking is not importing
    found = "print('visft-tiny' in open_clip.list_models(), open_clip.list_pretrained_tags_by_model('visft-tiny'))"
    command = [sys.executable, "-c", f"{looked_for}; {order}; {found}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "True ['demo']"


@torch.no_grad()
def test_from_a_file(weights):
    backbone = CLIPViT.from_open_clip("visft-tiny", str(weights)).eval()
    assert backbone.base.sha256 == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert (backbone.base.name, backbone.base.pretrained) == ("visft-tiny", str(weights))
    assert backbone.mean == open_clip_models.OPENAI_MEAN and backbone.image_size == (64, 64)
    images = torch.randn(2, 3, 64, 64)
    clip = backbone.base_clip()
    assert clip.visual is not backbone.tower
    assert relative(backbone.image_embedding(images), clip.encode_image(images)) < 1e-5


def test_random_weights_are_named_by_their_content():
    hashes, towers = [], []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        towers.append(CLIPViT.from_open_clip("visft-tiny"))
        hashes.append(towers[-1].base.sha256)
    assert hashes[0] == hashes[1] != hashes[2]
    assert towers[0].base.pretrained is None and towers[0].base_clip().visual is towers[0].tower


def test_the_tag_is_the_shipped_file(weights, monkeypatch):
    monkeypatch.setattr(demo_tower, "WEIGHTS_FILE", weights)
    tagged = CLIPViT.from_open_clip("visft-tiny", "demo")
    from_file = CLIPViT.from_open_clip("visft-tiny", str(weights))
    assert tagged.base.sha256 == from_file.base.sha256
    assert all(torch.equal(t, from_file.state_dict()[n]) for n, t in tagged.state_dict().items())


def test_mean_and_deviation_are_the_towers_own():
    clip = small_clip("ViT-B-16-SigLIP")
    clip.visual.preprocess_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.4, 0.4, 0.4)}
    backbone = CLIPViT(clip.visual)
    assert backbone.mean == (0.5, 0.5, 0.5) and backbone.std == (0.4, 0.4, 0.4)


def test_bad_names():
    with pytest.raises(ConfigError, match="'ViT-B-61'.*nearest name is 'ViT-B-16'"):
        CLIPViT.from_open_clip("ViT-B-61")
    with pytest.raises(ConfigError, match="neither a file nor a tag of visft-tiny; its tags are: demo"):
        CLIPViT.from_open_clip("visft-tiny", "openai")
    with pytest.raises(ConfigError, match="bare tower"):
        CLIPViT(CLIPViT.from_open_clip("visft-tiny").tower).base_clip()


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_bad_files(weights, tmp_path):
    fired = tmp_path / "fired"
    cases = {
        "missing.pt": (None, "does not exist"),
        "empty.pt": (b"", "is empty"),
        "truncated.safetensors": (weights.read_bytes()[:-1000], "PRETRAINED: .*was cut off"),
        "bomb.pt": (pickle.dumps(Bomb(str(fired)), protocol=2), "PRETRAINED: .*other than tensors"),
        "text.pt": (b"<html>", "PRETRAINED: .*is no whole weight file"),
    }
    for name, (content, message) in cases.items():
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(CheckpointError, match=message) as caught:
            CLIPViT.from_open_clip("visft-tiny", str(path))
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert not fired.exists()


@pytest.fixture
def quick_tag(monkeypatch):
    """A tag of visft-tiny whose weights want QuickGELU, which the architecture has not."""
    open_clip_models.register(open_clip)
    entry = {"file": str(demo_tower.WEIGHTS_FILE), "quick_gelu": True}
    table = open_clip.pretrained._PRETRAINED
    for name in ("visft-tiny", "visft-tiny-quickgelu"):
        monkeypatch.setitem(table, name, {**table.get(name, {}), "quick": entry})
    return "quick"


@pytest.mark.parametrize("known", [False, True])
def test_activation_is_the_tags(quick_tag, known, tmp_path, monkeypatch, caplog):
    """Silently loaded under GELU, such weights are worse. open_clip's own model with QuickGELU is the measure."""
    if known:
        config = open_clip.get_model_config("visft-tiny") | {"quick_gelu": True}
        (tmp_path / "visft-tiny-quickgelu.json").write_text(json.dumps(config))
        for name in ("_MODEL_CONFIGS", "_MODEL_CONFIG_PATHS"):
            monkeypatch.setattr(open_clip.factory, name, getattr(open_clip.factory, name).copy())
        open_clip.add_model_config(tmp_path)
    with caplog.at_level("INFO"):
        clip, base = open_clip_models.create_clip("visft-tiny", quick_tag)
    weights = str(demo_tower.WEIGHTS_FILE)
    quick, plain = (
        open_clip.create_model("visft-tiny", pretrained=weights, force_quick_gelu=force).eval()
        for force in (True, False)
    )
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, expected, wrong = (model.encode_image(images) for model in (clip, quick, plain))
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, wrong, atol=1e-3)
    assert base.name == ("visft-tiny-quickgelu" if known else "visft-tiny")
    # A run names its tower so; the config that it was started with, which has the other name, is that of the run.
    run, cfg = tmp_path / "run.safetensors", get_cfg()
    save_file({"heads.detection.x": torch.ones(1)}, run, {"visft": json.dumps({"base": {"name": base.name}})})
    visft.add_visft_config(cfg)
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.WEIGHTS = "ViSFT", str(run)
    cfg.MODEL.CLIP_VIT.NAME, cfg.MODEL.CLIP_VIT.PRETRAINED = "visft-tiny", quick_tag
    checks._weight_files(cfg)
    assert "want QuickGELU" in caplog.text


@pytest.mark.parametrize(
    ("nest", "prefix"),
    [
        ("", "_orig_mod."),
        ("state_dict", "module._orig_mod."),
        ("model_state_dict", ""),
        ("ema", "module."),
        ("state_dict", "module."),
    ],
)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_wrapped_names_are_seen_through(tmp_path, nest, prefix, suffix):
    """As torch.compile, DataParallel and training programs write them."""
    tensors = load_file(demo_tower.WEIGHTS_FILE)
    named, path = {prefix + name: tensor for name, tensor in tensors.items()}, tmp_path / f"base{suffix}"
    if suffix == ".pt":
        torch.save({nest: named, "epoch": 3} if nest else named, path)
    else:
        save_file(named, path)
    clip, base = open_clip_models.create_clip("visft-tiny", str(path))
    assert base.sha256 == hashlib.sha256(path.read_bytes()).hexdigest() and base.pretrained == str(path)
    state = clip.state_dict()
    assert all(torch.equal(state[name], tensor.float()) for name, tensor in tensors.items())
