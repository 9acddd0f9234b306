"""Running one transformer block of open_clip or timm on any token sequence, with LoRA inside its projections.

The blocks' own `forward` is not called: open_clip's attention takes its weights past any module that could be adapted,
timm's knows one rotary grid and one number of prefix tokens. What is computed is the same. Every attention goes through
`scaled_dot_product_attention`.
"""

import functools
import types
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from visft.modeling.backbone.frozen_weights import linear

Runner = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Projection:
    """A weight matrix of a block that LoRA can adapt.

    Attributes:
        target: what a user calls it: q, k, v, proj, fc1 or fc2.
        key: the adapter's name in `block.lora`; `target`, except for SwiGLU's two input matrices (fc1_g, fc1_x).
        weight: the parameter's name below the block.
        start, stop: its rows in that parameter (a fused q, k, v matrix holds three).
    """

    target: str
    key: str
    weight: str
    start: int
    stop: int


TARGETS = ("q", "k", "v", "proj", "fc1", "fc2")


def projections(block: nn.Module) -> list[Projection]:
    """All projections of a block that LoRA can adapt."""
    attn, mlp = block.attn, block.mlp
    if isinstance(attn, nn.MultiheadAttention):
        fused, names = "attn.in_proj_weight", {"proj": "attn.out_proj.weight"}
    elif attn.qkv is not None:
        fused, names = "attn.qkv.weight", {"proj": "attn.proj.weight"}
    else:
        fused, names = None, {t: f"attn.{t}_proj.weight" for t in "qkv"} | {"proj": "attn.proj.weight"}
    if hasattr(mlp, "c_fc"):
        names |= {"fc1": "mlp.c_fc.weight", "fc2": "mlp.c_proj.weight"}
    elif hasattr(mlp, "fc1_g"):
        names |= {"fc1_g": "mlp.fc1_g.weight", "fc1_x": "mlp.fc1_x.weight", "fc2": "mlp.fc2.weight"}
    else:
        names |= {"fc1": "mlp.fc1.weight", "fc2": "mlp.fc2.weight"}
    found = []
    if fused:
        rows = block.get_parameter(fused).shape[0] // 3
        found = [Projection(t, t, fused, i * rows, (i + 1) * rows) for i, t in enumerate("qkv")]
    for key, weight in names.items():
        rows = block.get_parameter(weight).shape[0]
        found.append(Projection(key.split("_")[0], key, weight, 0, rows))
    return found


