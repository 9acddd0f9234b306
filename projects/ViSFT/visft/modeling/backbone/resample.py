"""Resampling of what fixes a vision transformer to one image size: its position embedding and its patch embedding."""

from functools import lru_cache

import torch
import torch.nn.functional as F


def resize_position(grid: torch.Tensor, size: tuple[int, int], antialias: bool = True) -> torch.Tensor:
    """Resize a grid of position embeddings bicubically.

    Args:
        grid: `[h0, w0, C]`.
        size: the new `(h, w)` in patches.
        antialias: True is how timm and open_clip resize. ViSFT's authors resize with False, which differs even when
            enlarging, as PyTorch then uses another cubic kernel (a = -0.75 instead of -0.5).

    Returns:
        `[h, w, C]`; `grid` itself when nothing changes.
    """
    if tuple(grid.shape[:2]) == tuple(size):
        return grid
    channels_first = grid.permute(2, 0, 1)[None].float()
    resized = F.interpolate(
        channels_first, size=size, mode="bicubic", align_corners=False, antialias=antialias
    )
    return resized[0].permute(1, 2, 0).to(grid.dtype)


@lru_cache(maxsize=16)
def _patch_projection(old: int, new: int) -> torch.Tensor:
    """The matrix `[new * new, old * old]` that takes a patch filter of side `old` to one of side `new`."""
    with torch.inference_mode(False):  # cached: training may use what inference made
        basis = torch.eye(old * old, dtype=torch.float64).reshape(old * old, 1, old, old)
        resized = F.interpolate(basis, size=(new, new), mode="bicubic", align_corners=False, antialias=True)
        resize = resized.reshape(
            old * old, new * new
        )  # its transpose is B in the paper: resize(patch) = B patch
        return torch.linalg.pinv(resize).float()


def resample_patch_weight(weight: torch.Tensor, size: int) -> torch.Tensor:
    """Resample the filters of a patch embedding to another patch size by pseudo-inverse resizing.

    The new filter answers a resized patch as the old one answers the patch itself, exactly when enlarging and in the
    least-squares sense when shrinking: w' = (B^T)^+ w, with B the matrix that resizes a patch (FlexiViT,
    arXiv:2212.08013, equation 4).

    Args:
        weight: `[C, 3, p, p]`. Gradients flow back to it.
        size: the new side in pixels.

    Returns:
        `[C, 3, size, size]`; `weight` itself when the side does not change.
    """
    old = weight.shape[-1]
    if old == size:
        return weight
    projection = _patch_projection(old, size).to(weight.device)
    return (weight.flatten(2).float() @ projection.T).unflatten(2, (size, size)).to(weight.dtype)
