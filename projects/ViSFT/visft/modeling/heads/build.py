"""Heads by name: the registry, and building one from a config."""

from collections.abc import Mapping

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.utils.registry import Registry

from visft.errors import ConfigError
from visft.modeling.heads.base import VisftHead

VISFT_HEADS_REGISTRY = Registry("VISFT_HEADS")
VISFT_HEADS_REGISTRY.__doc__ = """
Heads that fine-tune a tower. An entry is a subclass of `VisftHead`, called as `head(cfg, name, input_shape)`: `name` is
the head's name in MODEL.VISFT.HEADS, whose node MODEL.VISFT.<NAME> holds its keys.
"""


def head_names(cfg: CfgNode) -> list[str]:
    """The names that MODEL.VISFT.HEADS may have: those of the nodes with a key HEAD."""
    nodes = cfg.MODEL.VISFT.items()
    return [key.lower() for key, value in nodes if isinstance(value, CfgNode) and "HEAD" in value]


def build_head(cfg: CfgNode, name: str, input_shape: ShapeSpec | Mapping[str, ShapeSpec]) -> VisftHead:
    """Build the head `name` of MODEL.VISFT.HEADS.

    Args:
        input_shape: of the map that the head reads, or what a backbone's `output_shape()` gives (one map).

    Raises:
        ConfigError: if there is no node MODEL.VISFT.<NAME>, or its HEAD is not registered.
    """
    node = cfg.MODEL.VISFT.get(name.upper())
    if not isinstance(node, CfgNode) or "HEAD" not in node:
        raise ConfigError(
            f"MODEL.VISFT.HEADS names {name!r}, which has no config node: known are {', '.join(head_names(cfg))}"
        )
    if node.HEAD not in VISFT_HEADS_REGISTRY:
        known = [key for key, _ in VISFT_HEADS_REGISTRY]
        raise ConfigError(
            f"MODEL.VISFT.{name.upper()}.HEAD is {node.HEAD!r}, which is not registered: "
            f"known are {', '.join(known)}"
        )
    return VISFT_HEADS_REGISTRY.get(node.HEAD)(cfg, name, single_map(input_shape))


def single_map(input_shape: ShapeSpec | Mapping[str, ShapeSpec]) -> ShapeSpec:
    """The shape of the one map in `input_shape`.

    Raises:
        ConfigError: if the backbone gives several maps.
    """
    if isinstance(input_shape, ShapeSpec):
        return input_shape
    if len(input_shape) != 1:
        raise ConfigError(
            f"a ViSFT head reads one feature map, but MODEL.BACKBONE.NAME gives {len(input_shape)} "
            f"({', '.join(input_shape)}): use build_clip_vit_backbone"
        )
    return next(iter(input_shape.values()))
