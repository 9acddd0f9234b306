"""Objectives by name: the registry, and building those of a config."""

import difflib

from detectron2.config import CfgNode
from detectron2.utils.registry import Registry

from visft.errors import ConfigError
from visft.modeling.backbone import CLIPViT
from visft.modeling.backbone.untuned_tower import OriginalTower
from visft.modeling.tower_losses.base import Objective
from visft.modeling.tower_losses.tower_losses import ObjectiveGroup

VISFT_OBJECTIVES_REGISTRY = Registry("VISFT_OBJECTIVES")
VISFT_OBJECTIVES_REGISTRY.__doc__ = """
Objectives of the tower itself. An entry is a subclass of `Objective`, called as `objective(cfg, name, backbone)`:
`name` is that in MODEL.VISFT.OBJECTIVES; its node MODEL.VISFT.<NAME> holds OBJECTIVE (the entry), WEIGHT and its keys.
"""


def objective_names(cfg: CfgNode) -> list[str]:
    """The names that MODEL.VISFT.OBJECTIVES may have: those of the nodes with a key OBJECTIVE."""
    nodes = cfg.MODEL.VISFT.items()
    return [key.lower() for key, value in nodes if isinstance(value, CfgNode) and "OBJECTIVE" in value]


def objective_class(cfg: CfgNode, name: str) -> type[Objective]:
    """The class of the objective `name`.

    Raises:
        ConfigError: there is no node MODEL.VISFT.<NAME>, or its OBJECTIVE is not registered; says the nearest name.
    """
    known = objective_names(cfg)
    if name not in known:
        raise ConfigError(_unknown("MODEL.VISFT.OBJECTIVES", name, known))
    wanted = cfg.MODEL.VISFT[name.upper()].OBJECTIVE
    if wanted not in VISFT_OBJECTIVES_REGISTRY:
        classes = [entry for entry, _ in VISFT_OBJECTIVES_REGISTRY]
        raise ConfigError(_unknown(f"MODEL.VISFT.{name.upper()}.OBJECTIVE", wanted, classes))
    return VISFT_OBJECTIVES_REGISTRY.get(wanted)


def build_objectives(cfg: CfgNode, backbone: CLIPViT) -> ObjectiveGroup:
    """The objectives of MODEL.VISFT.OBJECTIVES, of a tower that is not tuned yet; none without stage `lora`.

    Raises:
        ConfigError: a name is unknown, or a key out of range.
    """
    names = tuple(cfg.MODEL.VISFT.OBJECTIVES) if "lora" in cfg.VISFT.STAGES else ()
    built = {name: objective_class(cfg, name)(cfg, name, backbone) for name in names}
    original = OriginalTower(backbone) if any(part.needs_original for part in built.values()) else None
    return ObjectiveGroup(built, original)


def _unknown(key: str, name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
    return f"{key}: `{name}` is unknown; the nearest is `{near}` (known: {', '.join(sorted(known))})"
