"""One face for the vision transformers of open_clip: its own, and timm's VisionTransformer and Eva.

An adapter holds the tower by reference and names its parts; parameters stay where they are.
"""

import copy
import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from visft.errors import ConfigError
from visft.modeling.backbone.blocks import (
    run_by_call,
    run_eva_block,
    run_eva_post_norm_block,
    run_open_clip_block,
    run_timm_block,
)
from visft.modeling.backbone.resample import resample_patch_weight, resize_position

SUPPORTED = (
    "supported are plain vision transformers: open_clip's VisionTransformer, and timm's VisionTransformer and Eva with "
    "a one-convolution patch embedding (ViT-*, coca_*, EVA*, *SigLIP*, *CLIPA*, PE-Core-*, `visft-tiny`)"
)


def adapt(tower: nn.Module) -> "Tower":
    """The adapter of a vision tower, chosen by its modules.

    Raises:
        ConfigError: the tower is no plain vision transformer.
    """
    name = type(tower).__name__
    open_clip = sys.modules.get("open_clip.transformer")
    if open_clip is not None and isinstance(tower, open_clip.VisionTransformer):
        return OpenClipTower(tower)
    eva, vit = sys.modules.get("timm.models.eva"), sys.modules.get("timm.models.vision_transformer")
    trunk = getattr(tower, "trunk", tower)
    if (eva is not None and isinstance(trunk, eva.Eva)) or (
        vit is not None and isinstance(trunk, vit.VisionTransformer)
    ):
        return TimmTower(tower, trunk)
    inner = "" if trunk is tower else f" of timm's {type(trunk).__name__}"
    raise ConfigError(
        f"MODEL.CLIP_VIT.NAME: the vision tower is a {name}{inner}, which has no ViT blocks; {SUPPORTED}."
    )


