"""Heads that pull equally hard at the features they share, whatever the size of their losses."""

from collections.abc import Mapping, Sequence

import torch
from detectron2.utils import comm
from torch import Tensor


def balanced_copies(features: Tensor, heads: Mapping[str, float]) -> dict[str, Tensor]:
    """The features once for each head; on the way back the heads' gradients are brought to one L2 norm and summed.

    The gradient that a head i with loss weight w_i sends into its copy is w_i g_i. Into `features` goes the sum of
    w_i m g_i / |g_i|, where m is the mean of the |g_i| over the heads whose gradient is not zero. With weights of 1
    that is GradNorm's aim (Chen et al. 2018, arXiv 1711.02257, eq. 1 and 2, with alpha = 0: every task's gradient norm
    equals their mean) met at each step, instead of approached by learned weights. Norms are taken over the joined batch
    of all processes, with one reduction of as many numbers as there are heads, so that every process scales alike.

    Args:
        features: the map `[N, C, h, w]` that all heads read; in a process that has no images for them anything
            that requires grad.
        heads: the loss weight by name, the same in the same order in every process. Every process has to run its
            backward pass.
    """
    return dict(zip(heads, _EqualNorms.apply(features, tuple(heads.values())), strict=True))


class _EqualNorms(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features: Tensor, weights: Sequence[float]) -> tuple[Tensor, ...]:
        ctx.weights = features.new_tensor(weights, dtype=torch.float64)
        return tuple(features.view_as(features) for _ in weights)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor, None]:
        # A head that did not use its copy sends zeros.
        squares = torch.stack([torch.linalg.vector_norm(g, dtype=torch.float64).square() for g in gradients])
        if comm.get_world_size() > 1:
            torch.distributed.all_reduce(squares)
        there = squares > 0
        norms = squares.sqrt() / ctx.weights
        mean = torch.where(there, norms, 0).sum() / there.sum().clamp(min=1)
        factors = torch.where(there, mean / norms, torch.ones_like(norms))
        return sum(f.to(g.dtype) * g for f, g in zip(factors, gradients, strict=True)), None
