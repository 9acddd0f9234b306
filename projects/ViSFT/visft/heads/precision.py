"""Matching and losses in float32, whatever precision the trainer computes in."""

import functools
from collections.abc import Callable
from typing import TypeVar

import torch

Method = TypeVar("Method", bound=Callable)


def without_autocast(method: Method) -> Method:
    """Run a head's method with autocast off on the device of its weights.

    Under autocast a product of float32 matrices is computed in half precision: over 12,544 points a mask's cost is
    infinite in float16, and rounded to two or three digits in bfloat16, which changes pairs of the matching.
    """

    @functools.wraps(method)
    def exact(self, *args, **kwargs):
        with torch.autocast(next(self.parameters()).device.type, enabled=False):
            return method(self, *args, **kwargs)

    return exact
