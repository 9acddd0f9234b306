"""Attention within windows."""

import pytest
import torch
from families import relative, small_clip

from visft.errors import ConfigError
from visft.modeling.backbone import CLIPViT
from visft.modeling.backbone.windows import Windows


@pytest.mark.parametrize("grid, size", [((4, 6), 2), ((5, 7), 3), ((2, 3), 8), ((1, 5), 2)])
@pytest.mark.parametrize("prefix", [0, 1])
def test_join_is_the_inverse_of_split(grid, size, prefix):
    windows = Windows(grid, size, prefix)
    x = torch.randn(2, prefix + grid[0] * grid[1], 5)
    assert torch.allclose(windows.join(windows.split(x)), x, atol=1e-6)


def test_split_puts_neighbours_together_and_masks_padding():
    windows = Windows((3, 3), 2, 1)
    x = torch.cat([torch.full((1, 1, 1), -1.0), torch.arange(9.0).reshape(1, 9, 1)], dim=1)
    tokens = windows.split(x)[..., 0].tolist()
    mask = windows.mask(1, x.device)[:, 0, 0].tolist()
    seen = [[t for t, real in zip(*pair, strict=True) if real] for pair in zip(tokens, mask, strict=True)]
    assert seen == [[-1, 0, 1, 3, 4], [-1, 2, 5], [-1, 6, 7], [-1, 8]]


@pytest.mark.parametrize("name", ["ViT-B-16-quickgelu", "EVA02-B-16", "PE-Core-B-16", "ViT-B-16-SigLIP"])
@pytest.mark.parametrize("class_token", ["keep", "drop"])
@torch.no_grad()
def test_a_window_as_large_as_the_grid_is_global_attention(name, class_token):
    clip = small_clip(name)
    images = torch.randn(2, 3, 80, 48)
    whole = CLIPViT(clip.visual, class_token=class_token).eval()(images)["last_feat"]
    one = CLIPViT(clip.visual, class_token=class_token, window_size=5).eval()(images)["last_feat"]
    assert relative(one, whole) < 1e-5


@pytest.mark.parametrize("name", ["ViT-B-16-quickgelu", "EVA02-B-16"])
@torch.no_grad()
def test_windows_are_images_of_their_own_up_to_position(name):
    # Patches alone, no absolute position: the windows of an image are what the tower makes of the cut-outs. Rotary
    # position is relative, so it agrees as well.
    clip = small_clip(name)
    table = clip.visual.trunk.pos_embed if hasattr(clip.visual, "trunk") else clip.visual.positional_embedding
    table.zero_()
    backbone = CLIPViT(clip.visual, class_token="drop", window_size=3, global_blocks=(2,)).eval()
    backbone.global_blocks = frozenset()
    images = torch.randn(1, 3, 5 * 16, 6 * 16)
    found = backbone(images)["last_feat"]
    rope = backbone._parts.rope((5, 6), images.device)
    for top, left, bottom, right in ((0, 0, 3, 3), (0, 3, 3, 6), (3, 0, 5, 3), (3, 3, 5, 6)):
        part = CLIPViT(clip.visual, class_token="drop").eval()
        if rope is not None:  # the same spacing of positions as in the whole image
            cut = rope.unflatten(0, (5, 6))[top:bottom, left:right].flatten(0, 1)
            part._parts.rope = lambda grid, device, cut=cut: cut
        expected = part(images[:, :, top * 16 : bottom * 16, left * 16 : right * 16])["last_feat"]
        assert relative(found[:, :, top:bottom, left:right], expected) < 1e-5


def test_global_blocks_default_to_every_fourth_with_the_last():
    clip = small_clip("ViT-B-32", depth=9)
    assert CLIPViT(clip.visual, window_size=2).global_blocks == {0, 4, 8}
    with pytest.raises(ConfigError, match="GLOBAL_BLOCKS has 9; the tower's blocks are 0 to 8"):
        CLIPViT(clip.visual, window_size=2, global_blocks=(9,))


@torch.no_grad()
def test_windows_and_global_blocks_both_matter():
    clip = small_clip("ViT-B-16-quickgelu")
    images = torch.randn(1, 3, 96, 96)
    maps = [
        CLIPViT(clip.visual, window_size=size, global_blocks=blocks).eval()(images)["last_feat"]
        for size, blocks in ((0, ()), (2, (2,)), (2, (0, 2)), (3, (2,)))
    ]
    for i, a in enumerate(maps):
        for b in maps[i + 1 :]:
            assert relative(a, b) > 1e-3
