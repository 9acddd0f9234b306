"""The builders that detectron2's configs name."""

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_backbone

from visft import add_visft_config
from visft.errors import ConfigError
from visft.modeling.backbone import CLIPViT, lora


def config(builder: str, *options):
    cfg = get_cfg()
    add_visft_config(cfg)
    cfg.merge_from_list(
        ["MODEL.BACKBONE.NAME", builder, "MODEL.CLIP_VIT.NAME", "visft-tiny", "MODEL.DEVICE", "cpu", *options]
    )
    return cfg


@torch.no_grad()
@pytest.mark.parametrize(
    "patch_size, levels", [(0, "p2 p3 p4 p5 p6"), (8, "p1 p2 p3 p4 p5"), (32, "p3 p4 p5 p6 p7")]
)
def test_pyramid(patch_size, levels):
    options = ("MODEL.CLIP_VIT.PATCH_SIZE", patch_size, "MODEL.CLIP_VIT.FPN_CHANNELS", 32)
    backbone = build_backbone(config("build_clip_vit_fpn_backbone", *options)).eval()
    shapes = backbone.output_shape()
    assert list(shapes) == levels.split()
    assert all(shape.stride == 2 ** int(name[1:]) and shape.channels == 32 for name, shape in shapes.items())
    step = 2 * (patch_size or 16)
    assert backbone.size_divisibility == backbone.padding_constraints["size_divisibility"] == step
    features = backbone(torch.randn(1, 3, 3 * step, 2 * step))
    for name, shape in shapes.items():
        assert features[name].shape[1] == 32
        if name != levels.split()[-1]:
            assert features[name].shape[2:] == (3 * step // shape.stride, 2 * step // shape.stride)


def test_pyramid_needs_a_power_of_two():
    with pytest.raises(ConfigError, match="PATCH_SIZE is 14"):
        build_backbone(config("build_clip_vit_fpn_backbone", "MODEL.CLIP_VIT.PATCH_SIZE", 14))


def test_every_key_arrives():
    keys = {
        "MODEL.CLIP_VIT.CLASS_TOKEN": "drop",
        "MODEL.CLIP_VIT.PATCH_SIZE": 16,
        "MODEL.CLIP_VIT.WINDOW_SIZE": 3,
        "MODEL.CLIP_VIT.GLOBAL_BLOCKS": (1, 7),
        "MODEL.CLIP_VIT.TRAIN": "lora",
        "MODEL.CLIP_VIT.ACTIVATION_CHECKPOINTING": True,
        "MODEL.CLIP_VIT.FROZEN_DTYPE": "bfloat16",
        "MODEL.LORA.RANK": 3,
        "MODEL.LORA.ALPHA": 6.0,
        "MODEL.LORA.DROPOUT": 0.1,
        "MODEL.LORA.LAST_BLOCKS": 2,
        "MODEL.LORA.TARGETS": ("k", "fc2"),
    }
    backbone = build_backbone(config("build_clip_vit_backbone", *(x for pair in keys.items() for x in pair)))
    assert isinstance(backbone, CLIPViT)
    assert (backbone.class_token, backbone.stride, backbone.window_size) == ("drop", 16, 3)
    assert backbone.global_blocks == {1, 7} and backbone.activation_checkpointing
    assert backbone.blocks[0].attn.in_proj_weight.dtype == torch.bfloat16
    sites = [(site.block, site.projection.target) for site in lora.sites(backbone)]
    assert sites == [(6, "k"), (6, "fc2"), (7, "k"), (7, "fc2")]
    adapter = next(lora.sites(backbone)).adapter
    assert adapter.lora_A.shape == (3, 192) and adapter.scaling == 2 and adapter.dropout == 0.1
    assert adapter.lora_A.requires_grad


@pytest.mark.parametrize(
    "architecture, stages, train, injected",
    [
        ("GeneralizedRCNN", ("heads", "lora"), "none", False),
        ("GeneralizedRCNN", ("heads",), "lora", True),
        ("GeneralizedRCNN", ("heads",), "full", False),
        ("ViSFT", ("heads", "lora"), "none", True),
        ("ViSFT", ("heads",), "none", False),
    ],
)
def test_when_lora_is_injected(architecture, stages, train, injected):
    options = ("MODEL.META_ARCHITECTURE", architecture, "VISFT.STAGES", stages, "MODEL.CLIP_VIT.TRAIN", train)
    backbone = build_backbone(config("build_clip_vit_backbone", *options))
    assert lora.has_lora(backbone) == injected
    assert backbone.train_mode == train
    assert any(p.requires_grad for p in backbone.parameters()) == (train != "none")


def test_a_tower_sees_three_channels():
    with pytest.raises(ConfigError, match="PIXEL_MEAN has 1 entries"):
        build_backbone(config("build_clip_vit_backbone", "MODEL.PIXEL_MEAN", [0.0], "MODEL.PIXEL_STD", [1.0]))
