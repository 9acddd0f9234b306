"""Heads by name: the registry, and building one from a config."""

from collections.abc import Mapping

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.utils.registry import Registry

from visft.errors import ConfigError, check_one_of
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


def head_class(cfg: CfgNode, name: str) -> type[VisftHead]:
    """The class of the head `name`.

    Raises:
        ConfigError: there is no node MODEL.VISFT.<NAME>, or its HEAD is not registered.
    """
    check_one_of("MODEL.VISFT.HEADS", name, head_names(cfg))
    wanted = cfg.MODEL.VISFT[name.upper()].HEAD
    check_one_of(f"MODEL.VISFT.{name.upper()}.HEAD", wanted, [entry for entry, _ in VISFT_HEADS_REGISTRY])
    return VISFT_HEADS_REGISTRY.get(wanted)


def build_head(cfg: CfgNode, name: str, input_shape: ShapeSpec | Mapping[str, ShapeSpec]) -> VisftHead:
    """Build the head `name` of MODEL.VISFT.HEADS.

    Args:
        input_shape: of the map that the head reads, or what a backbone's `output_shape()` gives (one map).

    Raises:
        ConfigError: see `head_class`.
    """
    shape = input_shape if isinstance(input_shape, ShapeSpec) else single_map(input_shape)[1]
    return head_class(cfg, name)(cfg, name, shape)


def single_map(maps: Mapping[str, ShapeSpec]) -> tuple[str, ShapeSpec]:
    """Name and shape of the one map that a backbone gives.

    Raises:
        ConfigError: it gives several.
    """
    if len(maps) != 1:
        raise ConfigError(
            f"a ViSFT head reads one feature map, but MODEL.BACKBONE.NAME gives {len(maps)} ({', '.join(maps)}): use "
            "build_clip_vit_backbone"
        )
    return next(iter(maps.items()))
