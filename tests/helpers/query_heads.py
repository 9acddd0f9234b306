"""Small heads that match their queries with objects, and what goes into them."""

from collections.abc import Callable

import torch

from visft.modeling.heads import DETRHead, HeadInputs, LabelSpace, Mask2FormerHead

SMALL = {
    "in_channels": 12,
    "num_queries": 6,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "num_attention_heads": 4,
}


def detr(labels: LabelSpace | None = None, **options) -> DETRHead:
    sizes = SMALL | {"encoder_dim": 16, "decoder_dim": 24, "feedforward_dim": 32, "dropout": 0.0}
    return DETRHead(labels=labels or LabelSpace(5), **(sizes | options))


def mask2former(labels: LabelSpace | None = None, **options) -> Mask2FormerHead:
    sizes = SMALL | {"dim": 32, "feedforward_dim": 48, "encoder_feedforward_dim": 48, "num_points": 64}
    return Mask2FormerHead(labels=labels or LabelSpace(5), **(sizes | options))


KINDS: dict[str, Callable] = {"detr": detr, "mask2former": mask2former}


def maps(count: int = 4, side: int = 4) -> torch.Tensor:
    """Random features [count, 12, side, side]."""
    return torch.randn(count, 12, side, side)


def inputs(features: torch.Tensor, images: list[dict], padded: tuple[int, int] = (64, 64)) -> HeadInputs:
    """As many features as images, which are all as large as the batch, but for those whose instances say otherwise."""
    features = features[: len(images)]
    mask = torch.zeros(len(images), *features.shape[-2:], dtype=torch.bool, device=features.device)
    sizes = [image["instances"].image_size if "instances" in image else padded for image in images]
    return HeadInputs(features, mask, images, sizes, padded)


def losses(head, features: torch.Tensor, images: list[dict], normalizers=None, seed: int = 3) -> dict:
    torch.manual_seed(seed)
    return head.losses(
        inputs(features, images), head.normalizers(images) if normalizers is None else normalizers
    )


def gradients(head, losses: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    names, parameters = zip(*head.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(sum(losses.values()), parameters), strict=True))
