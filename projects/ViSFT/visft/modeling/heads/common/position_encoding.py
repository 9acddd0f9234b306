"""Sine position encoding of a feature map."""

import math

import torch
from torch import Tensor


def sine_position_encoding(valid: Tensor, dim: int, temperature: float = 10000.0) -> Tensor:
    """Position of each cell as sines of many wavelengths (DETR, arXiv 2005.12872, appendix A.4).

    The position of a cell is its count among the valid cells of its column (row), relative to the last valid one.

    Args:
        valid: [N, h, w] bool, False where the map is padding.
        dim: channels, a multiple of 4: half for y, then half for x, sine and cosine alternating.

    Returns:
        [N, dim, h, w] float32.
    """
    half = dim // 2
    channel = torch.arange(half, device=valid.device, dtype=torch.float32)
    frequency = temperature ** (-2 * torch.div(channel, 2, rounding_mode="floor") / half)

    def encode(axis: int) -> Tensor:
        count = valid.cumsum(axis, dtype=torch.float32)
        last = count.narrow(axis, count.shape[axis] - 1, 1)
        angle = (count / (last + 1e-6) * 2 * math.pi)[..., None] * frequency
        return torch.stack((angle[..., 0::2].sin(), angle[..., 1::2].cos()), dim=-1).flatten(-2)

    return torch.cat((encode(1), encode(2)), dim=-1).permute(0, 3, 1, 2)