class Tower:
    """What CLIPViT needs of a vision tower. Subclasses fill in the attributes.

    Attributes:
        embed_dim: width C of the tokens.
        patch_size: side of a patch in pixels.
        image_size: `(height, width)` the tower was made for, in pixels.
        num_prefix_tokens: class and register tokens before the patches.
        blocks: the transformer blocks, called as `block(x, rope, mask, prefix=n)` (see `run_by_call`).
    """

    embed_dim: int
    patch_size: int
    image_size: tuple[int, int]
    num_prefix_tokens: int
    blocks: list[nn.Module]

    def patch_layer(self) -> nn.Conv2d:
        """The convolution that embeds the patches."""
        raise NotImplementedError

    def patch_norm(self, x: torch.Tensor) -> torch.Tensor:
        """The norm of the patch embedding, before positions are added."""
        return x

    def position(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Position embedding of the prefix tokens `[prefix, C]` and of the grid `[h0, w0, C]`, where there are any."""
        raise NotImplementedError

    def prefix_tokens(self) -> torch.Tensor | None:
        """Class and register tokens `[prefix, C]` without position, or None."""
        raise NotImplementedError

    def pre_norm(self, x: torch.Tensor) -> torch.Tensor:
        """The norm before the first block."""
        raise NotImplementedError

    def dense_norm(self) -> nn.Module:
        """The norm that the tower applies to the last block's tokens, before or after pooling them."""
        raise NotImplementedError

    def rope(self, grid: tuple[int, int], device: torch.device) -> torch.Tensor | None:
        """Rotary table `[h * w, 2 d]` for a grid, or None."""
        return None

    def embedding(self, x: torch.Tensor) -> torch.Tensor:
        """The CLIP embedding `[N, D]` from the last block's tokens `[N, prefix + h * w, C]`."""
        raise NotImplementedError

    def project_patches(self, rows: torch.Tensor) -> torch.Tensor:
        """What follows the last norm, applied to each patch alone, in float32: `[R, C]` -> `[R, D]`.

        An attention pooler gets one patch to pool and then returns its value.
        """
        raise NotImplementedError

    def stem_parameters(self, prefix: bool) -> Iterator[nn.Parameter]:
        """Parameters that act before the first block; those of the prefix tokens only with `prefix`."""
        raise NotImplementedError

    def embed(
        self, images: torch.Tensor, *, patch_size: int, prefix: bool, antialias: bool
    ) -> tuple[torch.Tensor, tuple[int, int]]:
        """Images to the first block's input.

        Args:
            images: normalised, `[N, 3, H, W]`; what is left of a side after whole patches is not seen.
            patch_size: side of a patch in pixels; the patch embedding is resampled to it.
            prefix: whether class and register tokens come before the patches.
            antialias: see `resize_position`.

        Returns:
            Tokens `[N, prefix + h * w, C]` and `(h, w)`.
        """
        conv = self.patch_layer()
        weight = resample_patch_weight(conv.weight, patch_size)
        x = F.conv2d(images.to(weight.dtype), weight, conv.bias, stride=patch_size)
        grid = (x.shape[-2], x.shape[-1])
        x = self.patch_norm(x.flatten(2).transpose(1, 2))
        prefix_position, position = self.position()
        if position is not None:
            x = x + resize_position(position, grid, antialias).flatten(0, 1)
        tokens = self.prefix_tokens() if prefix else None
        if tokens is not None:
            if prefix_position is not None:
                tokens = tokens + prefix_position
            x = torch.cat([tokens.to(x.dtype).expand(len(x), -1, -1), x], dim=1)
        return self.pre_norm(x), grid


class OpenClipTower(Tower):
    """open_clip's own VisionTransformer (OpenAI, LAION, DataComp, MetaCLIP, CLIPA, CoCa, NLLB...)."""

    def __init__(self, tower: nn.Module):
        self.tower = tower
        self.blocks = list(tower.transformer.resblocks)
        for block in self.blocks:
            if not isinstance(block.attn, nn.MultiheadAttention):
                raise ConfigError(
                    f"MODEL.CLIP_VIT.NAME: the tower's blocks are {type(block).__name__} with options that no CLIP of "
                    f"open_clip uses; {SUPPORTED}."
                )
            run_by_call(block, run_open_clip_block)
        self.embed_dim = tower.conv1.out_channels
        self.patch_size = _square(tower.patch_size)
        self.image_size = tuple(tower.image_size)
        self.num_prefix_tokens = 1

    def patch_layer(self) -> nn.Conv2d:
        return self.tower.conv1

    def position(self):
        table = self.tower.positional_embedding
        return table[:1], table[1:].unflatten(0, self.tower.grid_size)

    def prefix_tokens(self):
        return self.tower.class_embedding[None]

    def pre_norm(self, x):
        return self.tower.ln_pre(x)

    def dense_norm(self):
        # CoCa's last norm comes after the pooler, which changes the width; the pooler's own input norm takes its place.
        pool = self.tower.attn_pool
        return self.tower.ln_post if pool is None else pool.ln_k

    def embedding(self, x):
        pooled, _ = self.tower._pool(x)
        return pooled if self.tower.proj is None else pooled @ self.tower.proj

    def project_patches(self, rows):
        pool = self.tower.attn_pool
        if pool is not None:
            query = _in_float32(pool.ln_q, pool.query.float())[:1].expand(len(rows), 1, -1)
            keys = rows[:, None]
            if not pool.attn.batch_first:
                query, keys = query.transpose(0, 1), keys.transpose(0, 1)
            values, _ = _in_float32(pool.attn, query, keys, keys, need_weights=False)
            rows = _in_float32(self.tower.ln_post, values.flatten(0, 1))
        return rows if self.tower.proj is None else rows @ self.tower.proj.float()

    def stem_parameters(self, prefix):
        yield from self.tower.conv1.parameters()
        yield from self.tower.ln_pre.parameters()
        yield self.tower.positional_embedding
        if prefix:
            yield self.tower.class_embedding


class TimmTower(Tower):
    """timm's VisionTransformer (SigLIP...) and Eva (EVA01, EVA02, PE-Core), alone or within open_clip's TimmModel."""

    def __init__(self, tower: nn.Module, trunk: nn.Module):
        from timm.layers import PatchEmbed
        from timm.models.eva import EvaBlock, EvaBlockPostNorm
        from timm.models.vision_transformer import Block

        runners = {Block: run_timm_block, EvaBlock: run_eva_block, EvaBlockPostNorm: run_eva_post_norm_block}
        self.tower, self.trunk = tower, trunk
        embed = trunk.patch_embed
        if type(embed) is not PatchEmbed or not isinstance(embed.proj, nn.Conv2d):
            raise ConfigError(
                f"MODEL.CLIP_VIT.NAME: the tower's patch embedding is a {type(embed).__name__}, a network of its own "
                f"instead of one convolution; {SUPPORTED}."
            )
        self.blocks = list(trunk.blocks)
        for block in self.blocks:
            attn = getattr(block, "attn", None)
            odd = getattr(attn, "num_kv_groups", 1) != 1 or getattr(attn, "gate", None) is not None
            if type(block) not in runners or odd or not hasattr(attn, "qkv"):
                raise ConfigError(
                    f"MODEL.CLIP_VIT.NAME: the tower's blocks are {type(block).__name__} with {type(attn).__name__}, "
                    f"which no CLIP of open_clip uses; {SUPPORTED}."
                )
        if getattr(trunk, "rope_mixed", False):
            raise ConfigError(
                f"MODEL.CLIP_VIT.NAME: the tower's rotary embedding is learned per block; {SUPPORTED}."
            )
        for block in self.blocks:
            run_by_call(block, runners[type(block)])
        self.embed_dim = trunk.embed_dim
        self.patch_size = _square(embed.patch_size)
        self.image_size = tuple(embed.img_size)
        self.num_prefix_tokens = trunk.num_prefix_tokens
        # A copy, because asking it for another grid changes it. It has no parameters.
        self._rope = copy.deepcopy(getattr(trunk, "rope", None))
        self._rope_table: tuple[tuple[int, int], torch.Tensor] | None = None

    def patch_layer(self) -> nn.Conv2d:
        return self.trunk.patch_embed.proj

    def patch_norm(self, x):
        return self.trunk.patch_embed.norm(x)

    def position(self):
        table = self.trunk.pos_embed
        if table is None:
            return None, None
        prefix = 0 if self.trunk.no_embed_class else self.num_prefix_tokens
        grid = table[0, prefix:].unflatten(0, self.trunk.patch_embed.grid_size)
        return (table[0, :prefix] if prefix else None), grid

    def _prefix_parameters(self) -> list[nn.Parameter]:
        tokens = (self.trunk.cls_token, getattr(self.trunk, "reg_token", None))
        return [token for token in tokens if token is not None]

    def prefix_tokens(self):
        tokens = self._prefix_parameters()
        return torch.cat(tokens, dim=1)[0] if tokens else None

    def pre_norm(self, x):
        return self.trunk.norm_pre(x)

    def dense_norm(self):
        trunk = self.trunk  # average pooling moves the norm behind the pool
        return trunk.fc_norm if isinstance(trunk.norm, nn.Identity) else trunk.norm

    def rope(self, grid, device):
        if self._rope is None:
            return None
        if self._rope_table is None or self._rope_table[0] != grid or self._rope_table[1].device != device:
            with torch.inference_mode(False):  # cached: training may use what inference made
                self._rope.update_feat_shape(list(grid))
                self._rope_table = (grid, self._rope.get_embed(shape=list(grid)).to(device))
        return self._rope_table[1]

    def embedding(self, x):
        pooled = self.trunk.forward_head(self.trunk.norm(x))
        return pooled if self.tower is self.trunk else self.tower.head(pooled)

    def project_patches(self, rows):
        trunk = self.trunk
        if getattr(trunk, "attn_pool", None) is not None:
            rows = _in_float32(trunk.attn_pool, rows[:, None])
        # With average pooling `fc_norm` is the last norm, which the features have passed.
        if not isinstance(trunk.norm, nn.Identity):
            rows = _in_float32(trunk.fc_norm, rows)
        rows = _in_float32(trunk.head, rows)
        return rows if self.tower is trunk else _in_float32(self.tower.head, rows)

    def stem_parameters(self, prefix):
        yield from self.trunk.patch_embed.parameters()
        yield from self.trunk.norm_pre.parameters()
        if self.trunk.pos_embed is not None:
            yield self.trunk.pos_embed
        if prefix:
            yield from self._prefix_parameters()


def _in_float32(module: nn.Module, *args: torch.Tensor, **kwargs: Any) -> Any:
    """A frozen module's output as if its weights were stored in float32."""
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    if all(tensor.dtype == torch.float32 for tensor in tensors.values() if tensor.is_floating_point()):
        return module(*args, **kwargs)
    wide = {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}
    return torch.func.functional_call(module, wide, args, kwargs)


def _square(patch_size: int | tuple[int, int]) -> int:
    height, width = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
    if height != width:
        raise ConfigError(
            f"MODEL.CLIP_VIT.NAME: patches of {height}x{width} pixels; only square ones are supported."
        )
    return height
