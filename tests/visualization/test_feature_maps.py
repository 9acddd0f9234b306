"""Principal components, colours, similarity maps and matches against independent computations."""

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from visft.visualization import (
    colours,
    mutual_matches,
    principal_components,
    similarity_maps,
    value_range,
)


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def test_components_are_those_of_sklearn_up_to_sign():
    features = torch.randn(200, 12) * torch.linspace(3, 0.5, 12) + 1
    found = principal_components([features])
    rows = unit(features.double().numpy())
    truth = PCA(3, svd_solver="full").fit(rows)
    signs = np.sign((found.directions.numpy() * truth.components_).sum(1))
    np.testing.assert_allclose(found.directions.numpy() * signs[:, None], truth.components_, atol=1e-5)
    np.testing.assert_allclose(found.project(features).numpy() * signs, truth.transform(rows), atol=1e-5)
    # The sign is chosen by the largest entry.
    assert (found.directions.gather(1, found.directions.abs().argmax(1, keepdim=True)) > 0).all()


def test_towers_weigh_the_same_whatever_their_numbers_and_lengths():
    first, second = torch.randn(50, 6) + 1, torch.randn(80, 6) * torch.arange(1, 7)
    found = principal_components([first, second])
    again = principal_components([first.repeat(3, 1), 10 * second])
    for name in ("mean", "directions"):
        torch.testing.assert_close(getattr(found, name), getattr(again, name), atol=1e-5, rtol=0)
    # By the covariance, written out.
    a, b = (unit(x.double().numpy()) for x in (first, second))
    mean = (a.mean(0) + b.mean(0)) / 2
    covariance = sum((x - mean).T @ (x - mean) / len(x) for x in (a, b)) / 2
    top = np.linalg.svd(covariance)[0][:, 0]
    assert abs(top @ found.directions[0].double().numpy()) == pytest.approx(1, abs=1e-6)


def test_swapped_towers_have_the_same_colours():
    first, second = torch.randn(5, 4, 8), torch.randn(5, 4, 8)
    one, other = principal_components([first, second]), principal_components([second, first])
    torch.testing.assert_close(colours(first, one), colours(first, other), atol=1e-4, rtol=0)


def test_colours_fill_their_range_and_ignore_a_few_outliers():
    features = torch.randn(1000, 8)
    shown = colours(features, principal_components([features]))
    assert shown.shape == (1000, 3) and shown.min() == 0 and shown.max() == 1
    assert 0.15 < shown.std() < 0.35
    # A percent at either end is cut.
    assert ((shown == 0).float().mean(0) - 0.01).abs().max() < 0.002
    assert ((shown == 1).float().mean(0) - 0.01).abs().max() < 0.002


def test_too_few_features_are_refused():
    with pytest.raises(ValueError, match="3 components were asked for of 2 features of 8"):
        principal_components([torch.randn(2, 8)])


def test_similarity_is_the_cosine():
    patches, texts = torch.randn(3, 4, 6), torch.randn(2, 6)
    found = similarity_maps(patches, texts)
    for t in range(2):
        for y in range(3):
            for x in range(4):
                a, b = patches[y, x].numpy(), texts[t].numpy()
                cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
                assert float(found[t, y, x]) == pytest.approx(cosine, abs=1e-6)


def test_range_is_of_all_maps_and_never_empty():
    low, high = value_range([torch.linspace(0, 1, 101), torch.linspace(1, 2, 101)])
    assert low == pytest.approx(
        np.quantile(np.r_[np.linspace(0, 1, 101), np.linspace(1, 2, 101)], 0.01), abs=1e-6
    )
    assert high == pytest.approx(2 - low, abs=1e-6)
    low, high = value_range([torch.ones(3, 3)])
    assert low < high


def test_matches_are_mutual_and_the_most_similar_come_first():
    first, second = torch.randn(40, 5), torch.randn(30, 5)
    pairs, cosines = mutual_matches(first, second)
    table = unit(first.numpy()) @ unit(second.numpy()).T
    expected = {
        (i, j)
        for i in range(40)
        for j in range(30)
        if table[i, j] == table[i].max() and table[i, j] == table[:, j].max()
    }
    assert set(map(tuple, pairs.tolist())) == expected and len(pairs) == len(expected) > 5
    assert cosines.tolist() == sorted(cosines.tolist(), reverse=True)
    np.testing.assert_allclose(cosines.numpy(), [table[i, j] for i, j in pairs.tolist()], atol=1e-6)
    assert mutual_matches(first, second, 4)[0].tolist() == pairs[:4].tolist()
