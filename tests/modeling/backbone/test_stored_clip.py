"""Pretrained CLIPs built on `meta`, the wanted weights streamed in, against open_clip's own loading."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
import small_eva
import torch
import transformers
from families import NATIVE, TIMM, images_for, randomise, shrunk
from safetensors.torch import load_file, save_file

from visft.errors import CheckpointError
from visft.modeling.backbone import CLIPViT, lora, open_clip_models

HELPERS = Path(small_eva.__file__).parent


def stored(name: str, path: Path) -> str:
    """A file of an architecture's random weights, no norm or bias at its first value."""
    clip = open_clip.create_model(name, pretrained_text=False)
    if hasattr(clip, "text_decoder"):  # which open_clip leaves as the memory was, perhaps NaN
        torch.nn.init.zeros_(clip.text_decoder.text_projection)
    randomise(clip)
    save_file({n: t.contiguous() for n, t in clip.state_dict().items()}, path)
    return str(path)


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@torch.no_grad()
@pytest.mark.parametrize("name", NATIVE + TIMM)
def test_every_family_is_open_clips_to_the_bit(name, tmp_path):
    """Parameters, buffers that no file holds (masks, rotary tables), outputs, and what is drawn afterwards."""
    with shrunk(name) as small:
        path = stored(small, tmp_path / "base.safetensors")
        torch.manual_seed(5)
        theirs = open_clip.create_model(small, pretrained=path).eval()
        drawn = torch.rand(3)
        torch.manual_seed(5)
        ours = CLIPViT.from_open_clip(small, path).eval()
        assert torch.equal(torch.rand(3), drawn), "fresh heads and LoRA would be others"
        text = ours.base_clip(visual=False)
    same(dict(ours.tower.named_parameters()), dict(theirs.visual.named_parameters()))
    same(dict(ours.tower.named_buffers()), dict(theirs.visual.named_buffers()))
    assert ours.tower.preprocess_cfg == theirs.visual.preprocess_cfg and ours.tower.image_mean
    images, texts = images_for(theirs), torch.randint(1, 60, (2, 8))
    assert torch.equal(ours.image_embedding(images), CLIPViT(theirs.visual).eval().image_embedding(images))
    found, expected = ours.tower(images), theirs.visual(images)
    for one, other in zip(*(x if isinstance(x, tuple) else (x,) for x in (found, expected)), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(text.encode_text(texts), theirs.encode_text(texts))
    assert not any(n.startswith("visual.") for n, _ in text.named_parameters())


def other_grid(tensors):
    return tensors | {"visual.positional_embedding": torch.randn(26, 64)}


def other_context(tensors):
    return tensors | {"positional_embedding": torch.randn(5, 32)}


def half(tensors):
    return {name: tensor.half() for name, tensor in tensors.items()}


def text_at_the_root(tensors):
    return {name.removeprefix("text."): tensor for name, tensor in tensors.items()}


def scale_of_one_dimension(tensors):
    return tensors | {"logit_scale": tensors["logit_scale"].reshape(1)}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("ViT-B-32", other_grid),
        ("ViT-B-32", other_context),
        ("ViT-B-32", half),
        ("ViT-B-32", scale_of_one_dimension),
        ("EVA02-B-16", text_at_the_root),
    ],
)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_what_open_clip_converts_is_converted(name, change, suffix, tmp_path):
    path = tmp_path / f"base{suffix}"
    with shrunk(name) as small:
        tensors = change(load_file(stored(small, tmp_path / "drawn.safetensors")))
        save_file(tensors, path) if suffix == ".safetensors" else torch.save({"state_dict": tensors}, path)
        clip, base = open_clip_models.create_clip(small, str(path))
        expected = open_clip.create_model(small, pretrained=str(path))
    same(clip.state_dict(), expected.state_dict())
    assert base.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_tied_weights_and_text_towers_of_hugging_face(tmp_path, monkeypatch):
    """transformers' T5 has one embedding under two names."""
    text = transformers.MT5Config(
        vocab_size=90, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2, tie_word_embeddings=True
    )
    text.save_pretrained(tmp_path / "text")
    about = {"hf_model_name": str(tmp_path / "text"), "hf_proj_type": "mlp", "hf_pooler_type": "mean_pooler"}
    vision = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 8}
    monkeypatch.setitem(
        open_clip.factory._MODEL_CONFIGS,
        "test-t5",
        {"embed_dim": 64, "vision_cfg": vision, "text_cfg": about},
    )
    theirs = open_clip.create_model("test-t5", pretrained_text=False)
    torch.save(theirs.state_dict(), tmp_path / "base.pt")
    clip, _ = open_clip_models.create_clip("test-t5", str(tmp_path / "base.pt"))
    same(clip.state_dict(), theirs.state_dict())
    assert len(list(clip.parameters())) == len(list(theirs.parameters()))


