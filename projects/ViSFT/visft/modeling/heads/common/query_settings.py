"""What the heads with learned queries, DETR and Mask2Former, read alike from their config nodes."""

from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec

from visft.modeling.heads.common.federated import build_federated
from visft.modeling.heads.common.label_space import label_space


def query_head_settings(cfg: CfgNode, name: str, input_shape: ShapeSpec) -> dict[str, Any]:
    """The constructor's arguments that both kinds of head have.

    Args:
        name: of the head; its node is `MODEL.VISFT.<NAME>`.

    Raises:
        ConfigError: the classes, or how frequent they are, cannot be told (see `label_space`, `build_federated`).
    """
    node, labels = cfg.MODEL.VISFT[name.upper()], label_space(cfg, name)
    return {
        "in_channels": input_shape.channels,
        "labels": labels,
        "num_queries": node.NUM_QUERIES,
        "encoder_layers": node.ENCODER_LAYERS,
        "decoder_layers": node.DECODER_LAYERS,
        "num_attention_heads": node.NUM_ATTENTION_HEADS,
        "feedforward_dim": node.FEEDFORWARD_DIM,
        "no_object_weight": node.NO_OBJECT_WEIGHT,
        "class_weight": node.CLASS_WEIGHT,
        "class_loss": node.CLASS_LOSS,
        "federated": build_federated(cfg, name, labels),
        "max_detections": cfg.TEST.DETECTIONS_PER_IMAGE,
    }
