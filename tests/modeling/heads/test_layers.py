"""Attention, positions and deformable attention against slower ways to compute them."""

import math

import pytest
import torch
from torch import nn

from visft.errors import ConfigError
from visft.modeling.heads.common.layers import Attention
from visft.modeling.heads.common.position_encoding import sine_position_encoding
from visft.modeling.heads.mask2former.pixel_decoder import DeformableAttention


@pytest.mark.parametrize("same", [True, False])
def test_attention_is_torchs_multihead_attention(same):
    ours, torchs = Attention(24, 4), nn.MultiheadAttention(24, 4, batch_first=True)
    nn.init.normal_(torchs.in_proj_bias)
    ours.load_state_dict(torchs.state_dict())
    query, value = torch.randn(2, 5, 24), torch.randn(2, 5 if same else 7, 24)
    key = query if same else torch.randn(2, 7, 24)
    allowed = torch.rand(2, 5, key.shape[1]) > 0.3
    allowed[..., 0] = True
    expected, _ = torchs(query, key, value, attn_mask=~allowed.repeat_interleave(4, dim=0))
    torch.testing.assert_close(ours(query, key, value, allowed[:, None]), expected)


def test_attention_drops_in_training_only():
    attention, x = Attention(24, 4, dropout=0.5), torch.randn(1, 6, 24)
    assert not torch.equal(attention(x, x, x), attention(x, x, x))
    attention.eval()
    assert torch.equal(attention(x, x, x), attention(x, x, x))


def test_attention_refuses_a_width_that_does_not_divide():
    with pytest.raises(ConfigError, match="24.*multiple of 5"):
        Attention(24, 5)


def test_sine_positions_cell_by_cell():
    valid = torch.ones(2, 5, 7, dtype=torch.bool)
    valid[1, 4:], valid[1, :, 5:] = False, False
    encoding = sine_position_encoding(valid, 12)
    assert encoding.shape == (2, 12, 5, 7)
    for n, (height, width) in enumerate([(5, 7), (4, 5)]):
        for y in range(height):
            for x in range(width):
                for offset, count, last in ((0, y + 1, height), (6, x + 1, width)):
                    for i in range(6):
                        angle = count / (last + 1e-6) * 2 * math.pi / 10000 ** (2 * (i // 2) / 6)
                        expected = math.cos(angle) if i % 2 else math.sin(angle)
                        assert encoding[n, offset + i, y, x].item() == pytest.approx(expected, abs=1e-5)


def bilinear(image: torch.Tensor, x: float, y: float) -> torch.Tensor:
    """Value [D] of a map [D, h, w] at pixel coordinates (cell centres at integers), zeros outside."""
    total = torch.zeros(image.shape[0])
    for row in (math.floor(y), math.floor(y) + 1):
        for column in (math.floor(x), math.floor(x) + 1):
            if 0 <= row < image.shape[1] and 0 <= column < image.shape[2]:
                total += (1 - abs(y - row)) * (1 - abs(x - column)) * image[:, row, column]
    return total


@torch.no_grad()
def test_deformable_attention_point_by_point():
    h, w, dim, heads, points = 3, 5, 12, 3, 4
    attention = DeformableAttention(dim, heads, points)
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.7)
    query, value = torch.randn(2, 4, dim), torch.randn(2, h * w, dim)
    reference = torch.rand(4, 2)
    out = attention(query, value, reference, (h, w))

    maps = attention.value_proj(value).view(2, h, w, heads, dim // heads)
    offsets = attention.sampling_offsets(query).view(2, 4, heads, points, 2)
    weights = attention.attention_weights(query).view(2, 4, heads, points).softmax(-1)
    outside = 0
    for n in range(2):
        for q in range(4):
            parts = []
            for head in range(heads):
                image, part = maps[n, :, :, head].permute(2, 0, 1), 0
                for point in range(points):
                    # An offset of 1 is one cell.
                    x = reference[q, 0].item() * w + offsets[n, q, head, point, 0].item() - 0.5
                    y = reference[q, 1].item() * h + offsets[n, q, head, point, 1].item() - 0.5
                    outside += not (0 <= x <= w - 1 and 0 <= y <= h - 1)
                    part = part + weights[n, q, head, point] * bilinear(image, x, y)
                parts.append(part)
            expected = attention.output_proj(torch.cat(parts))
            torch.testing.assert_close(out[n, q], expected, atol=1e-5, rtol=1e-4)
    assert outside > 3


def test_fresh_deformable_attention_looks_around_each_cell():
    attention = DeformableAttention(16, 4, num_points=2)
    offsets = attention.sampling_offsets(torch.randn(1, 1, 16)).view(4, 2, 2)
    expected = torch.tensor([[[1.0, 0], [2, 0]], [[0, 1], [0, 2]], [[-1, 0], [-2, 0]], [[0, -1], [0, -2]]])
    torch.testing.assert_close(offsets, expected, atol=1e-6, rtol=0)
