"""Rows of all processes, with gradients."""

import torch
from detectron2.utils import comm
from torch import Tensor


def row_counts(count: int, device: torch.device) -> list[int]:
    """How many rows each process has, by rank."""
    if comm.get_world_size() == 1:
        return [count]
    counts = torch.zeros(comm.get_world_size(), dtype=torch.int64, device=device)
    counts[comm.get_rank()] = count
    torch.distributed.all_reduce(counts)
    return counts.tolist()


def gather_rows(rows: Tensor, counts: list[int]) -> Tensor:
    """`rows` `[n, ...]` of every process under one another, by rank.

    The gradient of a row is the sum of what all processes send into it: with losses and gradients averaged over
    processes, as they are, that is the gradient of one process with all rows. Where `rows` requires grad it has to in
    every process (an empty leaf will do), and every process has to run its backward pass.

    Args:
        counts: of `row_counts`, the same in all processes.
    """
    if len(counts) == 1:
        return rows
    padded = torch.cat((rows, rows.new_zeros(max(counts) - len(rows), *rows.shape[1:])))
    parts = _Gather.apply(padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, padded: Tensor) -> Tensor:
        parts = [torch.empty_like(padded) for _ in range(comm.get_world_size())]
        torch.distributed.all_gather(parts, padded.contiguous())
        return torch.stack(parts)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor) -> Tensor:
        total = gradient.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total)
        return total[comm.get_rank()]