@pytest.mark.parametrize("file", ["base.safetensors", "base.pt", "eva_clip.pt"])
def test_files_of_eva_clip_load_as_open_clips(tmp_path, file):
    name, path = small_eva.register(32, 3), str(tmp_path / file)
    tensors = small_eva.draw(name)
    named = small_eva.eva_clip_names(tensors) if "eva" in file else tensors
    save_file(named, path) if file.endswith("s") else torch.save(named, path)
    clip, _ = open_clip_models.create_clip(name, path)
    theirs = open_clip.create_model(name).eval()
    theirs.load_state_dict(tensors)
    same(clip.state_dict(), theirs.state_dict())
    # It trains as any other.
    backbone = lora.inject(CLIPViT.from_open_clip(name, path), rank=2)
    backbone(torch.randn(2, 3, 28, 28))["last_feat"].square().mean().backward()
    assert all(p.grad is not None for n, p in backbone.named_parameters() if n.endswith("lora_B"))
    low, _ = open_clip_models.create_clip(name, path, torch.bfloat16)
    assert {p.dtype for p in low.parameters()} == {torch.bfloat16}
    del named[next(n for n in named if n.endswith("trunk.norm.bias") or n == "visual.norm.bias")]
    save_file(named, path) if file.endswith("s") else torch.save(named, path)
    with pytest.raises(CheckpointError, match="PRETRAINED: .*visual.trunk.norm.bias"):
        CLIPViT.from_open_clip(name, path)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_frozen_weights_are_stored_as_they_are_read(tmp_path, dtype):
    with shrunk("EVA02-B-16") as small:
        path = stored(small, tmp_path / "base.safetensors")
        theirs = CLIPViT(open_clip.create_model(small, pretrained=path).visual, frozen_dtype=dtype)
        ours = CLIPViT.from_open_clip(small, path, frozen_dtype=dtype)
    same(ours.state_dict(), theirs.state_dict())
    assert not any(p.requires_grad for p in ours.parameters())


PROCESS = """
import gc, json, sys
sys.path.insert(0, sys.argv[1])
import small_eva
from visft.modeling.backbone import CLIPViT, open_clip_models
from visft.checkpoint import stream
stream.CHUNK, stream.REMAP = 1 << 20, 4 << 20
peak = lambda: int([line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")][0])

def beyond(kept, path, words):
    small_eva.TEXT.update(vocab_size=words)
    name = small_eva.register(512, 8, heads=8)
    open_clip_models.meta_clip(name)
    gc.collect()
    open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
    before = peak()
    if kept == "whole":
        made = open_clip_models.create_clip(name, path)[0]
    else:
        made = CLIPViT.from_open_clip(name, path, **({"frozen_dtype": "bfloat16"} if kept == "low" else {}))
    return (peak() - before) * 1024 - sum(p.numel() * p.element_size() for p in made.parameters())

print(json.dumps([beyond(*case) for case in json.loads(sys.argv[2])]))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc")
def test_what_is_kept_is_in_memory_once(tmp_path, monkeypatch):
    """100 MB of a tower, and in one case 90 MB of text tower: open_clip's way takes all of it, twice."""
    cases = []
    for kept, words in (("low", 100), ("whole", 100), ("tower", 700_000)):
        monkeypatch.setitem(small_eva.TEXT, "vocab_size", words)
        file = str(tmp_path / f"{words}.safetensors")
        save_file(small_eva.draw(small_eva.register(512, 8, heads=8)), file)
        cases.append((kept, file, words))
    command = [sys.executable, "-c", PROCESS, str(HELPERS), json.dumps(cases)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    beyond = json.loads(result.stdout.splitlines()[-1])
    assert all(size < 30e6 for size in beyond), beyond
