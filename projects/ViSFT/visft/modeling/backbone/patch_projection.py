"""Patch features in the space of texts: what CLIP does after its last norm, done to each patch alone."""

from typing import Any

import torch
from torch import nn


def patch_embeddings(visual: nn.Module, features: torch.Tensor) -> torch.Tensor:
    """Embeddings of patches, as MaskCLIP has them but for its change of the last block (arXiv:2112.01071, section 3.2).

    An attention pooler is given one patch to pool: it then returns its value. So an image whose patches are all alike
    has their embedding.

    Args:
        visual: open_clip's vision tower.
        features: after the tower's last norm (`last_feat` of a CLIPViT), `[..., C]`.

    Returns:
        `[..., D]` of unit length on the tower's device, computed in float32 whatever the weights are stored in and
        under any autocast.
    """
    device = next(visual.parameters()).device
    with torch.autocast(device.type, enabled=False):
        return _patch_embeddings(visual, features.to(device).float())


def _patch_embeddings(visual: nn.Module, features: torch.Tensor) -> torch.Tensor:
    shape, rows = features.shape[:-1], features.reshape(-1, features.shape[-1])
    trunk = getattr(visual, "trunk", None)
    if trunk is not None:
        if getattr(trunk, "attn_pool", None) is not None:
            rows = _in_float32(trunk.attn_pool, rows[:, None])
        # With average pooling `fc_norm` is the last norm, which the features have passed.
        if not isinstance(trunk.norm, nn.Identity):
            rows = _in_float32(trunk.fc_norm, rows)
        rows = _in_float32(visual.head, _in_float32(trunk.head, rows))
    else:
        if visual.attn_pool is not None:
            rows = _in_float32(visual.ln_post, _value(visual.attn_pool, rows))
        rows = rows if visual.proj is None else rows @ visual.proj.float()
    return nn.functional.normalize(rows.float(), dim=-1).view(*shape, -1)


def _value(pool: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """What open_clip's pooler makes of each of `rows` `[N, C]`, which have passed its norm of the input, alone."""
    query = _in_float32(pool.ln_q, pool.query.float())[:1].expand(len(rows), 1, -1)
    keys = rows[:, None]
    if not pool.attn.batch_first:
        query, keys = query.transpose(0, 1), keys.transpose(0, 1)
    return _in_float32(pool.attn, query, keys, keys, need_weights=False)[0].flatten(0, 1)


def _in_float32(module: nn.Module, *args: torch.Tensor, **kwargs: Any) -> Any:
    """A frozen module's output as if its weights were stored in float32."""
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    if all(tensor.dtype == torch.float32 for tensor in tensors.values() if tensor.is_floating_point()):
        return module(*args, **kwargs)
    wide = {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}
    return torch.func.functional_call(module, wide, args, kwargs)