def _adapted(block: nn.Module, key: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """A projection's output `y` of `x`, plus its adapter's when there is one that acts."""
    lora = getattr(block, "lora", None)
    if lora is None or lora.merged or lora.off or key not in lora:
        return y
    return y + lora[key](x)


def _project(block: nn.Module, key: str, layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return _adapted(block, key, x, linear(x, layer.weight, layer.bias))


def _rotate(x: torch.Tensor, rope: torch.Tensor, prefix: int, half: bool) -> torch.Tensor:
    """Rotary position embedding (arXiv:2104.09864, equation 34) of all tokens but the first `prefix`.

    Args:
        x: `[N, heads, prefix + L, d]`.
        rope: sines and cosines side by side, `[..., L, 2 d]`.
        half: pairs are (i, i + d/2) instead of neighbours.
    """
    sin, cos = rope.chunk(2, dim=-1)
    first, rest = x[:, :, :prefix], x[:, :, prefix:]
    if half:
        a, b = rest.chunk(2, dim=-1)
        turned = torch.cat([-b, a], dim=-1)
    else:
        turned = torch.stack([-rest[..., 1::2], rest[..., ::2]], dim=-1).flatten(-2)
    return torch.cat([first, rest * cos + turned * sin], dim=2).to(x.dtype)


def _qkv(block: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Queries, keys and values, `[N, L, attention width]` each."""
    attn = block.attn
    if isinstance(attn, nn.MultiheadAttention):
        parts = linear(x, attn.in_proj_weight, attn.in_proj_bias).chunk(3, dim=-1)
    elif attn.qkv is None:
        return [_project(block, t, getattr(attn, f"{t}_proj"), x) for t in "qkv"]
    else:
        bias = attn.qkv.bias
        if getattr(attn, "q_bias", None) is not None:  # EVA: the keys' bias is a constant zero
            bias = torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
        parts = linear(x, attn.qkv.weight, bias).chunk(3, dim=-1)
    adapted = [_adapted(block, t, x, part) for t, part in zip("qkv", parts, strict=True)]
    if all(new is part for new, part in zip(adapted, parts, strict=True)) or not torch.is_grad_enabled():
        return adapted
    # Attention keeps its inputs for the backward pass. A part of the fused product would keep all three.
    return [new.clone() if new is part else new for new, part in zip(adapted, parts, strict=True)]


def _attention(
    block: nn.Module, x: torch.Tensor, rope: torch.Tensor | None, mask: torch.Tensor | None, prefix: int
) -> torch.Tensor:
    attn = block.attn
    # Otherwise each of the products below would cast and keep its own copy.
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    q, k, v = (t.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for t in _qkv(block, x))
    if isinstance(attn, nn.MultiheadAttention):
        dropout = attn.dropout
    else:
        q, k, dropout = attn.q_norm(q), attn.k_norm(k), attn.attn_drop.p
    if rope is not None:
        half = getattr(attn, "rotate_half", False)
        q, k = (_rotate(t, rope, prefix, half).to(v.dtype) for t in (q, k))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout if attn.training else 0.0)
    y = y.transpose(1, 2).flatten(2)
    if isinstance(attn, nn.MultiheadAttention):
        return _project(block, "proj", attn.out_proj, y)
    return attn.proj_drop(_project(block, "proj", attn.proj, attn.norm(y)))


def _mlp(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    mlp = block.mlp
    if hasattr(mlp, "c_fc"):
        hidden = mlp.gelu(_project(block, "fc1", mlp.c_fc, x))
        return _project(block, "fc2", mlp.c_proj, hidden)
    if hasattr(mlp, "fc1_g"):
        hidden = mlp.act(_project(block, "fc1_g", mlp.fc1_g, x)) * _project(block, "fc1_x", mlp.fc1_x, x)
    else:
        hidden = _project(block, "fc1", mlp.fc1, x)
        if hasattr(mlp, "gate_last"):
            a, b = hidden.chunk(2, dim=-1)
            hidden = a * mlp.act(b) if mlp.gate_last else mlp.act(a) * b
        else:
            hidden = mlp.act(hidden)
    hidden = mlp.norm(mlp.drop1(hidden))
    return mlp.drop2(_project(block, "fc2", mlp.fc2, hidden))


def run_open_clip_block(block, x, rope=None, mask=None, prefix=0):
    """open_clip's ResidualAttentionBlock: pre-norm."""
    x = x + block.ls_1(_attention(block, block.ln_1(x), rope, mask, prefix))
    return x + block.ls_2(_mlp(block, block.ln_2(x)))


def run_timm_block(block, x, rope=None, mask=None, prefix=0):
    """timm's Block: pre-norm."""
    x = x + block.drop_path1(block.ls1(_attention(block, block.norm1(x), rope, mask, prefix)))
    return x + block.drop_path2(block.ls2(_mlp(block, block.norm2(x))))


def run_eva_block(block, x, rope=None, mask=None, prefix=0):
    """timm's EvaBlock: pre-norm."""
    y = _attention(block, block.norm1(x), rope, mask, prefix)
    x = x + block.drop_path1(y if block.gamma_1 is None else block.gamma_1 * y)
    y = _mlp(block, block.norm2(x))
    return x + block.drop_path2(y if block.gamma_2 is None else block.gamma_2 * y)


def run_eva_post_norm_block(block, x, rope=None, mask=None, prefix=0):
    """timm's EvaBlockPostNorm: the norm is on each branch's output (EVA02-E)."""
    x = x + block.drop_path1(block.norm1(_attention(block, x, rope, mask, prefix)))
    return x + block.drop_path2(block.norm2(_mlp(block, x)))


def run_by_call(block: nn.Module, run: Runner) -> None:
    """Let `block(x, rope, mask, prefix=n)` call `run`, so that hooks and `block.compile()` act on it.

    A call without `prefix`, as in the tower's own forward, still runs the block's own.
    """
    block.forward = types.MethodType(_forward(type(block).forward, run), block)


@functools.cache  # blocks that share a function share what torch.compile makes of it
def _forward(own: Runner, run: Runner) -> Runner:
    def forward(self, *args, prefix: int | None = None, **kwargs):
        if prefix is None:
            return own(self, *args, **kwargs)
        return run(self, *args, prefix=prefix, **kwargs)

    return forward
