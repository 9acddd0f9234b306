"""CLIP vision towers as detectron2 backbones."""

from . import lora, open_clip_zoo
from .clip_vit import CLIPViT
from .fpn import ClipFeaturePyramid, build_clip_vit_backbone, build_clip_vit_fpn_backbone, build_pyramid
from .layer_decay import lr_factor

__all__ = [
    "CLIPViT",
    "ClipFeaturePyramid",
    "build_clip_vit_backbone",
    "build_clip_vit_fpn_backbone",
    "build_pyramid",
    "lora",
    "lr_factor",
    "open_clip_zoo",
]

open_clip_zoo.install()
