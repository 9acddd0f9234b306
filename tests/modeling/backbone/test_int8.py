"""Frozen weights stored as int8: rounded to the nearest step, computed with as such, and refused in time."""

import copy

import pytest
import torch
from families import relative, small_clip
from torch.nn import functional as F

from visft.engine import checks
from visft.engine.settings import load_config
from visft.errors import ConfigError
from visft.modeling.backbone import CLIPViT, lora
from visft.modeling.backbone.frozen_weights import is_int8

pytest.importorskip("torchao")
FAMILIES = ("ViT-B-16-quickgelu", "ViT-B-16-SigLIP", "EVA02-B-16", "EVA02-E-14-plus")


def step(backbone: CLIPViT, images: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    backbone.zero_grad()
    features = backbone(images)["last_feat"].float()
    features.square().mean().backward()
    return features.detach(), [p.grad for p in backbone.parameters() if p.grad is not None]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("amp", [None, torch.bfloat16])
@pytest.mark.parametrize("name", FAMILIES)
def test_it_computes_as_with_rounded_weights(name, amp, checkpointing):
    clip = small_clip(name)
    plain = CLIPViT(copy.deepcopy(clip.visual))
    stored = CLIPViT(clip.visual, frozen_dtype="int8", activation_checkpointing=checkpointing)
    matrices = [p for b in stored.blocks for p in b.parameters() if p.ndim > 1]
    assert len(matrices) >= 4 * len(stored.blocks) and all(map(is_int8, matrices))
    with torch.no_grad():
        for own, low in zip(plain.blocks, stored.blocks, strict=True):
            for weight, found in zip(own.parameters(), low.parameters(), strict=True):
                if weight.ndim > 1:
                    steps = (
                        weight.abs().amax(1, keepdim=True) / 127.5
                    )  # from an output channel's largest to its negative
                    assert ((found.dequantize() - weight).abs() <= 0.501 * steps).all()
                    weight.copy_(found.dequantize())
    for backbone in (plain, stored):
        torch.manual_seed(1)
        lora.inject(backbone, rank=2)
        for site in lora.sites(backbone):
            torch.nn.init.normal_(site.adapter.lora_B)
    images = torch.randn(2, 3, 64, 64)
    with torch.autocast("cpu", amp or torch.bfloat16, enabled=amp is not None):
        expected, gradients = step(plain, images)
        found, own = step(stored, images)
    limit = 0.02 if amp else 1e-5
    assert relative(found, expected) < limit
    assert own and all(relative(a, b) < 5 * limit for a, b in zip(own, gradients, strict=True))
    with pytest.raises(ConfigError, match="FROZEN_DTYPE is int8"):
        lora.merge(stored)


def test_what_it_costs(root):
    """The demo tower's features and embeddings of noise of all sizes; `-s` shows the figures of the page on exports."""
    plain = CLIPViT.from_open_clip("visft-tiny", "demo").eval()
    images = torch.cat([F.interpolate(torch.randn(4, 3, s, s), 128) for s in (2, 4, 8, 16, 64)])
    for kind, limit in (("bfloat16", 0.999), ("int8", 0.999)):
        stored = CLIPViT.from_open_clip("visft-tiny", "demo", frozen_dtype=kind).eval()
        with torch.no_grad():
            cells = [b(images)["last_feat"].flatten(2).transpose(1, 2) for b in (plain, stored)]
            whole = [b.image_embedding(images) for b in (plain, stored)]
        near = [F.cosine_similarity(*pair, dim=-1) for pair in (cells, whole)]
        print(kind, *(f"{1 - float(c.mean()):.1e} (at most {1 - float(c.min()):.1e})" for c in near))
        assert all(c.mean() > limit for c in near)


def test_what_excludes_it_is_said_before_the_run(root):
    def config(*words: str):
        keys = ["MODEL.CLIP_VIT.FROZEN_DTYPE", "int8", *words]
        return load_config(str(root / "configs" / "visft_demo.yaml"), keys)

    with pytest.raises(ConfigError, match="FROZEN_DTYPE cannot be cut"):
        checks.check(config("VISFT.STRATEGY", "FSDP2"), here=False)
    with pytest.raises(ConfigError, match="FROZEN_DTYPE is int8: all weights train"):
        checks.check(config("MODEL.VISFT.TUNE", "full"), here=False)
