"""Matching and losses in float32, whatever precision the trainer computes in."""

import functools
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

Computes = TypeVar("Computes", bound=Callable)


def without_autocast(function: Computes) -> Computes:
    """Run a method of a module, or a function of tensors, with autocast off.

    Under autocast a product of float32 matrices is computed in half precision: over 12,544 points a mask's cost is
    infinite in float16, and rounded to two or three digits in bfloat16, which changes pairs of the matching.

    Args:
        function: one of its arguments, `self` included, is a tensor or a module with weights, whose device it is.
    """

    @functools.wraps(function)
    def exact(*args, **kwargs):
        with torch.autocast(_device(args), enabled=False):
            return function(*args, **kwargs)

    return exact


def _device(args: tuple) -> str:
    for value in tree_leaves(args):
        tensor = next(value.parameters(), None) if isinstance(value, nn.Module) else value
        if isinstance(tensor, torch.Tensor):
            return tensor.device.type
    raise TypeError("expected a tensor, or a module with weights, among the arguments")
