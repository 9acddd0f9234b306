"""CLIP vision towers as detectron2 backbones."""

from visft.checkpoint import open_clip_models
from visft.modeling.backbone import lora
from visft.modeling.backbone.clip_vit import CLIPViT
from visft.modeling.backbone.fpn import (
    ClipFeaturePyramid,
    build_clip_vit_backbone,
    build_clip_vit_fpn_backbone,
    build_pyramid,
)
from visft.modeling.backbone.layer_decay import lr_factor

__all__ = [
    "CLIPViT",
    "ClipFeaturePyramid",
    "build_clip_vit_backbone",
    "build_clip_vit_fpn_backbone",
    "build_pyramid",
    "lora",
    "lr_factor",
    "open_clip_models",
]

open_clip_models.install()
