"""Mask2Former's pixel decoder on one scale: deformable self-attention, then one pyramid step."""

import math

import torch
from detectron2.layers import Conv2d
from torch import Tensor, nn
from torch.nn import functional as F

from visft.modeling.heads.common.layers import check_divisible, xavier_init
from visft.modeling.heads.common.position_encoding import sine_position_encoding

_GROUPS = 32


class DeformableAttention(nn.Module):
    """Deformable attention on one map (arXiv 2010.04159, eq. 2), by `grid_sample`: no compiled extension.

    With each head, a cell attends to a few points around it, at offsets that it predicts.
    """

    def __init__(self, dim: int, num_heads: int, num_points: int = 4):
        super().__init__()
        check_divisible("attention width", dim, num_heads, "the number of heads")
        self.num_heads, self.num_points = num_heads, num_points
        self.sampling_offsets = nn.Linear(dim, num_heads * num_points * 2)
        self.attention_weights = nn.Linear(dim, num_heads * num_points)
        self.value_proj = nn.Linear(dim, dim)
        self.output_proj = nn.Linear(dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Each head starts with its own direction, its points at distances of 1, 2, ... cells, with equal weights."""
        nn.init.zeros_(self.sampling_offsets.weight)
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        angle = torch.arange(self.num_heads) * (2 * math.pi / self.num_heads)
        direction = torch.stack((angle.cos(), angle.sin()), dim=-1)
        direction = direction / direction.abs().amax(-1, keepdim=True)
        distance = torch.arange(1, self.num_points + 1)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_((direction[:, None] * distance[:, None]).flatten())
        for layer in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, query: Tensor, value: Tensor, reference: Tensor, size: tuple[int, int]) -> Tensor:
        """[N, L, D], [N, h * w, D] -> [N, L, D].

        Args:
            reference: [L, 2] where each query is: (x, y), 0..1 over the map.
            size: (h, w) of the map.
        """
        (n, length, _), (h, w) = query.shape, size
        heads, points = self.num_heads, self.num_points
        maps = self.value_proj(value).transpose(1, 2).reshape(n * heads, -1, h, w)
        # Locations in half precision would be off by whole cells on large maps.
        offsets = self.sampling_offsets(query).float().view(n, length, heads, points, 2)
        location = reference[:, None, None] + offsets / offsets.new_tensor([w, h])
        grid = (2 * location - 1).transpose(1, 2).reshape(n * heads, length, points, 2)
        weights = self.attention_weights(query).view(n, length, heads, points).softmax(-1)
        weights = weights.transpose(1, 2).reshape(n * heads, 1, length, points)
        # [n * heads, D / heads, length, points]
        sampled = F.grid_sample(maps.float(), grid, align_corners=False)
        attended = (sampled * weights).sum(-1).view(n, -1, length).transpose(1, 2)
        return self.output_proj(attended.to(query.dtype))


class DeformableEncoderLayer(nn.Module):
    """Post-norm: deformable self-attention, then a feed-forward network."""

    def __init__(self, dim: int, num_heads: int, feedforward_dim: int):
        super().__init__()
        self.linear1 = nn.Linear(dim, feedforward_dim)
        self.linear2 = nn.Linear(feedforward_dim, dim)
        xavier_init(self)
        self.self_attn = DeformableAttention(dim, num_heads)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)

    def forward(self, x: Tensor, pos: Tensor, reference: Tensor, size: tuple[int, int]) -> Tensor:
        """[N, h * w, D] -> [N, h * w, D]; `pos` is added to the query alone."""
        x = self.norm1(x + self.self_attn(x + pos, x, reference, size))
        return self.norm2(x + self.linear2(F.relu(self.linear1(x))))


class DeformableEncoder(nn.Module):
    """A stack of deformable encoder layers."""

    def __init__(self, num_layers: int, *layer: int):
        super().__init__()
        self.layers = nn.ModuleList(DeformableEncoderLayer(*layer) for _ in range(num_layers))

    def forward(self, x: Tensor, pos: Tensor, size: tuple[int, int]) -> Tensor:
        """[N, h * w, D] -> [N, h * w, D]."""
        y, x_ = ((torch.arange(n, device=x.device, dtype=torch.float32) + 0.5) / n for n in size)
        reference = torch.cartesian_prod(y, x_).flip(-1)
        for layer in self.layers:
            x = layer(x, pos, reference, size)
        return x


class PixelTransformer(nn.Module):
    """The encoder and the embedding of its one level."""

    def __init__(self, num_layers: int, dim: int, num_heads: int, feedforward_dim: int):
        super().__init__()
        self.level_embed = nn.Parameter(torch.randn(1, dim))
        self.encoder = DeformableEncoder(num_layers, dim, num_heads, feedforward_dim)

    def forward(self, x: Tensor, pos: Tensor) -> Tensor:
        """A map [N, D, h, w] and its position [1, D, h, w] -> a map [N, D, h, w]."""
        sequence, pos = x.flatten(2).transpose(1, 2), pos.flatten(2).transpose(1, 2) + self.level_embed
        return self.encoder(sequence, pos, x.shape[-2:]).transpose(1, 2).reshape(x.shape)


class PixelDecoder(nn.Module):
    """Features -> mask features and memory, at the resolution of the features."""

    def __init__(self, *, in_channels: int, dim: int, num_layers: int, num_heads: int, feedforward_dim: int):
        super().__init__()
        check_divisible("DIM", dim, _GROUPS, "the groups of its GroupNorm")
        projection = nn.Sequential(nn.Conv2d(in_channels, dim, 1), nn.GroupNorm(_GROUPS, dim))
        self.input_proj = nn.ModuleList([projection])
        self.transformer = PixelTransformer(num_layers, dim, num_heads, feedforward_dim)
        self.adapter_1 = Conv2d(in_channels, dim, 1, bias=False, norm=nn.GroupNorm(_GROUPS, dim))
        self.layer_1 = Conv2d(
            dim, dim, 3, padding=1, bias=False, norm=nn.GroupNorm(_GROUPS, dim), activation=F.relu
        )
        self.mask_features = Conv2d(dim, dim, 1)
        for conv in (projection[0], self.adapter_1, self.layer_1, self.mask_features):
            nn.init.xavier_uniform_(conv.weight)
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[N, C, h, w] -> mask features [N, D, h, w], memory [N, D, h, w], position [1, D, h, w].

        Padding is not masked: this head sees the padded map as it is.
        """
        x = self.input_proj[0](features)
        everywhere = torch.ones((1, *x.shape[-2:]), dtype=torch.bool, device=x.device)
        pos = sine_position_encoding(everywhere, x.shape[1]).to(x.dtype)
        memory = self.transformer(x, pos)
        mask_features = self.mask_features(self.layer_1(self.adapter_1(features) + memory))
        return mask_features, memory, pos
