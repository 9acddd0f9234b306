"""The matching against trying all assignments."""

import itertools

import pytest
import torch

from visft.modeling.heads.common.matcher import match


def least_cost(cost: torch.Tensor) -> float:
    """Of all one-to-one assignments of the shorter side of [Q, T]."""
    cost = cost if cost.shape[0] >= cost.shape[1] else cost.T
    columns = range(cost.shape[1])
    return min(
        sum(cost[row, column].item() for row, column in zip(rows, columns, strict=True))
        for rows in itertools.permutations(range(cost.shape[0]), cost.shape[1])
    )


def test_least_total_cost_for_each_image_and_layer():
    # Of four queries: fewer targets, none, as many, more.
    costs = [torch.randn(3, 4, targets) for targets in (2, 0, 4, 5)]
    matching = match(costs)
    assert matching.counts == (2, 0, 4, 4)
    assert matching.image.tolist() == [0, 0, 2, 2, 2, 2, 3, 3, 3, 3]
    start = 0
    for cost, count in zip(costs, matching.counts, strict=True):
        for layer in range(3):
            query = matching.query[layer, start : start + count].tolist()
            target = matching.target[layer, start : start + count].tolist()
            assert query == sorted(set(query)) and len(set(target)) == count
            total = sum(cost[layer, q, t].item() for q, t in zip(query, target, strict=True))
            assert total == pytest.approx(least_cost(cost[layer]) if count else 0, abs=1e-5)
        start += count


def test_indices_pick_the_pairs():
    costs = [torch.rand(2, 3, 2), torch.rand(2, 3, 1)]
    matching = match(costs)
    predictions = torch.arange(2 * 2 * 3).view(2, 2, 3)
    picked = predictions[matching.predictions]
    assert picked.shape == (2, 3)
    for layer in range(2):
        for m in range(3):
            assert picked[layer, m] == predictions[layer, matching.image[m], matching.query[layer, m]]
    targets = torch.tensor([[10, 11], [20, 99]])[matching.targets]
    assert (targets[:, :2].sort(1).values == torch.tensor([10, 11])).all() and (targets[:, 2] == 20).all()


def test_no_targets_at_all():
    matching = match([torch.zeros(2, 3, 0), torch.zeros(2, 3, 0)])
    assert matching.query.shape == (2, 0) and matching.counts == (0, 0)


def test_costs_that_are_not_finite_do_not_stop_it():
    cost = torch.tensor([[[float("nan"), 1.0], [0.5, float("inf")], [2.0, float("nan")]]])
    matching = match([cost])
    assert matching.query[0].tolist() == [0, 1] and matching.target[0].tolist() == [1, 0]
