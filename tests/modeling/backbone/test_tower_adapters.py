"""Every flavour of tower: the same embedding and features as open_clip's own forward, at any size."""

import copy
import re

import pytest
import torch
from families import NATIVE, REFUSED, TIMM, images_for, relative, small_clip
from timm.layers import resample_abs_pos_embed

from visft.errors import ConfigError
from visft.modeling.backbone import CLIPViT, open_clip_models
from visft.modeling.backbone.tower_adapters import adapt


@pytest.fixture(params=NATIVE + TIMM, scope="module")
def clip(request):
    return small_clip(request.param)


@torch.no_grad()
def test_embedding_equals_encode_image(clip):
    images = images_for(clip)
    expected = clip.encode_image(images, normalize=False)
    assert relative(CLIPViT(clip.visual).eval().image_embedding(images), expected) < 1e-5
    # Options for dense features leave the embedding alone.
    odd = CLIPViT(clip.visual, class_token="drop", patch_size=8, window_size=2).eval()
    assert relative(odd.image_embedding(images), expected) < 1e-5


@torch.no_grad()
def test_dense_features_equal_the_towers_own_last_tokens(clip):
    visual = clip.visual
    size = adapt(visual).patch_size * 4
    images = images_for(clip)[:, :, :size, :size]
    if hasattr(visual, "trunk"):
        trunk = copy.deepcopy(visual.trunk)
        trunk.set_input_size((size, size))
        expected = trunk.forward_intermediates(images, indices=1, intermediates_only=True)[0]
        norm = trunk.fc_norm if isinstance(trunk.norm, torch.nn.Identity) else trunk.norm
    else:
        expected = visual.forward_intermediates(images, indices=1)["image_intermediates"][0]
        norm = visual.attn_pool.ln_k if visual.attn_pool is not None else visual.ln_post
    expected = norm(expected.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    assert relative(CLIPViT(visual).eval()(images)["last_feat"], expected) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("grid", [(6, 9), (5, 3)])
def test_any_size_equals_a_tower_built_for_that_size(clip, grid):
    visual = copy.deepcopy(clip.visual)
    patch = adapt(visual).patch_size
    size = (grid[0] * patch, grid[1] * patch)
    images = torch.randn(1, 3, *size)
    backbone = CLIPViT(clip.visual).eval()
    found = backbone.image_embedding(images)
    if hasattr(visual, "trunk"):
        visual.trunk.set_input_size(size)  # timm's own resizing of position embedding and rotary grid
    else:
        table = resample_abs_pos_embed(
            visual.positional_embedding[None], list(grid), list(visual.grid_size), 1
        )
        visual.positional_embedding = torch.nn.Parameter(table[0])
    expected = visual(images)
    expected = expected[0] if isinstance(expected, tuple) else expected
    assert relative(found, expected) < 1e-5
    assert backbone(images)["last_feat"].shape == (1, 64, *grid)


def test_parameters_keep_their_names_and_identity(clip):
    backbone = CLIPViT(clip.visual)
    own = dict(clip.visual.named_parameters())
    ours = dict(backbone.named_parameters())
    assert set(ours) == {f"tower.{name}" for name in own}
    assert all(ours[f"tower.{name}"] is parameter for name, parameter in own.items())


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_plain_vit_is_refused(name):
    with pytest.raises(ConfigError, match="supported are plain vision transformers"):
        adapt(open_clip_models.meta_tower(name))


def test_every_architecture_of_open_clip_is_supported_or_refused_with_a_reason():
    open_clip = open_clip_models.open_clip()
    seen, supported = set(), set()
    for name in open_clip.list_models():
        vision = open_clip.get_model_config(name)["vision_cfg"]
        kind = str({k: v for k, v in vision.items() if k not in ("layers", "width", "image_size")})
        if "timm_model_name" in vision:
            kind = re.sub(r"(_\d+)+$", "", vision["timm_model_name"])  # without the size of images
        if kind in seen or name.startswith("small-"):
            continue
        seen.add(kind)
        try:
            adapt(open_clip_models.meta_tower(name))
            supported.add(name)
        except ConfigError as error:
            assert "supported are plain vision transformers" in str(error)
            refused = ("RN", "convnext", "ViTamin", "MobileCLIP", "swin", "vit_relpos")
            assert name.startswith(refused) and name != "MobileCLIP2-L-14", name
    assert len(supported) > 30


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize(
    "name", ["ViT-B-16", "ViT-B-16-SigLIP", "EVA02-B-16", "ViT-M-16-alt", "PE-Core-B-16"]
)
def test_real_sizes(name):
    backbone = CLIPViT.from_open_clip(name).eval()
    images = torch.randn(1, 3, *backbone.image_size)
    expected = backbone.base_clip().encode_image(images, normalize=False)
    assert relative(backbone.image_embedding(images), expected) < 1e-5
