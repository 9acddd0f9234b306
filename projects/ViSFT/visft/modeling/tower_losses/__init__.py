"""Losses on the tower itself, with or instead of heads in stage `lora`, and their registry."""

from visft.modeling.tower_losses.anchor import Anchor
from visft.modeling.tower_losses.base import Objective
from visft.modeling.tower_losses.batch import Batch
from visft.modeling.tower_losses.build import (
    VISFT_OBJECTIVES_REGISTRY,
    ObjectiveGroup,
    build_objectives,
    objective_class,
    objective_names,
)
from visft.modeling.tower_losses.contrastive import Contrastive
from visft.modeling.tower_losses.self_distillation import SelfDistillation

__all__ = [
    "VISFT_OBJECTIVES_REGISTRY",
    "Anchor",
    "Batch",
    "Contrastive",
    "Objective",
    "ObjectiveGroup",
    "SelfDistillation",
    "build_objectives",
    "objective_class",
    "objective_names",
]
