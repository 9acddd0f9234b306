"""Exports reopened by their readers; failed ones leave what was there."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from visft import export
from visft.checkpoint import load
from visft.checkpoint.run import RunCheckpointer
from visft.commands import export_backbone
from visft.errors import CheckpointError, ExportError
from visft.export import open_clip_file, source
from visft.modeling.backbone import CLIPViT, lora

ROOT = Path(__file__).parents[2]

# Small architectures of three kinds of tower: open_clip's own twice, and timm's Eva with rotary embedding and SwiGLU.
TEXT = {"context_length": 8, "vocab_size": 100, "width": 32, "heads": 2, "layers": 1}
EVA = {
    "timm_model_name": "eva02_tiny_patch14_224",
    "timm_pool": "token",
    "timm_proj": None,
    "image_size": 224,
}
SMALL = {
    "test-vit": {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8},
    },
    "test-quickgelu": {
        "embed_dim": 24,
        "quick_gelu": True,
        "vision_cfg": {"image_size": [32, 48], "layers": 2, "width": 64, "patch_size": 16},
    },
    "test-eva02": {"embed_dim": 24, "vision_cfg": EVA, "custom_text": True},
}


@pytest.fixture(scope="module", autouse=True)
def architectures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("configs")
    for name, config in SMALL.items():
        (folder / f"{name}.json").write_text(json.dumps({"text_cfg": TEXT, **config}))
    open_clip.add_model_config(folder)


def tuned(name="test-vit", **options):
    """A backbone with LoRA that changes its embeddings."""
    torch.manual_seed(0)
    backbone = lora.inject(CLIPViT.from_open_clip(name, **options), rank=2, alpha=2.0)
    for parameter in backbone.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    return backbone


def pictures(backbone):
    return torch.randn(2, 3, *backbone.image_size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def embeddings(clip, images):
    return clip.eval().encode_image(images, normalize=False)


def close(left, right, tolerance=2e-5):
    return (left - right).norm() <= tolerance * right.norm()


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


def test_a_tuned_tower_loads_into_open_clip_in_a_process_without_us(tmp_path):
    """`visft-tiny`: an architecture that open_clip knows from the config beside the weights alone."""
    backbone = tuned("visft-tiny")
    path = export.open_clip(backbone, tmp_path / "out" / "visft_backbone.safetensors")
    assert sorted(os.listdir(path.parent)) == [
        "open_clip_config.json",
        "visft_backbone.safetensors",
        "visft_backbone.safetensors.md",
    ]
    images = pictures(backbone)
    with torch.no_grad():
        expected = backbone.image_embedding(images)
    save_file({"images": images, "expected": expected}, tmp_path / "given")
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, "-c", READER, str(path.parent), str(tmp_path / "given")]
    result = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    distance, with_us, known = json.loads(result.stdout.splitlines()[-1])
    assert distance < 1e-5 and not with_us and not known
    # Complete: every name of open_clip's own model, text tower and scale as in the base.
    base = backbone.base_clip().state_dict()
    found = load_file(path)
    theirs = open_clip.create_model("visft-tiny", load_weights=False).state_dict()
    assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in theirs.items()}
    assert all(torch.equal(found[k], base[k]) for k in found if not k.startswith("visual."))
    config = json.loads((path.parent / "open_clip_config.json").read_text())
    assert config["model_cfg"] == open_clip.get_model_config("visft-tiny")
    assert config["preprocess_cfg"]["mean"] == list(backbone.mean)


@pytest.mark.parametrize("name", ["test-vit", "test-quickgelu", "test-eva02"])
@pytest.mark.parametrize("merged", [False, True])
def test_every_kind_of_tower_merged_or_not(tmp_path, in_process, name, merged):
    backbone = tuned(name)
    images = pictures(backbone)
    with torch.no_grad():
        expected = backbone.image_embedding(images)
    if merged:
        lora.merge(backbone)
    backbone.train()
    modes = {n: m.training for n, m in backbone.named_modules()}
    before = copy.deepcopy(backbone.state_dict())
    path = export.open_clip(backbone, tmp_path / "f.safetensors")
    assert close(embeddings(open_clip.create_model(name, pretrained=str(path)), images), expected)
    # The model is as it was.
    after = backbone.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert {n: m.training for n, m in backbone.named_modules()} == modes
    assert lora.is_merged(backbone) == merged


def test_without_lora_the_base_itself_is_written(tmp_path, in_process):
    backbone = CLIPViT.from_open_clip("test-vit")
    found = load_file(export.open_clip(backbone, tmp_path / "f.safetensors"))
    base = backbone.base_clip().state_dict()
    assert found.keys() == base.keys() and all(torch.equal(found[k], base[k]) for k in base)


@pytest.mark.parametrize("options", [{"patch_size": 16}, {"class_token": "drop"}, {"window_size": 2}])
def test_options_of_dense_features_leave_no_trace(tmp_path, in_process, options):
    backbone = tuned(**options)
    backbone(torch.randn(1, 3, 48, 80))  # another size: position and patch embedding are resampled
    path = export.open_clip(backbone, tmp_path / "f.safetensors")
    native = tuned()
    lora.load_state_dict(native, lora.state_dict(backbone))
    native.tower.load_state_dict(backbone.tower.state_dict())
    images = pictures(native)
    with torch.no_grad():
        expected = native.image_embedding(images)
    assert close(embeddings(open_clip.create_model("test-vit", pretrained=str(path)), images), expected)


def test_weights_stored_in_16_bits_are_exported_from_the_base(tmp_path, in_process):
    torch.manual_seed(0)
    clip = open_clip.create_model("test-vit")
    torch.save(clip.state_dict(), tmp_path / "base.pt")
    backbone = tuned(pretrained=str(tmp_path / "base.pt"), frozen_dtype="bfloat16")
    found = load_file(export.open_clip(backbone, tmp_path / "f.safetensors"))
    name = "visual.transformer.resblocks.0.mlp.c_fc.weight"
    assert torch.equal(found[name], clip.state_dict()[name])
    name = "visual.transformer.resblocks.0.attn.in_proj_weight"
    update = found[name] - clip.state_dict()[name]
    site = next(adapter for adapter in lora.sites(backbone))
    assert torch.allclose(update[:64], site.adapter.delta(), atol=1e-6)
    assert update[64:128].abs().max() == 0


def test_the_base_may_be_given(tmp_path, in_process):
    torch.manual_seed(0)
    clip = open_clip.create_model("test-vit")
    torch.save(clip.state_dict(), tmp_path / "base.pt")
    backbone = lora.inject(CLIPViT(copy.deepcopy(clip.visual)), rank=2)
    nn.init.normal_(next(lora.sites(backbone)).adapter.lora_B)
    images = pictures(backbone)
    with torch.no_grad():
        expected = backbone.image_embedding(images)
    assert not close(embeddings(clip, images), expected)
    for base in (clip, tmp_path / "base.pt"):
        path = export.open_clip(backbone, tmp_path / "f.safetensors", base=base)
        assert close(embeddings(open_clip.create_model("test-vit", pretrained=str(path)), images), expected)


def test_the_whole_clip_held_by_the_tower_itself_as_base(tmp_path, in_process):
    """`CLIPViT(clip.visual)` and `base=clip` share the tower, adapters included."""
    torch.manual_seed(0)
    clip = open_clip.create_model("test-eva02")
    backbone = lora.inject(CLIPViT(clip.visual), rank=2)
    for site in lora.sites(backbone):
        nn.init.normal_(site.adapter.lora_B)
    images = pictures(backbone)
    with torch.no_grad():
        expected = backbone.image_embedding(images)
    path = export.open_clip(backbone, tmp_path / "f.safetensors", base=clip)
    assert close(embeddings(open_clip.create_model("test-eva02", pretrained=str(path)), images), expected)


def test_what_cannot_be_exported_is_said_first(tmp_path):
    clip = open_clip.create_model("test-vit")
    bare = CLIPViT(clip.visual)
    with pytest.raises(ExportError, match="pass base=: an open_clip model, a weight file or a tag"):
        export.open_clip(bare, tmp_path / "f.safetensors")
    with pytest.raises(ExportError, match="without `visual`"):
        export.open_clip(bare, tmp_path / "f.safetensors", base=clip.visual)
    with pytest.raises(ExportError, match="another architecture than the model's tower"):
        export.open_clip(bare, tmp_path / "f.safetensors", base=open_clip.create_model("test-eva02"))
    with pytest.raises(ExportError, match="expected|shape"):
        export.open_clip(bare, tmp_path / "f.safetensors", base=open_clip.create_model("test-quickgelu"))
    with pytest.raises(ExportError, match="absent.pt"):
        export.open_clip(bare, tmp_path / "f.safetensors", base=tmp_path / "absent.pt")
    with pytest.raises(ExportError, match="must end in .safetensors"):
        export.open_clip(tuned(), tmp_path / "f.pt")
    (tmp_path / "open_clip_config.json").write_text('{"model_cfg": {"embed_dim": 1}}')
    with pytest.raises(ExportError, match="belongs to another architecture"):
        export.open_clip(tuned(), tmp_path / "f.safetensors")
    assert os.listdir(tmp_path) == ["open_clip_config.json"]


def _wrong_update(model, base, interpolate, right=source.tuned):
    """The weights with some value rows of one block too large by a hundredth."""
    for name, tensor in right(model, base, interpolate):
        if name.endswith("resblocks.1.attn.in_proj_weight"):
            tensor[-8:] *= 1.01
        yield name, tensor


def test_a_wrong_export_is_noticed_by_the_reader_and_changes_nothing(tmp_path, monkeypatch):
    """In the fresh process: what is written aside disagrees with the model."""
    path = tmp_path / "f.safetensors"
    path.write_bytes(b"what the user had")
    monkeypatch.setattr(source, "tuned", _wrong_update)
    with pytest.raises(ExportError, match="computes other embeddings of images"):
        export.open_clip(tuned(), path)
    assert path.read_bytes() == b"what the user had" and os.listdir(tmp_path) == ["f.safetensors"]


def test_what_open_clip_does_not_load_is_no_success(tmp_path, monkeypatch):
    path = tmp_path / "f.safetensors"
    whole = open_clip_file.clip_state

    def lacking(*arguments):
        state = whole(*arguments)
        del state["text_projection"]
        return state

    monkeypatch.setattr(open_clip_file, "clip_state", lacking)
    with pytest.raises(ExportError, match="open_clip does not load the export.*"):
        export.open_clip(tuned(), path)
    assert os.listdir(tmp_path) == []


def test_leftovers_of_a_killed_export_are_removed(tmp_path, in_process):
    leftover = tmp_path / ".f.safetensors.1.partial"
    leftover.mkdir()
    (leftover / "f.safetensors").write_bytes(b"half")
    export.open_clip(tuned(), tmp_path / "f.safetensors")
    assert sorted(os.listdir(tmp_path)) == ["f.safetensors", "f.safetensors.md", "open_clip_config.json"]


def test_interpolation_mixes_weights(tmp_path, in_process):
    torch.manual_seed(0)
    clip = open_clip.create_model("test-vit")
    torch.save(clip.state_dict(), tmp_path / "base.pt")
    (tmp_path / "out").mkdir()
    backbone = tuned(pretrained=str(tmp_path / "base.pt"))
    states = {
        amount: load_file(export.open_clip(backbone, tmp_path / "out" / "f.safetensors", interpolate=amount))
        for amount in (0.0, 0.25, 1.0)
    }
    for name, base in clip.state_dict().items():
        assert torch.equal(states[0.0][name], base)
        assert torch.allclose(states[0.25][name], base + 0.25 * (states[1.0][name] - base), atol=1e-6)


def test_lora_alone_in_our_layout(tmp_path):
    backbone = tuned()
    path = export.lora(backbone, tmp_path / "lora.safetensors")
    other = tuned()
    for parameter in lora.state_dict(other).values():
        parameter.data.zero_()
    other.base = backbone.base
    report = load.load_tower(other, path)
    assert sorted(report.loaded) == sorted(lora.state_dict(other))
    assert all(torch.equal(v, lora.state_dict(backbone)[k]) for k, v in lora.state_dict(other).items())
    with pytest.raises(ExportError, match="no LoRA in the model"):
        export.lora(CLIPViT.from_open_clip("test-vit"), path)
    with pytest.raises(ExportError, match="authors' layout holds q and v of fused qkv"):
        export.lora(backbone, tmp_path / "lora.pt", layout="authors")


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
def test_lora_in_the_authors_layout(tmp_path, name):
    backbone = eva(alpha=3.0)
    path = export.lora(backbone, tmp_path / name, layout="authors")
    tensors = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    assert {n: tuple(t.shape) for n, t in tensors.items() if ".1." in n} == {
        "visual.blocks.1.attn.qkv.lora_A": (8, 32),
        "visual.blocks.1.attn.qkv.lora_B": (64, 4),
    }
    # Merged as the authors' description says, with their factor 1 / rank.
    images = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        expected = backbone.image_embedding(images)
        plain = CLIPViT(copy.deepcopy(eva(alpha=3.0).tower))
        for i, block in enumerate(plain.blocks):
            block.lora.merged = True
            a, b = (tensors[f"visual.blocks.{i}.attn.qkv.lora_{k}"] for k in "AB")
            block.attn.qkv.weight[:32] += b[:32] @ a[:4] / 4
            block.attn.qkv.weight[64:] += b[32:] @ a[4:] / 4
        assert close(plain.image_embedding(images), expected)
        # And read back, whatever alpha the reader uses.
        other = eva(alpha=1.0)
        load.load_tower(other, path)
        assert close(other.image_embedding(images), expected)


class Run(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.backbone, self.heads = backbone, nn.ModuleDict({"detection": nn.Linear(2, 2)})


def tool(*arguments):
    env = {**os.environ, "PYTHONPATH": str(ROOT / "projects" / "ViSFT"), "OMP_NUM_THREADS": "1"}
    env.pop("VISFT_DEBUG", None)
    command = [sys.executable, str(ROOT / "tools" / "export_backbone.py"), *map(str, arguments)]
    return subprocess.run(command, env=env, capture_output=True, text=True)


def test_the_tool_exports_a_run(tmp_path):
    torch.manual_seed(5)
    clip = open_clip.create_model("visft-tiny")
    torch.save(clip.state_dict(), tmp_path / "base.pt")
    backbone = tuned("visft-tiny", pretrained=str(tmp_path / "base.pt"))
    settings = {"lora": {"rank": 2, "alpha": 2.0, "targets": ["q", "v"], "last_blocks": 0}}
    checkpointer = RunCheckpointer(
        tmp_path / "run" / "lora", Run(backbone), stage="lora", base=backbone.base, settings=settings
    )
    checkpointer.save(3)
    output = tmp_path / "out" / "tower.safetensors"
    # Of the run alone: architecture, base and LoRA settings are in its checkpoint.
    result = tool("--weights", tmp_path / "run", "--format", "open_clip", "--output", output)
    assert result.returncode == 0, result.stderr
    images = pictures(backbone)
    with torch.no_grad():
        expected = backbone.image_embedding(images)
    assert close(embeddings(open_clip.create_model("visft-tiny", pretrained=str(output)), images), expected)


def _fails(capsys, *arguments):
    status = export_backbone.main([str(a) for a in arguments])
    error = capsys.readouterr().err.strip()
    assert status == 1 and "Traceback" not in error
    return error.splitlines()[-1]


def test_the_tool_refuses_in_one_sentence_and_leaves_nothing(tmp_path, capsys):
    backbone = tuned("visft-tiny")
    lora_file = export.lora(backbone, tmp_path / "lora.safetensors")
    output = tmp_path / "out" / "f.safetensors"
    common = ("--format", "open_clip", "--output", output, "--weights")
    assert "no such weight file" in _fails(capsys, *common, tmp_path / "absent.pt")
    (tmp_path / "empty.pt").write_bytes(b"")
    assert "is empty" in _fails(capsys, *common, tmp_path / "empty.pt")
    error = _fails(capsys, *common, lora_file, "MODEL.CLIP_VIT.NAME", "ViT-B-16")
    assert "MODEL.CLIP_VIT.NAME ViT-B-16" in error
    assert "MODEL.LORA.RANK is 8" in _fails(capsys, *common, lora_file, "MODEL.LORA.RANK", "8")
    assert "MODEL.CLIP_VIT.NAME" in _fails(capsys, *common, lora_file, "MODEL.CLIP_VIT.NAMES", "ViT-B-16")
    wrong = ("--weights", lora_file, "--format", "open_clip", "--output", tmp_path / "out" / "f.pt")
    assert "must end in .safetensors" in _fails(capsys, *wrong)
    error = _fails(capsys, *common[:-1], "--interpolate", "0.5", "1.5", "--weights", lora_file)
    assert "--interpolate 1.5" in error
    assert not (tmp_path / "out").exists()


def test_the_tool_writes_one_file_a_mixture(tmp_path, in_process, capsys):
    torch.manual_seed(5)
    torch.save(open_clip.create_model("visft-tiny").state_dict(), tmp_path / "base.pt")
    backbone = tuned("visft-tiny", pretrained=str(tmp_path / "base.pt"))
    weights = export.lora(backbone, tmp_path / "lora.safetensors")
    output = tmp_path / "out" / "tower.safetensors"
    arguments = [
        "--weights",
        weights,
        "--format",
        "open_clip",
        "--output",
        output,
        "--interpolate",
        "0.5",
        "1",
    ]
    assert export_backbone.main([*map(str, arguments), "MODEL.DEVICE", "cpu"]) == 0
    weights = ["tower-0.50.safetensors", "tower-1.00.safetensors"]
    cards = [f"{name}.md" for name in weights]
    assert sorted(os.listdir(tmp_path / "out")) == sorted(["open_clip_config.json", *weights, *cards])


def test_a_lora_file_of_another_base_is_refused(tmp_path):
    path = export.lora(tuned(), tmp_path / "lora.safetensors")
    torch.manual_seed(9)
    other = lora.inject(CLIPViT.from_open_clip("test-vit"), rank=2, alpha=2.0)
    with pytest.raises(CheckpointError, match="other base weights"):
        load.load_tower(other, path)
