"""The tower with dense LoRA and explicit attention, on the weights of a CLIPViT."""

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from visft.errors import ConfigError
from visft.modeling.backbone import CLIPViT


class PlainTower:
    """The forward of a CLIPViT over open_clip's own VisionTransformer, with LoRA in any of q, k and v.

    With `activation_checkpointing` of the CLIPViT, each block is recomputed in the backward pass. Reentrant checkpoints
    give no gradient unless their input has one. The authors therefore let the patch embedding have a gradient, which no
    optimizer uses.

    Raises:
        ConfigError: another tower, windows, or other adapters.
    """

    def __init__(self, backbone: CLIPViT):
        tower = backbone.tower
        if not hasattr(tower, "conv1") or backbone.window_size or backbone.stride != tower.patch_size[0]:
            raise ConfigError(
                "the reference recipe is for open_clip's own vision transformers, with their own patches and without "
                "windows (such as MODEL.CLIP_VIT.NAME ViT-B-16, PATCH_SIZE 0, WINDOW_SIZE 0)"
            )
        config = backbone.lora_config
        if config is None or not set(config.targets) <= set("qkv") or config.last_blocks or config.dropout:
            raise ConfigError(
                "the reference recipe has LoRA in q, k or v of all blocks without dropout; set MODEL.LORA.TARGETS "
                "\"('q', 'v')\", LAST_BLOCKS 0 and DROPOUT 0.0"
            )
        self.backbone = backbone
        tower.conv1.requires_grad_(True)

    def __call__(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """`[N, 3, H, W]`, sides multiples of the patch -> `{"last_feat": [N, C, h, w]}`."""
        tower, keep = self.backbone.tower, self.backbone.class_token == "keep"
        x = tower.conv1(images)
        n, channels, *grid = x.shape
        x = x.flatten(2).transpose(1, 2) + position(tower, grid, antialias=keep)
        if keep:
            token = tower.class_embedding + tower.positional_embedding[0]
            x = torch.cat([token.expand(n, 1, channels), x], dim=1)
        x = tower.ln_pre(x)
        for block in tower.transformer.resblocks:
            if self.backbone.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(run_block, block, x, use_reentrant=True)
            else:
                x = run_block(block, x)
        x = tower.ln_post(x[:, 1:] if keep else x)
        return {"last_feat": x.transpose(1, 2).reshape(n, channels, *grid)}


def position(tower: torch.nn.Module, grid: list[int], antialias: bool) -> torch.Tensor:
    """The patches' position embedding at another grid, `[h * w, C]`."""
    table = tower.positional_embedding[1:].unflatten(0, tower.grid_size).permute(2, 0, 1)[None]
    table = F.interpolate(table, size=grid, mode="bicubic", align_corners=False, antialias=antialias)
    return table[0].flatten(1).T


def run_block(block: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """One pre-norm transformer block."""
    x = x + block.ls_1(attention(block, block.ln_1(x)))
    return x + block.ls_2(block.mlp(block.ln_2(x)))


def attention(block: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Multi-head self-attention, with LoRA beside the fused projection."""
    layer = block.attn
    n, length, channels = x.shape
    qkv = F.linear(x, layer.in_proj_weight, layer.in_proj_bias) + x @ dense_update(block).T
    q, k, v = qkv.reshape(n, length, 3, layer.num_heads, -1).permute(2, 0, 3, 1, 4)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    y = scores.softmax(dim=-1) @ v
    return layer.out_proj(y.transpose(1, 2).reshape(n, length, channels))


def dense_update(block: torch.nn.Module) -> torch.Tensor:
    """(alpha / rank) B A of q, k and v, `[3 C, C]`, with zeros where there is no adapter."""
    width = block.attn.embed_dim
    zero = block.attn.in_proj_weight.new_zeros(width, width)
    adapters = [block.lora[target] if target in block.lora else None for target in "qkv"]
    return torch.cat([zero if a is None else a.scaling * (a.lora_B @ a.lora_A) for a in adapters])
