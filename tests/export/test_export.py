"""The whole CLIP for open_clip, LoRA alone, and the tool: reopened by their readers, or refused."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import open_clip
import processes
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_towers import close, pictures
from torch import nn

from visft import export
from visft.checkpoint import load
from visft.checkpoint.run import RunCheckpointer
from visft.commands import export_backbone
from visft.errors import CheckpointError, ExportError
from visft.export import open_clip_file
from visft.modeling.backbone import CLIPViT, lora

ROOT = Path(__file__).parents[2]


@torch.no_grad()
def embeddings(path, backbone, name="small-vit"):
    clip = open_clip.create_model(name, pretrained=str(path))
    return clip.eval().encode_image(pictures(backbone), normalize=False)


@torch.no_grad()
def expected(backbone):
    return backbone.image_embedding(pictures(backbone))


READER = """
import json, sys, open_clip, torch
from safetensors.torch import load_file
folder, given = sys.argv[1:]
inputs = load_file(given)
clip = open_clip.create_model(f"local-dir:{folder}").eval()
with torch.no_grad():
    found = clip.encode_image(inputs["images"], normalize=False)
distance = (found - inputs["expected"]).norm() / inputs["expected"].norm()
print(json.dumps([distance.item(), "visft" in sys.modules, "visft-tiny" in open_clip.list_models()]))
"""


def test_a_tuned_tower_loads_into_open_clip_in_a_process_without_us(towers, tmp_path):
    """`visft-tiny`: an architecture that open_clip knows from the config beside the weights alone."""
    backbone = towers.tuned("visft-tiny")
    path = export.open_clip(backbone, tmp_path / "out" / "f.safetensors")
    assert sorted(os.listdir(path.parent)) == ["f.safetensors", "f.safetensors.md", "open_clip_config.json"]
    save_file({"images": pictures(backbone), "expected": expected(backbone)}, tmp_path / "given")
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, "-c", READER, str(path.parent), str(tmp_path / "given")]
    result = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    distance, with_us, known = json.loads(result.stdout.splitlines()[-1])
    assert distance < 1e-5 and not with_us and not known
    # Complete: every name of open_clip's own model, text tower and scale as in the base.
    base, found = backbone.base_clip().state_dict(), load_file(path)
    theirs = open_clip.create_model("visft-tiny", load_weights=False).state_dict()
    assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in theirs.items()}
    assert all(torch.equal(found[k], base[k]) for k in found if not k.startswith("visual."))
    config = json.loads((path.parent / "open_clip_config.json").read_text())
    assert config["model_cfg"] == open_clip.get_model_config("visft-tiny")
    assert config["preprocess_cfg"]["mean"] == list(backbone.mean)


@pytest.mark.parametrize("options", [{"patch_size": 16}, {"class_token": "drop"}, {"window_size": 2}])
def test_options_of_dense_features_leave_no_trace(towers, tmp_path, in_process, options):
    backbone = towers.tuned("small-vit", **options)
    backbone(torch.randn(1, 3, 48, 80))  # another size: position and patch embedding are resampled
    path = export.open_clip(backbone, tmp_path / "f.safetensors")
    native = towers.tuned("small-vit")
    lora.load_state_dict(native, lora.state_dict(backbone))
    native.tower.load_state_dict(backbone.tower.state_dict())
    assert close(embeddings(path, native), expected(native))


def test_the_base_may_be_given(towers, tmp_path, in_process):
    torch.manual_seed(0)
    clip = open_clip.create_model("small-vit")
    torch.save(clip.state_dict(), tmp_path / "base.pt")
    backbone = lora.inject(CLIPViT(copy.deepcopy(clip.visual)), rank=2)
    nn.init.normal_(next(lora.sites(backbone)).adapter.lora_B)
    assert not close(embeddings(tmp_path / "base.pt", backbone), expected(backbone))
    for base in (clip, tmp_path / "base.pt"):
        path = export.open_clip(backbone, tmp_path / "f.safetensors", base=base)
        assert close(embeddings(path, backbone), expected(backbone))
    # `CLIPViT(clip.visual)` and `base=clip` share the tower, adapters included.
    backbone = lora.inject(CLIPViT(clip.visual), rank=2)
    nn.init.normal_(next(lora.sites(backbone)).adapter.lora_B)
    path = export.open_clip(backbone, tmp_path / "f.safetensors", base=clip)
    assert close(embeddings(path, backbone), expected(backbone))


def test_what_cannot_be_exported_is_said_first(towers, tmp_path):
    clip, path = open_clip.create_model("small-vit"), tmp_path / "f.safetensors"
    bare = CLIPViT(clip.visual)
    for base, reason in (
        (None, "pass base=: an open_clip model, a weight file or a tag"),
        (clip.visual, "without `visual`"),
        (open_clip.create_model("small-layerscale"), "another architecture than the model's tower"),
        (open_clip.create_model("small-quickgelu"), "expected|shape"),
        (tmp_path / "absent.pt", "absent.pt"),
    ):
        with pytest.raises(ExportError, match=reason):
            export.open_clip(bare, path, base=base)
    with pytest.raises(ExportError, match="must end in .safetensors"):
        export.open_clip(towers.tuned("small-vit"), tmp_path / "f.pt")
    (tmp_path / "open_clip_config.json").write_text('{"model_cfg": {"embed_dim": 1}}')
    with pytest.raises(ExportError, match="belongs to another architecture"):
        export.open_clip(towers.tuned("small-vit"), path)
    assert os.listdir(tmp_path) == ["open_clip_config.json"]


def test_what_open_clip_does_not_load_is_no_success(towers, tmp_path, monkeypatch):
    """In the fresh process."""
    whole = open_clip_file.resolve

    def lacking(*arguments, **options):
        found = whole(*arguments, **options)
        del found.outside["text_projection"]
        return found

    monkeypatch.setattr(open_clip_file, "resolve", lacking)
    with pytest.raises(ExportError, match="open_clip does not load the export.*"):
        export.open_clip(towers.tuned("small-vit"), tmp_path / "f.safetensors")
    assert os.listdir(tmp_path) == []


def test_leftovers_of_a_killed_export_are_removed(towers, tmp_path, in_process):
    (tmp_path / ".f.safetensors.1.partial").mkdir()
    (tmp_path / ".f.safetensors.1.partial" / "f.safetensors").write_bytes(b"half")
    export.open_clip(towers.tuned("small-vit"), tmp_path / "f.safetensors")
    assert sorted(os.listdir(tmp_path)) == ["f.safetensors", "f.safetensors.md", "open_clip_config.json"]


# LoRA alone


def test_lora_alone_in_our_layout(towers, tmp_path):
    backbone, other = towers.tuned("small-vit"), towers.tuned("small-vit")
    path = export.lora(backbone, tmp_path / "lora.safetensors")
    for parameter in lora.state_dict(other).values():
        parameter.data.zero_()
    with pytest.raises(CheckpointError, match="other base weights"):
        other.base.sha256 = "00" * 32
        load.load_tower(other, path)
    other.base = backbone.base
    report = load.load_tower(other, path)
    assert sorted(report.loaded) == sorted(lora.state_dict(other))
    assert all(torch.equal(v, lora.state_dict(backbone)[k]) for k, v in lora.state_dict(other).items())
    with pytest.raises(ExportError, match="no LoRA in the model"):
        export.lora(CLIPViT.from_open_clip("small-vit"), path)


def eva(alpha):
    """A small EVA with fused qkv, as the authors' towers, and LoRA on q and v."""
    from timm.models.eva import Eva

    torch.manual_seed(0)
    tower = Eva(img_size=28, patch_size=14, embed_dim=32, depth=2, num_heads=2, num_classes=0)
    backbone = lora.inject(CLIPViT(tower), rank=4, alpha=alpha)
    for site in lora.sites(backbone):
        nn.init.normal_(site.adapter.lora_B)
    return backbone


