"""A small Mask R-CNN on one map, as a head."""

from detectron2.config import CfgNode, get_cfg
from detectron2.layers import ShapeSpec

from visft import add_visft_config
from visft.modeling.heads import build_head
from visft.modeling.heads.rcnn_head import RCNNHead

KEYS = {
    "MODEL.VISFT.DETECTION.HEAD": "RCNNHead",
    "MODEL.VISFT.DETECTION.NUM_CLASSES": 3,
    "MODEL.MASK_ON": True,
    "MODEL.ANCHOR_GENERATOR.SIZES": [[16, 32]],
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 40,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 20,
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": 32,
    "MODEL.ROI_HEADS.NAME": "StandardROIHeads",
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 16,
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0,
    "MODEL.ROI_BOX_HEAD.NAME": "FastRCNNConvFCHead",
    "MODEL.ROI_BOX_HEAD.NUM_FC": 1,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 32,
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 4,
    "MODEL.ROI_MASK_HEAD.NAME": "MaskRCNNConvUpsampleHead",
    "MODEL.ROI_MASK_HEAD.NUM_CONV": 1,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 8,
    "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION": 4,
    "TEST.DETECTIONS_PER_IMAGE": 10,
}


def config(**options) -> CfgNode:
    """`options` by their keys, `__` for a dot."""
    cfg = get_cfg()
    add_visft_config(cfg)
    keys = KEYS | {key.replace("__", "."): value for key, value in options.items()}
    cfg.merge_from_list([part for pair in keys.items() for part in pair])
    return cfg


def build(channels: int, stride: int = 16, **options) -> RCNNHead:
    return build_head(config(**options), "detection", ShapeSpec(channels=channels, stride=stride))
