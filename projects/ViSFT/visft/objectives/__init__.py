"""Objectives of the tower itself, beside or instead of heads in stage `lora`, and their registry."""

from visft.objectives.anchor import Anchor
from visft.objectives.base import Objective
from visft.objectives.batch import Batch
from visft.objectives.contrastive import Contrastive
from visft.objectives.group import ObjectiveGroup
from visft.objectives.registry import (
    VISFT_OBJECTIVES_REGISTRY,
    build_objectives,
    objective_class,
    objective_names,
)
from visft.objectives.self_distillation import SelfDistillation

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
