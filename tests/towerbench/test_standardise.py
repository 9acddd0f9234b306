"""Features standardised channel by channel, with a training set in memory or in parts."""

import numpy as np
import pytest
import torch

from towerbench.standardise import Standardiser


def features(seed: int, *shape: int) -> torch.Tensor:
    """`[N, P, C]`, each channel with a mean and a deviation of its own."""
    rng = np.random.default_rng(seed)
    places, scales = rng.uniform(-50, 50, shape[-1]), rng.uniform(0.1, 10, shape[-1])
    return torch.from_numpy((rng.standard_normal(shape) * scales + places).astype(np.float32))


@pytest.mark.parametrize("channels", [1, 2])
def test_other_features_are_measured_by_those_of_training(channels):
    train, test = features(0, 30, 9, 5), features(1, 7, 9, 5)
    flat = train.numpy().reshape(-1, 5).astype(np.float64)
    if channels == 1:
        train, test = train.transpose(1, 2), test.transpose(1, 2)
    for standardised, freedom in (
        (Standardiser.of(train, channels), 1),
        (Standardiser.streamed(train.split(8), channels), 0),
    ):
        expected = (test.movedim(channels, -1).numpy() - flat.mean(0)) / flat.std(0, ddof=freedom)
        found = standardised(test)
        assert found.shape == test.shape and found.dtype == torch.float32
        np.testing.assert_allclose(found.movedim(channels, -1).numpy(), expected, rtol=1e-4, atol=1e-4)


def test_parts_may_be_cut_anywhere():
    train = features(2, 30, 9, 5)
    whole, *others = (Standardiser.streamed(train.split(size), 2)(train) for size in (30, 1, 7))
    for other in others:
        torch.testing.assert_close(other, whole, rtol=1e-5, atol=1e-5)


def test_a_constant_channel_becomes_zero():
    train = features(3, 6, 4, 3)
    train[:, :, 1] = 0.25
    for standardised in (Standardiser.of(train, 2), Standardiser.streamed([train[:2], train[2:]], 2)):
        assert (standardised(train)[:, :, 1] == 0).all()
