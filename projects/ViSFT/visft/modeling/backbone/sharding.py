"""The blocks of a tower in pieces, one for each process: PyTorch's fully sharded data parallelism (`fully_shard`).

Each process keeps its part of every weight matrix. A block is whole only while it computes: its parts are gathered
before, and, where it trains, its gradient is averaged over the processes and cut again afterwards. The rest of the
model (patch embedding, norms, pooler, heads) is whole in every process.

All processes have to run the tower equally often and in the same order. Sizes of images may differ.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from visft.checkpoint.shards import is_piece
from visft.errors import ConfigError


def shard(backbone: nn.Module) -> None:
    """Cut the blocks of a CLIPViT, in place. Names and shapes of its parameters stay; their values become DTensors.

    Every process calls this, with the same weights, after what trains in the tower was chosen.

    Raises:
        ConfigError: this version of PyTorch has no `fully_shard`.
    """
    try:
        from torch.distributed.checkpoint import HuggingFaceStorageWriter  # noqa: F401  (writes checkpoints)
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
    except ImportError as error:
        raise ConfigError(
            f"VISFT.STRATEGY is FSDP2, which needs PyTorch 2.9 or later; this is {torch.__version__}: upgrade it, or "
            "set STRATEGY to DDP"
        ) from error
    device = next(backbone.parameters()).device
    mesh = torch.distributed.init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for block in backbone.blocks:
        fully_shard(block, mesh=mesh)
    inside = {id(p) for block in backbone.blocks for p in block.parameters()}
    outside = {p for p in backbone.parameters() if id(p) not in inside}
    # The tower itself holds no part. It lets its blocks be gathered ahead of time.
    fully_shard(backbone, mesh=mesh, ignored_params=outside)
    for name in ("image_embedding", "map_and_embedding"):
        register_fsdp_forward_method(backbone, name)
    # The first pass decides the type that gradients are averaged in, by what trains then.
    with torch.no_grad():
        backbone(torch.zeros(1, 3, backbone.stride, backbone.stride, device=device))


def is_sharded(module: nn.Module) -> bool:
    """Whether some of a module's parameters are in pieces."""
    return any(map(is_piece, module.parameters()))


@contextlib.contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Within the block, every process has whole blocks, so that each can run the tower as often as it has images.

    Every process enters and leaves it. Nothing may train in it, and the state of the module cannot be read.
    """
    blocks = [m for m in module.modules() if hasattr(m, "set_reshard_after_forward")]
    for block in blocks:
        block.set_reshard_after_forward(False, recurse=False)
        block.unshard()
    try:
        yield
    finally:
        for block in blocks:
            block.reshard()
            block.set_reshard_after_forward(True, recurse=False)
