"""The layouts of the authors' released files (heads and LoRA), by name."""

from collections.abc import Iterable, Mapping
from typing import TypeVar

T = TypeVar("T")

HEAD_PREFIX = "visft_heads."
_NOT_HEADS = ("backbone.", "segment_head.")  # the tower, and a second copy of the segmentation head
_RENAMES = {
    "detection": {
        "transformer.decoders.detection.detection_coco.": "transformer.decoder.",
        "query_embeds.detection.detection_coco.": "query_embeds.",
    },
    "segmentation": {
        "segment_pixel_decoder.": "pixel_decoder.",
        "segment_predictor.": "predictor.",
    },
    "captioning": {"caption_decoder.": "decoder."},
}


def is_head_file(names: Iterable[str]) -> bool:
    """Whether names are those of the authors' head files."""
    return any(name.startswith(HEAD_PREFIX) for name in names)


def split_heads(tensors: Mapping[str, T]) -> dict[str, dict[str, T]]:
    """Sort the tensors of a head file by head, under our heads' own parameter names.

    The segmentation head's names contain `segment`, the captioning head's `caption`, the detection head's
    neither.
    """
    heads: dict[str, dict[str, T]] = {}
    for name, tensor in tensors.items():
        inner = name.removeprefix(HEAD_PREFIX)
        if inner == name or inner.startswith(_NOT_HEADS):
            continue
        head = "segmentation" if "segment" in inner else "captioning" if "caption" in inner else "detection"
        for old, new in _RENAMES[head].items():
            if inner.startswith(old):
                inner = new + inner.removeprefix(old)
        heads.setdefault(head, {})[inner] = tensor
    return heads
