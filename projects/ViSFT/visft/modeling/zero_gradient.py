"""Zeros that a backward pass carries to parameters which this process's images do not reach."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def zero_for(parameters: Iterable[nn.Parameter], device: torch.device) -> Tensor:
    """A zero that requires grad; under DistributedDataParallel its backward pass gives each parameter a zero gradient.

    DistributedDataParallel waits for every parameter, and reduces gradients as soon as they are there: what speaks with
    other processes on its way back has to come before. Given this zero as its input, it does.

    Args:
        parameters: those that do not train are passed over.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if trained and getattr(DistributedDataParallel, "_active_ddp_module", None) is not None:
        return _ZeroGradient.apply(*trained)
    return torch.zeros((), device=device, requires_grad=True)


class _ZeroGradient(torch.autograd.Function):
    """Zero, with a zero gradient for each parameter given; no arithmetic on them."""

    @staticmethod
    def forward(ctx, *parameters: Tensor) -> Tensor:
        ctx.like = [(p.shape, p.dtype, p.device) for p in parameters]
        return torch.zeros((), device=parameters[0].device)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.zeros((), dtype=t, device=d).expand(shape) for shape, t, d in ctx.like)
