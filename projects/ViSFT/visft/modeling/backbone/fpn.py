"""Builders for detectron2's configs: a CLIPViT alone, and under a feature pyramid."""

import math
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, SimpleFeaturePyramid
from detectron2.modeling.backbone.fpn import LastLevelMaxPool

from visft.errors import ConfigError
from visft.modeling.backbone import lora
from visft.modeling.backbone.clip_vit import FEATURE, CLIPViT
from visft.utils import mixed_precision


class ClipFeaturePyramid(SimpleFeaturePyramid):
    """detectron2's SimpleFeaturePyramid, with batches padded to what its coarsest own level needs.

    detectron2 announces that under a misspelt key, so that levels of odd sizes could not be added up again.
    """

    @property
    def size_divisibility(self) -> int:
        """Stride in pixels of the coarsest level made from the map itself."""
        return self._size_divisibility

    @property
    def padding_constraints(self) -> dict[str, int]:
        """As `size_divisibility`; `square_size` as given at construction."""
        return {"size_divisibility": self._size_divisibility, "square_size": self._square_pad}


def wants_lora(cfg: CfgNode) -> bool:
    """Whether adapters are needed: TRAIN `lora`, or a ViSFT run with that stage, unless it tunes all weights."""
    visft = cfg.MODEL.META_ARCHITECTURE == "ViSFT" and "lora" in cfg.VISFT.STAGES
    return cfg.MODEL.CLIP_VIT.TRAIN == "lora" or (visft and cfg.MODEL.VISFT.TUNE == "lora")


def tower_options(cfg: CfgNode, *, pyramid: bool = False) -> dict[str, Any]:
    """The keywords of `CLIPViT` that `cfg.MODEL.CLIP_VIT` gives. Under a pyramid, PATCH_SIZE is 16 unless it is set.

    Raises:
        ConfigError: there is no such FROZEN_DTYPE, or PATCH_SIZE is no power of two of 8 or more under a pyramid, whose
            levels' names and poolers need it.
    """
    node = cfg.MODEL.CLIP_VIT
    stride = node.PATCH_SIZE or (16 if pyramid else 0)
    if pyramid and (stride < 8 or stride & (stride - 1)):
        raise ConfigError(
            f"MODEL.CLIP_VIT.PATCH_SIZE is {stride}; the feature pyramid needs a power of two, 8 or more (16 gives "
            "p2 to p6)."
        )
    return {
        "class_token": node.CLASS_TOKEN,
        "patch_size": stride,
        "window_size": node.WINDOW_SIZE,
        "global_blocks": node.GLOBAL_BLOCKS,
        "activation_checkpointing": node.ACTIVATION_CHECKPOINTING,
        "memory_budget_gib": node.MEMORY_BUDGET_GIB,
        "offload_activations": node.OFFLOAD_ACTIVATIONS,
        "frozen_dtype": mixed_precision.frozen_type(cfg),
    }


def _build(cfg: CfgNode, input_shape: ShapeSpec, *, pyramid: bool = False) -> CLIPViT:
    node = cfg.MODEL.CLIP_VIT
    if input_shape is not None and input_shape.channels != 3:
        raise ConfigError(
            f"MODEL.PIXEL_MEAN has {input_shape.channels} entries; a CLIP tower sees 3 channels (INPUT.FORMAT RGB)."
        )
    backbone = CLIPViT.from_open_clip(
        node.NAME,
        node.PRETRAINED or None,
        **tower_options(cfg, pyramid=pyramid),
        # Where the whole model will go: with eight processes the machine's memory would not hold eight towers.
        device=cfg.MODEL.DEVICE if torch.cuda.is_available() or cfg.MODEL.DEVICE == "meta" else "cpu",
    )
    if wants_lora(cfg):
        lora.inject(backbone, **lora.options(cfg))
    backbone.set_train(node.TRAIN)
    return backbone


@BACKBONE_REGISTRY.register()
def build_clip_vit_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> CLIPViT:
    """A CLIPViT with one map, `last_feat`, from `cfg.MODEL.CLIP_VIT` and `cfg.MODEL.LORA`."""
    return _build(cfg, input_shape)


@BACKBONE_REGISTRY.register()
def build_clip_vit_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ClipFeaturePyramid:
    """A CLIPViT under ViTDet's simple feature pyramid: p2 to p6 at stride 16, which is PATCH_SIZE's default here.

    Raises:
        ConfigError: PATCH_SIZE does not fit a pyramid (see `tower_options`).
    """
    return build_pyramid(_build(cfg, input_shape, pyramid=True), cfg.MODEL.CLIP_VIT.FPN_CHANNELS)


def build_pyramid(backbone: CLIPViT, out_channels: int = 256) -> ClipFeaturePyramid:
    """The pyramid over a CLIPViT: four levels from a quarter of its stride to twice, and one pooled from the last."""
    pool = LastLevelMaxPool()
    pool.in_feature = (
        f"p{int(math.log2(backbone.stride)) + 1}"  # detectron2's is p5, right for stride 16 alone
    )
    return ClipFeaturePyramid(
        net=backbone,
        in_feature=FEATURE,
        out_channels=out_channels,
        scale_factors=(4.0, 2.0, 1.0, 0.5),
        top_block=pool,
        norm="LN",
    )
