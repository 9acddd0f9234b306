"""The layouts of the authors' released files (heads and LoRA), recognised by the names of tensors."""

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from visft.errors import CheckpointError

T = TypeVar("T")

HEAD_PREFIX = "visft_heads."
_NOT_HEADS = {
    "backbone.": "of the tower, which is no part of the heads",
    "segment_head.": "a second copy of the segmentation head",
}
_TOWER = ("backbone.", "visual.")
_FILES = {"caption": "captioning", "segment": "segmentation", "detection": "detection"}
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
    """Whether these are names of the authors' head files."""
    return any(name.startswith(HEAD_PREFIX) for name in names)


def head_of_file(path: str | os.PathLike) -> str | None:
    """Return the head that a released file is used for, from its file name (`eva_g_segment_heads.ckpt`). None: unknown.

    The authors' training saved all heads into each file. Only the head in the file's name is the trained one.
    """
    found = re.search(r"_(caption|segment|detection)_heads?\b", Path(path).name)
    return _FILES[found[1]] if found else None


def split_heads(tensors: Mapping[str, T], only: str | None = None) -> dict[str, dict[str, T]]:
    """Sort the tensors of a head file by head, under our heads' own parameter names.

    The segmentation head's names contain `segment`, the captioning head's `caption`, the detection head's
    neither.

    Args:
        only: the head to take, from `head_of_file`. None: all.
    """
    heads: dict[str, dict[str, T]] = {}
    for name, tensor in tensors.items():
        inner = name.removeprefix(HEAD_PREFIX)
        if inner == name or inner.startswith(tuple(_NOT_HEADS)):
            continue
        head = _head(inner)
        for old, new in _RENAMES[head].items():
            if inner.startswith(old):
                inner = new + inner.removeprefix(old)
        if only in (None, head):
            heads.setdefault(head, {})[inner] = tensor
    return heads


def ignored_in_heads(
    names: Iterable[str], path: str | os.PathLike, only: str | None = None
) -> dict[str, str]:
    """Return the names of a head file that `split_heads` ignores, each with the reason.

    Raises:
        CheckpointError: a name is neither a head's nor one that may be ignored.
    """
    ignored = {}
    for name in names:
        inner = name.removeprefix(HEAD_PREFIX)
        reason = next((why for start, why in _NOT_HEADS.items() if inner.startswith(start)), None)
        if reason is None and name.startswith(_TOWER):
            reason = _NOT_HEADS["backbone."]
        if reason is None and inner == name:
            raise CheckpointError(
                f"{path}: {name} is no name of the authors' head files, where all begin with `{HEAD_PREFIX}`; take it "
                "out, or give the file as it was released."
            )
        if reason is None and only not in (None, _head(inner)):
            reason = f"of another head: by its name the file is for `{only}`"
        if reason is not None:
            ignored[name] = reason
    return ignored


def _head(inner: str) -> str:
    return "segmentation" if "segment" in inner else "captioning" if "caption" in inner else "detection"


_LORA = re.compile(r"(?:visual\.)?(?:trunk\.)?blocks\.(\d+)\.attn\.qkv\.lora_([AB])")


def is_lora_file(names: Iterable[str]) -> bool:
    """Whether these are names of the authors' LoRA files."""
    return any(_LORA.fullmatch(name) for name in names)


def lora_names(names: Iterable[str]) -> dict[int, tuple[str, str]]:
    """Return the names of A and B of each block in a LoRA file."""
    found: dict[int, dict[str, str]] = {}
    for name in names:
        if match := _LORA.fullmatch(name):
            found.setdefault(int(match[1]), {})[match[2]] = name
    return {block: (pair["A"], pair["B"]) for block, pair in sorted(found.items()) if len(pair) == 2}


def check_lora(shapes: Mapping[str, tuple[int, ...]], path: str | os.PathLike) -> tuple[int, int, int]:
    """Check that a LoRA file has A `[2r, C]` and B `[2C, r]` of every block from 0 on, and nothing else.

    Returns:
        Width C, number of blocks, and rank r.

    Raises:
        CheckpointError: names the tensor that is missing, unknown or of another shape.
    """
    odd = [name for name in shapes if not _LORA.fullmatch(name) and not name.startswith(HEAD_PREFIX)]
    if odd:
        raise CheckpointError(f"{path}: has {len(odd)} tensors that are not LoRA's ({', '.join(odd[:3])}).")
    names = lora_names(shapes)
    depth = 1 + max(int(match[1]) for name in shapes if (match := _LORA.fullmatch(name)))
    gaps = [block for block in range(depth) if block not in names]
    if gaps:
        raise CheckpointError(
            f"{path}: lacks lora_A or lora_B of block {gaps[0]} of {depth}; the file is incomplete: fetch it again."
        )
    rows, width = (shapes[names[0][0]] + (0, 0))[:2]
    rank = rows // 2
    for a, b in names.values():
        for name, expected in ((a, (2 * rank, width)), (b, (2 * width, rank))):
            if shapes[name] != expected:
                raise CheckpointError(
                    f"{path}: {name} has shape {list(shapes[name])}, the others' width and rank make it "
                    f"{list(expected)}; the file is broken or of another layout."
                )
    return width, depth, rank


def split_lora(tensors: Mapping[str, Tensor]) -> dict[tuple[int, str], tuple[Tensor, Tensor]]:
    """Return a LoRA file as `{(block, "q" or "v"): (A [r, C], B [C, r])}`.

    In the file, q and v of a block are one tensor, q above v. The update is (1 / r) B A for every r.

    Raises:
        CheckpointError: as `check_lora`.
    """
    check_lora({name: tuple(tensor.shape) for name, tensor in tensors.items()}, "LoRA file")
    pairs = {}
    for block, (a, b) in lora_names(tensors).items():
        halves = zip("qv", tensors[a].chunk(2), tensors[b].chunk(2), strict=True)
        pairs |= {(block, target): (a_half, b_half) for target, a_half, b_half in halves}
    return pairs


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
