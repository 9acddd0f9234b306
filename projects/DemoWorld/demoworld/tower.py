"""The demo tower `visft-tiny`, a small CLIP that is registered with open_clip, and its zero-shot test."""

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

NAME, TAG = "visft-tiny", "demo"
CONFIG_FILE = Path(__file__).with_name(f"{NAME}.json")
WEIGHTS_FILE = Path(__file__).with_name("weights") / "visft_tiny_demo.safetensors"


def register(open_clip: ModuleType) -> None:
    """Register the architecture `visft-tiny` and its tag `demo`, the shipped weights, with an imported open_clip.

    Then `open_clip.create_model("visft-tiny", pretrained="demo")` works offline. This function may be called again.
    """
    if NAME not in open_clip.list_models():
        open_clip.add_model_config(CONFIG_FILE)
    # open_clip has no function to add a tag. Its table is a dictionary, in which `file` is the entry for local files.
    tags = open_clip.pretrained._PRETRAINED.setdefault(NAME, {})
    tags[TAG] = {
        "file": str(WEIGHTS_FILE),
        "mean": open_clip.OPENAI_DATASET_MEAN,
        "std": open_clip.OPENAI_DATASET_STD,
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }


def register_open_clip() -> None:
    """Import open_clip and `register` the tower."""
    import open_clip

    register(open_clip)


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
"""Captions of single emoji in pretraining. They are also the prompts of zero-shot classification."""


@torch.no_grad()
def class_embeddings(
    model: nn.Module, names: Sequence[str], templates: Sequence[str] = TEMPLATES
) -> torch.Tensor:
    """Return text embeddings of unit length `[len(names), D]`: means over templates."""
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
    """Return the zero-shot accuracy in per cent.

    Args:
        model: an open_clip CLIP in evaluation mode.
        batches: pairs of normalised images `[B, 3, H, W]` and labels `[B]`.
        classes: text embeddings of unit length `[C, D]`.

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
