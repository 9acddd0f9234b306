"""Task heads that fine-tune a tower, and their registry."""

from visft.modeling.heads.base import HeadInputs, VisftHead
from visft.modeling.heads.build import VISFT_HEADS_REGISTRY, build_head, head_names
from visft.modeling.heads.captioning.captioning_head import Caption, CaptioningHead
from visft.modeling.heads.captioning.lstm_head import CaptionHead
from visft.modeling.heads.captioning.transformer_head import TransformerCaptionHead
from visft.modeling.heads.captioning.vocabulary import Vocabulary
from visft.modeling.heads.common.label_space import LabelSpace, label_space
from visft.modeling.heads.detr.detr_head import DETRHead
from visft.modeling.heads.mask2former.mask2former_head import Mask2FormerHead
from visft.modeling.heads.region_text_head import RegionText, RegionTextHead

__all__ = [
    "VISFT_HEADS_REGISTRY",
    "Caption",
    "CaptionHead",
    "CaptioningHead",
    "DETRHead",
    "HeadInputs",
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
