"""Task heads that fine-tune a tower, and their registry."""

from visft.heads.base import VisftHead
from visft.heads.caption import CaptionHead
from visft.heads.caption_transformer import TransformerCaptionHead
from visft.heads.captioning import Caption, CaptioningHead
from visft.heads.detr import DETRHead
from visft.heads.labels import LabelSpace, label_space
from visft.heads.mask2former import Mask2FormerHead
from visft.heads.region_text import RegionText, RegionTextHead
from visft.heads.registry import VISFT_HEADS_REGISTRY, build_head, head_names
from visft.heads.vocabulary import Vocabulary

__all__ = [
    "VISFT_HEADS_REGISTRY",
    "Caption",
    "CaptionHead",
    "CaptioningHead",
    "DETRHead",
    "LabelSpace",
    "Mask2FormerHead",
    "RegionText",
    "RegionTextHead",
    "TransformerCaptionHead",
    "VisftHead",
    "Vocabulary",
    "build_head",
    "head_names",
    "label_space",
]
