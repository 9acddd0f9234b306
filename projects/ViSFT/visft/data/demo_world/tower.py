"""The demo tower `visft-tiny`: a CLIP in miniature that open_clip knows by name, and its zero-shot test."""

import logging
from collections.abc import Sequence

import torch
from torch import nn

from visft.backbone import open_clip_zoo

logger = logging.getLogger(__name__)

NAME, TAG = open_clip_zoo.TINY, open_clip_zoo.TINY_TAG
CONFIG_FILE, WEIGHTS_FILE = open_clip_zoo.TINY_CONFIG, open_clip_zoo.TINY_WEIGHTS


def register_open_clip() -> None:
    """Make open_clip know the architecture `visft-tiny` and its tag `demo`, the shipped weights.

    Afterwards `open_clip.create_model("visft-tiny", pretrained="demo")` works, offline. May be called again.
    """
    open_clip_zoo.open_clip()


TEMPLATES = (
    "{}",
    "a picture of {}",
    "an emoji of {}",
    "a photo of a {}",
    "the {} emoji",
    "a drawing of a {}",
    "a small {} on a coloured background",
    "one {}",
)
"""Captions of single emoji in pretraining, and the prompts of zero-shot classification."""


@torch.no_grad()
def class_embeddings(
    model: nn.Module, names: Sequence[str], templates: Sequence[str] = TEMPLATES
) -> torch.Tensor:
    """Unit text embeddings `[len(names), D]`, the mean over templates."""
    from open_clip.tokenizer import SimpleTokenizer

    tokenizer = SimpleTokenizer(context_length=model.context_length)
    total = 0
    for template in templates:
        tokens = tokenizer([template.format(name) for name in names])
        parts = [model.encode_text(part, normalize=True) for part in tokens.split(512)]
        total = total + torch.cat(parts)
    return torch.nn.functional.normalize(total, dim=-1)


@torch.no_grad()
def zero_shot(
    model: nn.Module, batches: Sequence[tuple[torch.Tensor, torch.Tensor]], classes: torch.Tensor
) -> dict[str, float]:
    """Zero-shot accuracy, in per cent.

    Args:
        model: an open_clip CLIP in evaluation mode.
        batches: `(normalised images [B, 3, H, W], labels [B])` each.
        classes: unit text embeddings `[C, D]`.

    Returns:
        `{"top1": ..., "top5": ..., "images": number of images}`.
    """
    top1 = top5 = count = 0
    for images, labels in batches:
        logits = model.encode_image(images, normalize=True) @ classes.T
        hits = logits.topk(min(5, len(classes)), dim=1).indices == labels[:, None]
        top1 += int(hits[:, 0].sum())
        top5 += int(hits.any(1).sum())
        count += len(labels)
    return {"top1": 100 * top1 / count, "top5": 100 * top5 / count, "images": count}
