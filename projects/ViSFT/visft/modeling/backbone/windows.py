"""Attention within windows: each window's patches become a sequence of their own (ViTDet, arXiv:2203.16527, 3.1)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Windows:
    """How a grid of `grid` patches is cut into windows of at most `size` x `size`.

    Prefix tokens (class token) go along with every window. The copies live apart from one another while blocks attend
    within windows, and are averaged when the windows are joined. The grid is padded at the bottom and right; padding is
    never attended to.
    """

    grid: tuple[int, int]
    size: int
    prefix: int

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of a window in patches; no larger than the grid."""
        return min(self.size, self.grid[0]), min(self.size, self.grid[1])

    @property
    def counts(self) -> tuple[int, int]:
        """Number of windows downwards and across."""
        return -(-self.grid[0] // self.shape[0]), -(-self.grid[1] // self.shape[1])

    def _cut(self, patches: torch.Tensor) -> torch.Tensor:
        """`[N, h * w, C]` -> `[N, windows, patches in a window, C]`."""
        (h, w), (sh, sw), (nh, nw) = self.grid, self.shape, self.counts
        x = patches.unflatten(1, (h, w))
        x = F.pad(x, (0, 0, 0, nw * sw - w, 0, nh * sh - h))
        x = x.reshape(len(x), nh, sh, nw, sw, x.shape[-1]).transpose(2, 3)
        return x.reshape(len(x), nh * nw, sh * sw, x.shape[-1])

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens `[N, prefix + h * w, C]` -> `[N * windows, prefix + patches in a window, C]`."""
        patches = self._cut(x[:, self.prefix :])
        prefix = x[:, None, : self.prefix].expand(-1, patches.shape[1], -1, -1)
        return torch.cat([prefix, patches], dim=2).flatten(0, 1)

    def join(self, x: torch.Tensor) -> torch.Tensor:
        """The inverse of `split`; copies of prefix tokens are averaged."""
        (h, w), (sh, sw), (nh, nw) = self.grid, self.shape, self.counts
        x = x.unflatten(0, (-1, nh * nw))
        prefix = x[:, :, : self.prefix].mean(1)
        patches = x[:, :, self.prefix :].reshape(len(x), nh, nw, sh, sw, x.shape[-1]).transpose(2, 3)
        patches = patches.reshape(len(x), nh * sh, nw * sw, x.shape[-1])[:, :h, :w]
        return torch.cat([prefix, patches.flatten(1, 2)], dim=1)

    def split_rope(self, rope: torch.Tensor | None, batch: int) -> torch.Tensor | None:
        """Rotary table `[h * w, D]` -> `[batch * windows, 1, patches in a window, D]`."""
        if rope is None:
            return None
        return self._cut(rope[None]).expand(batch, -1, -1, -1).flatten(0, 1)[:, None]

    def mask(self, batch: int, device: torch.device) -> torch.Tensor | None:
        """True where a key is no padding, `[batch * windows, 1, 1, tokens]`; None when nothing is padded."""
        (h, w), (sh, sw), (nh, nw) = self.grid, self.shape, self.counts
        if (nh * sh, nw * sw) == (h, w):
            return None
        real = self._cut(torch.ones(1, h * w, 1, device=device))[0, :, :, 0].bool()
        real = F.pad(real, (self.prefix, 0), value=True)
        return real.expand(batch, -1, -1).flatten(0, 1)[:, None, None]
