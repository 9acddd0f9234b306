"""Feature maps and embeddings from one pass of an image tower, and patch features in the space of texts."""

import copy
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn


class Encoder(Protocol):
    """Interface of a tower's forward pass. `OpenClipEncoder` and visft's CLIPViT have it."""

    stride: int
    """Stride of the map in pixels."""

    def map_and_embedding(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalised images `[N, 3, H, W]`, sides multiples of the stride, to the map `[N, C, h, w]` after the tower's
        last norm, and embeddings `[N, D]` not of unit length."""
        ...


class OpenClipEncoder:
    """open_clip's own forward pass, at any image size. The position embedding is resized like in open_clip and timm.

    Args:
        visual: `visual` of an open_clip model.
    """

    def __init__(self, visual: nn.Module) -> None:
        self._sizes = {_pair(visual.image_size): visual}
        self._visual = visual
        patch = visual.trunk.patch_embed.patch_size if hasattr(visual, "trunk") else visual.patch_size
        self.stride = _pair(patch)[0]

    @staticmethod
    def fits(visual: nn.Module) -> bool:
        """Whether it is a plain vision transformer: with one patch size, and a token per patch after the last block."""
        from open_clip.transformer import VisionTransformer
        from timm.layers import PatchEmbed
        from timm.models import eva, vision_transformer

        if isinstance(visual, VisionTransformer):
            return True
        trunk = getattr(visual, "trunk", None)
        plain = isinstance(trunk, eva.Eva | vision_transformer.VisionTransformer)
        return plain and type(trunk.patch_embed) is PatchEmbed

    def map_and_embedding(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Encoder`."""
        size = tuple(images.shape[-2:])
        if size not in self._sizes:
            self._sizes[size] = _resized(self._visual, size)
        visual = self._sizes[size]
        found = visual.forward_intermediates(images, indices=1, output_fmt="NLC")
        tokens = _last_norm(visual)(found["image_intermediates"][-1])
        grid = tuple(side // self.stride for side in size)
        return tokens.transpose(1, 2).unflatten(2, grid).contiguous(), found["image_features"]


def _resized(visual: nn.Module, size: tuple[int, int]) -> nn.Module:
    """Return a copy for another image size."""
    visual = copy.deepcopy(visual)
    if hasattr(visual, "trunk"):
        visual.set_input_size(size)
        return visual
    grid = tuple(side // patch for side, patch in zip(size, visual.patch_size, strict=True))
    first, old = visual.positional_embedding.data.split([1, len(visual.positional_embedding) - 1])
    old = old.T.unflatten(1, visual.grid_size)[None]
    new = F.interpolate(old, grid, mode="bicubic", align_corners=False, antialias=True)[0].flatten(1).T
    visual.positional_embedding = nn.Parameter(torch.cat((first, new)), requires_grad=False)
    visual.image_size, visual.grid_size = size, grid
    return visual


def _last_norm(visual: nn.Module) -> nn.Module:
    """Return the norm after the last block. CoCa's comes after its pooler, so the pooler's input norm replaces it."""
    if hasattr(visual, "trunk"):
        trunk = visual.trunk
        return trunk.fc_norm if isinstance(trunk.norm, nn.Identity) else trunk.norm
    return visual.ln_post if visual.attn_pool is None else visual.attn_pool.ln_k


@torch.no_grad()
def patch_embeddings(visual: nn.Module, features: torch.Tensor) -> torch.Tensor:
    """Return embeddings of patches like MaskCLIP, without its change of the last block (arXiv:2112.01071, section 3.2).

    An attention pooler gets one patch to pool, and returns its value.

    Args:
        visual: `visual` of an open_clip model, in float32.
        features: after the tower's last norm, `[..., C]`.

    Returns:
        `[..., D]` of unit length on the tower's device.
    """
    device = next(visual.parameters()).device
    shape, rows = features.shape[:-1], features.to(device).float().reshape(-1, features.shape[-1])
    if hasattr(visual, "trunk"):
        trunk = visual.trunk
        if getattr(trunk, "attn_pool", None) is not None:
            rows = trunk.attn_pool(rows[:, None])
        # With average pooling, `fc_norm` is the last norm, which was already applied.
        if not isinstance(trunk.norm, nn.Identity):
            rows = trunk.fc_norm(rows)
        rows = visual.head(trunk.head(rows))
    else:
        if visual.attn_pool is not None:
            # The pooler's input norm was already applied, so its attention is called without it.
            pool, keys = visual.attn_pool, rows[:, None]
            query = pool.ln_q(pool.query)[:1].expand(len(rows), 1, -1)
            if not pool.attn.batch_first:
                query, keys = query.transpose(0, 1), keys.transpose(0, 1)
            rows = visual.ln_post(pool.attn(query, keys, keys, need_weights=False)[0].flatten(0, 1))
        rows = rows if visual.proj is None else rows @ visual.proj
    return F.normalize(rows, dim=-1).view(*shape, -1)


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)
