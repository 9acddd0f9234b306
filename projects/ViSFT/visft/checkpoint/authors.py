"""The layouts of the authors' released files (heads and LoRA), by name."""

import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

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


_LORA = re.compile(r"(?:visual\.)?(?:trunk\.)?blocks\.(\d+)\.attn\.qkv\.lora_([AB])")


def is_lora_file(names: Iterable[str]) -> bool:
    """Whether names are those of the authors' LoRA files."""
    return any(_LORA.fullmatch(name) for name in names)


def split_lora(tensors: Mapping[str, Tensor]) -> dict[tuple[int, str], tuple[Tensor, Tensor]]:
    """A LoRA file as `{(block, "q" or "v"): (A [r, C], B [C, r])}`.

    Both of a block lie in one tensor, q above v. Their update is (1 / r) B A, whatever r is.
    """
    parts: dict[tuple[int, str], dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if found := _LORA.fullmatch(name):
            for target, half in zip("qv", tensor.chunk(2), strict=True):
                parts.setdefault((int(found[1]), target), {})[found[2]] = half
    return {key: (pair["A"], pair["B"]) for key, pair in parts.items() if len(pair) == 2}


def join_lora(
    pairs: Mapping[tuple[int, str], tuple[Tensor, Tensor]], rank: int, alpha: float, depth: int, width: int
) -> dict[str, Tensor]:
    """The inverse of `split_lora` for an update (alpha / rank) B A; blocks without adapters get zeros."""
    tensors = {}
    for block in range(depth):
        none = torch.zeros(rank, width), torch.zeros(width, rank)
        q, v = (pairs.get((block, target), none) for target in "qv")
        name = f"visual.blocks.{block}.attn.qkv.lora_"
        tensors[f"{name}A"] = torch.cat([q[0].cpu(), v[0].cpu()])
        tensors[f"{name}B"] = alpha * torch.cat([q[1].cpu(), v[1].cpu()])
    return tensors
