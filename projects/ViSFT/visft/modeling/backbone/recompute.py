"""Computing blocks again in the backward pass instead of keeping their activations (arXiv:1604.06174).

A recomputed block keeps its input and its attention's output. Attention is the one part that costs much to compute and
little to keep; the products keep nothing, because a frozen layer does not need its input.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint, noop_context_fn

GIB = 1 << 30

_ATEN = torch.ops.aten
_ATTENTION = {
    _ATEN._scaled_dot_product_flash_attention_for_cpu.default,
    _ATEN._scaled_dot_product_flash_attention.default,
    _ATEN._scaled_dot_product_efficient_attention.default,
    _ATEN._scaled_dot_product_cudnn_attention.default,
}


def recomputed(
    block: nn.Module, run: Callable[..., torch.Tensor], *arguments: Any, offload: bool = False
) -> torch.Tensor:
    """`run(*arguments)`, which is computed again in the backward pass, but for its attention.

    Args:
        block: what runs. If it is compiled or has dropout in its attention, attention is computed again, too: the
            first hides it from torch's dispatcher, the second would shift what other dropout draws.
        offload: keep the arguments in the host's memory, and nothing of the attention.
    """
    if offload:
        with torch.autograd.graph.saved_tensors_hooks(_to_host, _from_host):
            return checkpoint(run, *arguments, use_reentrant=False)
    attention = block.attn
    rate = attention.dropout if isinstance(attention, nn.MultiheadAttention) else attention.attn_drop.p
    keep = block._compiled_call_impl is None and not (attention.training and rate)
    return checkpoint(run, *arguments, use_reentrant=False, context_fn=_contexts if keep else noop_context_fn)


def _contexts() -> tuple[TorchDispatchMode, TorchDispatchMode]:
    kept: list[Any] = []
    return _Keeping(kept), _Giving(kept)


# torch's own selective checkpointing compares all operations. Autocast may cast a weight once for two passes of a block
# in the forward pass, but does so for each when it is computed again.
class _Keeping(TorchDispatchMode):
    """Keeps what attention gives in the forward pass."""

    def __init__(self, kept: list[Any]) -> None:
        super().__init__()
        self.kept = kept

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in _ATTENTION:
            self.kept.append(tree_map_only(torch.Tensor, torch.Tensor.detach, result))
        return result


class _Giving(_Keeping):
    """Gives what was kept, in its order, when the block is computed again; computes it when that was done before."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in _ATTENTION and self.kept:
            return self.kept.pop(0)
        return func(*args, **(kwargs or {}))


def _to_host(tensor: torch.Tensor) -> torch.Tensor | tuple[torch.device, torch.Tensor]:
    if tensor.device.type == "cpu":
        return tensor
    # Copied in the order of the device's work, which the host does not wait for.
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return tensor.device, host.copy_(tensor, non_blocking=tensor.is_cuda)


def _from_host(kept: torch.Tensor | tuple[torch.device, torch.Tensor]) -> torch.Tensor:
    if isinstance(kept, torch.Tensor):
        return kept
    device, host = kept
    return host.to(device, non_blocking=True)


class Budget:
    """Memory for the activations of blocks.

    Args:
        gib: GiB of activations that blocks may keep.
    """

    def __init__(self, gib: float) -> None:
        self.gib = gib
        self._sizes: dict[tuple, int] = {}

    def blocks(self, run: Callable[..., torch.Tensor], x: torch.Tensor, *arguments: Any) -> int:
        """How many blocks may keep their activations.

        Args:
            run: computes one block of tokens `x` and further arguments; all blocks keep about the same.
        """
        if not self.gib:
            return 0
        key = (x.shape, x.dtype, torch.is_autocast_enabled(x.device.type))
        if key not in self._sizes:  # one more pass of one block for each size of images
            devices = [x.device] if x.device.type == "cuda" else []
            # A resumed run measures again; its dropout must stay the same.
            with torch.random.fork_rng(devices):
                # With a gradient for its input, without which the first block that trains keeps less than the others.
                x = x.detach().requires_grad_()
                self._sizes[key] = max(1, kept_bytes(run, x, *arguments))
        return int(self.gib * GIB) // self._sizes[key]


def kept_bytes(run: Callable[..., torch.Tensor], *arguments: Any) -> int:
    """Bytes that a function keeps for its backward pass, without parameters and their views."""
    found: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        owner = tensor._base if tensor._is_view() else tensor
        if not isinstance(owner, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            found[storage._cdata] = storage.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run(*arguments)
        total = sum(found.values())
        del result  # only now: what it keeps must not be freed and used again while it is counted
    return total
