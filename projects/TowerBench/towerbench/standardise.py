"""Features standardised channel by channel by those of a training set: what readouts of both suites see."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

EPSILON = 1e-6
"""Added to deviations: a channel that is constant becomes 0."""


@dataclass(frozen=True)
class Standardiser:
    """Takes a mean off features and divides them by a standard deviation, channel by channel.

    Args:
        mean, deviation: with one dimension for each of the features', of size 1 but for the channels: `[1, 1, C]` for
            cells `[N, P, C]`, `[1, C, 1]` for columns `[N, C, w]`.
    """

    mean: torch.Tensor
    deviation: torch.Tensor

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        """Features standardised, of the same shape."""
        return (features - self.mean) / self.deviation

    @classmethod
    def of(cls, features: torch.Tensor, channels: int) -> "Standardiser":
        """By a training set that is in memory; its deviation is the sample's (n - 1).

        Args:
            channels: which dimension they are.
        """
        others = _others(features, channels)
        return cls(features.mean(others, keepdim=True), features.std(others, keepdim=True) + EPSILON)

    @classmethod
    def streamed(cls, parts: Iterable[torch.Tensor], channels: int) -> "Standardiser":
        """By a training set that is not in memory as a whole, summed in double precision; its deviation is the
        population's (n).

        Args:
            parts: of the set, which differ in size along the first dimension alone; at least one.
            channels: which dimension they are.
        """
        count, total, squares = 0, 0.0, 0.0
        for part in parts:
            values, others = part.double(), _others(part, channels)
            count += part.numel() // part.shape[channels]
            total = total + values.sum(others, keepdim=True)
            squares = squares + values.square().sum(others, keepdim=True)
        mean = total / count
        deviation = (squares / count - mean**2).clamp(min=0).sqrt()
        return cls(mean.float(), deviation.float() + EPSILON)


def standardised(
    parts: Callable[[Any], Iterable[torch.Tensor]], train: Any, channels: int
) -> Callable[[Any], Iterator[torch.Tensor]]:
    """Features of a set, some at a time, standardised by those of a training set.

    Args:
        parts: from a set to its features, some at a time.
        train: the training set. channels: which dimension they are.
    """
    standardiser = Standardiser.streamed(parts(train), channels)
    return lambda images: map(standardiser, parts(images))


def _others(features: torch.Tensor, channels: int) -> tuple[int, ...]:
    return tuple(i for i in range(features.dim()) if i != channels)
