"""CLIPs built on `meta`, weights streamed in, against open_clip's own loading."""

import json
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
import small_eva
import torch
from safetensors.torch import save_file

from visft.backbone import CLIPViT, lora
from visft.checkpoint import stream_load
from visft.errors import CheckpointError

HERE = Path(__file__).parent


TEXT = {"context_length": 8, "vocab_size": 100, "width": 32, "heads": 2, "layers": 1}
SMALL = {
    "test-plain": {"vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8}},
    "test-rotary": {
        "custom_text": True,
        "vision_cfg": {"timm_model_name": "eva02_tiny_patch14_224", "timm_proj": None, "image_size": 224},
    },
    "test-resnet": {"quick_gelu": True, "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8}},
    "test-coca": {
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 8, "output_tokens": True},
        "text_cfg": {**TEXT, "embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {**TEXT, "attn_pooler_heads": 2},
        "custom_text": True,
    },
}


@pytest.mark.parametrize("name", ["visft-tiny", "test_eva_32_3", *SMALL])
def test_a_built_model_lacks_nothing_but_its_parameters(tmp_path, name):
    """All kinds of CLIP of open_clip; buffers that no file holds (masks, rotary tables) have their values."""
    small_eva.register(32, 3)
    if name in SMALL:
        (tmp_path / f"{name}.json").write_text(json.dumps({"embed_dim": 64, "text_cfg": TEXT, **SMALL[name]}))
        open_clip.add_model_config(tmp_path)
    clip, theirs = stream_load.build(name), open_clip.create_model(name, load_weights=False)
    assert type(clip) is type(theirs)
    assert all(parameter.is_meta for parameter in clip.parameters())
    buffers, expected = dict(clip.named_buffers()), dict(theirs.named_buffers())
    assert buffers.keys() == expected.keys() and all(torch.equal(buffers[n], b) for n, b in expected.items())
    assert [(n, p.shape) for n, p in clip.named_parameters()] == [
        (n, p.shape) for n, p in theirs.named_parameters()
    ]
    assert (
        clip.visual.image_mean == theirs.visual.image_mean
        and clip.visual.image_size == theirs.visual.image_size
    )


@pytest.mark.parametrize("file", ["base.safetensors", "base.pt", "eva_clip.pt"])
def test_it_embeds_as_open_clips_model(tmp_path, file):
    name = small_eva.register(32, 3)
    tensors = small_eva.draw(name)
    named = small_eva.eva_clip_names(tensors) if "eva" in file else tensors
    save_file(named, tmp_path / file) if file.endswith("s") else torch.save(named, tmp_path / file)
    clip, base = stream_load.load_clip(name, tmp_path / file)
    theirs = open_clip.create_model(name).eval()
    theirs.load_state_dict(tensors)
    images, texts = torch.randn(2, 3, 28, 28), torch.randint(1, 99, (2, 8))
    with torch.no_grad():
        assert torch.equal(clip.encode_image(images), theirs.encode_image(images))
        assert torch.equal(clip.encode_text(texts), theirs.encode_text(texts))
    assert not clip.training and base.name == name and base.clip() is clip
    # It trains as any other.
    backbone = lora.inject(CLIPViT(clip.visual, base=base), rank=2)
    backbone(images)["last_feat"].square().mean().backward()
    assert all(p.grad is not None for n, p in backbone.named_parameters() if n.endswith("lora_B"))
    half, _ = stream_load.load_clip(name, tmp_path / file, torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_a_base_that_does_not_fit_is_refused(tmp_path):
    name = small_eva.register(32, 3)
    tensors = small_eva.draw(name)
    del tensors["visual.trunk.norm.bias"]
    save_file(tensors, tmp_path / "base.safetensors")
    with pytest.raises(
        CheckpointError, match="lacks 1 of the tensors of test_eva_32_3 .visual.trunk.norm.bias"
    ):
        stream_load.load_clip(name, tmp_path / "base.safetensors")
    with pytest.raises(CheckpointError, match="its text tower is no open_clip's"):
        stream_load.build("roberta-ViT-B-32")


PROCESS = """
import sys
sys.path.insert(0, sys.argv[1])
import small_eva
name = small_eva.register(512, 8, heads=8)
from visft.backbone import open_clip_zoo
from visft.checkpoint import stream_load
peak = lambda: int([line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")][0])
open_clip_zoo.meta_clip(name)
before = peak()
clip, _ = (stream_load.load_clip if sys.argv[3] == "ours" else open_clip_zoo.create_clip)(name, sys.argv[2])
print((peak() - before) * 1024 / sum(p.numel() * 4 for p in clip.parameters()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_one_copy_of_the_weights_is_in_memory(tmp_path):
    """100 MB of weights: open_clip's way takes them twice."""
    save_file(small_eva.draw(small_eva.register(512, 8, heads=8)), tmp_path / "base.safetensors")
    command = [sys.executable, "-c", PROCESS, str(HERE), str(tmp_path / "base.safetensors"), "ours"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout.split()[-1]) < 1.3