@pytest.mark.parametrize("name", ["lora.pt", "lora.safetensors"])
@torch.no_grad()
def test_lora_in_the_authors_layout(tmp_path, name):
    backbone = eva(alpha=3.0)
    path = export.lora(backbone, tmp_path / name, layout="authors")
    tensors = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    block = "visual.blocks.1.attn.qkv.lora_"
    assert {n: tuple(t.shape) for n, t in tensors.items() if ".1." in n} == {
        f"{block}A": (8, 32),
        f"{block}B": (64, 4),
    }
    # Merged as the authors' description says, with their factor 1 / rank.
    plain = CLIPViT(copy.deepcopy(eva(alpha=3.0).tower))
    for i, block in enumerate(plain.blocks):
        block.lora.merged = True
        a, b = (tensors[f"visual.blocks.{i}.attn.qkv.lora_{k}"] for k in "AB")
        block.attn.qkv.weight[:32] += b[:32] @ a[:4] / 4
        block.attn.qkv.weight[64:] += b[32:] @ a[4:] / 4
    assert close(expected(plain), expected(backbone))
    # And read back, whatever alpha the reader uses.
    other = eva(alpha=1.0)
    load.load_tower(other, path)
    assert close(expected(other), expected(backbone))


# The tool


class Run(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.backbone, self.heads = backbone, nn.ModuleDict({"detection": nn.Linear(2, 2)})


@pytest.fixture
def based(towers, tmp_path):
    """A tuned tower whose base is a file."""
    torch.manual_seed(5)
    torch.save(open_clip.create_model("visft-tiny").state_dict(), tmp_path / "base.pt")
    return towers.tuned("visft-tiny", pretrained=str(tmp_path / "base.pt"))


def test_the_tool_exports_a_run(based, tmp_path):
    """Of the run alone: architecture, base and LoRA settings are in its checkpoint."""
    settings = {"lora": {"rank": 2, "alpha": 2.0, "targets": ["q", "v"], "last_blocks": 0}}
    folder, output = tmp_path / "run" / "lora", tmp_path / "out" / "tower.safetensors"
    RunCheckpointer(folder, Run(based), stage="lora", base=based.base, settings=settings).save(3)
    words = ["--weights", str(tmp_path / "run"), "--format", "open_clip", "--output", str(output)]
    before = processes.read_exports_here
    status, shown = processes.run("export_backbone.py", words, tmp_path / "log", before=before)
    assert status == 0, shown
    assert close(embeddings(output, based, "visft-tiny"), expected(based))


def test_the_tool_refuses_in_one_sentence_and_leaves_nothing(towers, tmp_path, capsys):
    weights = export.lora(towers.tuned("visft-tiny"), tmp_path / "lora.safetensors")
    (tmp_path / "empty.pt").write_bytes(b"")

    def fails(*arguments, weights=weights, output="f.safetensors"):
        words = [
            "--format",
            "open_clip",
            "--output",
            tmp_path / "out" / output,
            "--weights",
            weights,
            *arguments,
        ]
        assert export_backbone.main([str(word) for word in words]) == 1
        error = capsys.readouterr().err.strip()
        assert "Traceback" not in error
        return error.splitlines()[-1]

    assert "no such weight file" in fails(weights=tmp_path / "absent.pt")
    assert "is empty" in fails(weights=tmp_path / "empty.pt")
    assert "MODEL.CLIP_VIT.NAME ViT-B-16" in fails("MODEL.CLIP_VIT.NAME", "ViT-B-16")
    assert "MODEL.LORA.RANK is 8" in fails("MODEL.LORA.RANK", "8")
    assert "MODEL.CLIP_VIT.NAME" in fails("MODEL.CLIP_VIT.NAMES", "ViT-B-16")
    assert "must end in .safetensors" in fails(output="f.pt")
    assert "--interpolate 1.5" in fails("--interpolate", "0.5", "1.5")
    assert not (tmp_path / "out").exists()


def test_the_tool_writes_one_file_a_mixture(based, tmp_path, in_process):
    weights = export.lora(based, tmp_path / "lora.safetensors")
    words = ["--weights", weights, "--format", "open_clip", "--output", tmp_path / "out" / "f.safetensors"]
    words += ["--interpolate", "0.5", "1", "MODEL.DEVICE", "cpu"]
    assert export_backbone.main([str(word) for word in words]) == 0
    found = [f"f-{amount}.safetensors{end}" for amount in ("0.50", "1.00") for end in ("", ".md")]
    assert sorted(os.listdir(tmp_path / "out")) == [*found, "open_clip_config.json"]
