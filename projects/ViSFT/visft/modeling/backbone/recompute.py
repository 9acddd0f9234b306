"""How many blocks may keep their activations, where the others are computed again (arXiv:1604.06174).

Blocks are kept or recomputed as a whole. Selective checkpointing, which keeps the products inside a block and computes
the rest again, would save little memory: a frozen layer does not keep its input, so a block keeps little but products.
"""

from collections.abc import Callable
from typing import Any

import torch

GIB = 1 << 30


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
