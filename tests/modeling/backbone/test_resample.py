"""Resampling of position and patch embeddings, against timm's and by what it must preserve."""

import pytest
import torch
import torch.nn.functional as F
from families import images_for, relative, small_clip
from timm.layers import resample_abs_pos_embed
from timm.layers.patch_embed import resample_patch_embed

from visft.modeling.backbone import CLIPViT
from visft.modeling.backbone.resample import resample_patch_weight, resize_position


@pytest.mark.parametrize("old, new", [(14, 16), (16, 8), (14, 8), (32, 16)])
def test_patch_weight_as_timm(old, new):
    weight = torch.randn(5, 3, old, old)
    assert relative(resample_patch_weight(weight, new), resample_patch_embed(weight, [new, new])) < 1e-5


def test_patch_weight_passes_gradients():
    weight = torch.randn(2, 3, 14, 14, requires_grad=True)
    resample_patch_weight(weight, 16).square().sum().backward()
    assert weight.grad.abs().sum() > 0


@pytest.mark.parametrize("new", [(3, 9), (4, 4), (8, 5)])
@pytest.mark.parametrize("antialias", [True, False])
def test_position_as_timm(new, antialias):
    grid = torch.randn(4, 4, 6)
    expected = resample_abs_pos_embed(grid.reshape(1, 16, 6), list(new), [4, 4], 0, antialias=antialias)
    assert relative(resize_position(grid, new, antialias).reshape(1, -1, 6), expected) < 1e-6


@torch.no_grad()
@pytest.mark.parametrize("name, patch", [("ViT-H-14-378", 16), ("ViT-B-16-plus-240", 8), ("EVA02-L-14", 16)])
def test_patch_size_sees_an_enlarged_image_as_the_tower_sees_the_image(name, patch):
    clip = small_clip(name)
    images = images_for(clip)
    own = images.shape[-1] // 4
    # Patch by patch, so that no pixel of a neighbour mixes in.
    patches = F.unfold(images, own, stride=own).transpose(1, 2).reshape(-1, 3, own, own)
    resized = F.interpolate(patches, size=(patch, patch), mode="bicubic", align_corners=False, antialias=True)
    columns = resized.reshape(len(images), 16, -1).transpose(1, 2)
    scaled = F.fold(columns, (4 * patch, 4 * patch), patch, stride=patch)
    native = CLIPViT(clip.visual).eval()(images)["last_feat"]
    backbone = CLIPViT(clip.visual, patch_size=patch).eval()
    found = backbone(scaled)["last_feat"]
    assert backbone.output_shape()["last_feat"].stride == patch and found.shape == native.shape
    if patch > own:
        assert relative(found, native) < 1e-3
    else:  # halving loses detail: close, not equal
        assert 1e-3 < relative(found, native) < 1
    assert [p.shape for p in backbone.parameters()] == [p.shape for p in clip.visual.parameters()]
