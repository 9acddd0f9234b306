"""Frozen weight matrices in fewer bits, and products with them (`MODEL.CLIP_VIT.FROZEN_DTYPE`)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visft.errors import ConfigError, check_one_of

KINDS = {"float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.int8}


def check(kind: str) -> None:
    """Raise ConfigError if `kind` is none of KINDS or "", or needs a library that is not installed."""
    check_one_of("MODEL.CLIP_VIT.FROZEN_DTYPE", kind, ("", *KINDS))
    if kind == "int8":
        try:
            import torchao.quantization  # noqa: F401
        except ImportError as error:
            raise ConfigError(
                "MODEL.CLIP_VIT.FROZEN_DTYPE is int8, which needs torchao; it is not installed: pip install torchao"
            ) from error


def store(block: nn.Module, kind: str) -> None:
    """Convert a block's weight matrices but LoRA's, in place.

    Vectors (norms, biases) stay: they weigh nothing, and norms suffer most from low precision.

    Args:
        kind: one of KINDS. int8: one scale for each output channel, by torchao; weights on `meta` stay as they are.
    """
    for name, parameter in [*block.named_parameters()]:
        if parameter.ndim < 2 or name.startswith("lora.") or is_int8(parameter):
            continue
        if kind != "int8":
            if parameter.dtype != KINDS[kind]:
                parameter.data = parameter.data.to(KINDS[kind])
        elif not parameter.is_meta:
            owner, _, leaf = name.rpartition(".")
            weight = nn.Parameter(_to_int8(parameter.data), requires_grad=False)
            block.get_submodule(owner)._parameters[leaf] = weight


def is_int8(weight: Tensor) -> bool:
    """Whether a weight is stored as int8."""
    return hasattr(weight, "qdata")


def holds(stored: Tensor, weight: Tensor) -> bool:
    """Whether a stored weight is `weight` in its own, lower precision."""
    if is_int8(stored):
        again = _to_int8(weight)
        return torch.equal(again.qdata, stored.qdata) and torch.equal(again.scale, stored.scale)
    return stored.dtype != weight.dtype and torch.equal(weight.to(stored.dtype), stored)


def _to_int8(weight: Tensor) -> Tensor:
    from torchao.quantization import Int8Tensor, PerRow

    return Int8Tensor.from_hp(weight, PerRow())


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` with a weight in any type.

    A frozen one in 16 bits is multiplied in its own type, one in int8 in that of `x`.
    """
    if not is_int8(weight) and (weight.dtype == x.dtype or torch.is_autocast_enabled(x.device.type)):
        return F.linear(x, weight, bias)
    return _FrozenLinear.apply(x, weight, bias)


class _FrozenLinear(torch.autograd.Function):
    """A linear layer whose frozen weight is of another type than the activations, which keep theirs.

    Weights in 16 bits are not converted in the forward pass. In the backward pass they are: gradients are too small for
    float16.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        if is_int8(weight):
            return F.linear(x, weight.dequantize().to(x.dtype), bias)
        low = weight.dtype
        return F.linear(x.to(low), weight, None if bias is None else bias.to(low)).to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (weight,) = ctx.saved_tensors
        dense = weight.dequantize() if is_int8(weight) else weight
        return grad @ dense.to(grad.dtype), None, None
