"""Task heads that fine-tune a tower, and their registry."""

from visft.heads.base import VisftHead
from visft.heads.detr import DETRHead
from visft.heads.labels import LabelSpace, label_space
from visft.heads.mask2former import Mask2FormerHead
from visft.heads.registry import VISFT_HEADS_REGISTRY, build_head

__all__ = [
    "VISFT_HEADS_REGISTRY",
    "DETRHead",
    "LabelSpace",
    "Mask2FormerHead",
    "VisftHead",
    "build_head",
    "label_space",
]
