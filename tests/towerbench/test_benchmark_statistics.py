"""Intervals, corrections and verdicts: against scipy's bootstrap, hand-made numbers, and what must hold."""

import numpy as np
import pytest
from scipy import stats

from towerbench import statistics


def mean(values):
    return values.mean(-1)


def paired(n=400, seeds=1, effect=0.1, seed=0):
    rng = np.random.default_rng(seed)
    base = rng.random((seeds, n, 1))
    return base, base + effect + 0.5 * rng.standard_normal((seeds, n, 1))


def test_interval_is_scipys_paired_percentile_bootstrap():
    base, tuned = paired()
    found = statistics.compare("a", base, tuned, mean)
    difference = 100 * (tuned - base)[0, :, 0]
    expected = stats.bootstrap((difference,), np.mean, n_resamples=9999, method="percentile", rng=1)
    width = expected.confidence_interval.high - expected.confidence_interval.low
    low, high = found.interval()
    assert found.difference == pytest.approx(difference.mean())
    assert low == pytest.approx(expected.confidence_interval.low, abs=0.05 * width)
    assert high == pytest.approx(expected.confidence_interval.high, abs=0.05 * width)


def test_benchmarks_on_the_same_items_do_not_narrow_the_interval_of_their_mean():
    """Two that always agree say no more than one: their mean has its interval. Independent ones narrow it by root 2."""
    base, tuned = paired()
    one = statistics.compare("a", base, tuned, mean, item_set="scenes")
    same = statistics.mean([one, statistics.compare("b", base, tuned, mean, item_set="scenes")])
    apart = statistics.mean([one, statistics.compare("b", base, tuned, mean)])
    assert same.interval() == one.interval()
    assert np.ptp(apart.interval()) == pytest.approx(np.ptp(one.interval()) / 2**0.5, rel=0.1)


def test_benchmarks_of_the_same_training_do_not_narrow_what_its_seeds_spread():
    effects = np.array([0.0, 0.1, 0.2, 0.3, 0.4])
    base = np.zeros((5, 50, 1))
    tuned = base + effects[:, None, None]
    same = [statistics.compare(name, base, tuned, mean, seed_set="training") for name in "ab"]
    apart = [statistics.compare(name, base, tuned, mean) for name in "ab"]
    assert statistics.mean(same).interval() == same[0].interval()
    assert np.ptp(statistics.mean(apart).interval()) < 0.85 * np.ptp(same[0].interval())


def test_pairing_uses_that_both_towers_saw_the_same_items():
    rng = np.random.default_rng(0)
    base = rng.random((1, 300, 1))
    shuffled = base[:, rng.permutation(300)]
    same = statistics.compare("a", base, base + 0.01, mean)
    other = statistics.compare("a", base, shuffled + 0.01, mean)
    assert np.ptp(same.interval()) < 1e-9 < 1 < np.ptp(other.interval())


def test_seeds_are_drawn_too():
    """Where seeds alone differ, the replicates spread as a mean of that many draws does."""
    effects = np.array([0.0, 0.1, 0.3, 0.4])
    base = np.zeros((4, 50, 1))
    found = statistics.compare("a", base, base + effects[:, None, None], mean)
    assert found.replicates.std() == pytest.approx(100 * effects.std() / 2, rel=0.05)


def test_identical_towers_are_not_told_apart():
    base, _ = paired(seeds=3)
    found = statistics.compare("a", base, base, mean)
    assert found.difference == 0 and found.interval() == (0, 0) and found.p_value() == 1
    assert statistics.verdict(found.difference, found.p_value()) == "not shown"


def test_error_rate_where_nothing_differs():
    """Under the null about 5 % of intervals miss 0."""
    misses = 0
    for seed in range(200):
        base, tuned = paired(n=80, effect=0.0, seed=seed)
        misses += statistics.compare(f"{seed}", base, tuned, mean, replicates=400).p_value() < 0.05
    assert 2 <= misses <= 22


def test_figure_of_sums_is_the_figure_of_the_drawn_items():
    """Mean IoU, a function of sums over items: a replicate equals the direct computation on the items it drew."""
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 50, (1, 30, 6)).astype(float)  # intersections of three classes, unions of three

    def iou(means):
        return (means[..., :3] / means[..., 3:]).mean(-1)

    found = statistics.compare("iou", counts, counts, iou)
    assert found.base == pytest.approx(100 * np.mean(counts[0, :, :3].sum(0) / counts[0, :, 3:].sum(0)))
    weights = statistics._weights(np.random.default_rng(3), 1, 30)
    drawn = np.repeat(np.arange(30), np.round(weights[0] * 30).astype(int))
    direct = np.mean(counts[0, drawn, :3].sum(0) / counts[0, drawn, 3:].sum(0))
    resampled = statistics._resampled(counts, np.ones((1, 1)), weights)
    assert len(drawn) == 30 and iou(resampled)[0] == pytest.approx(direct)


def test_holm_by_hand():
    # 4 x 0.01, 3 x 0.015, 2 x 0.03, 1 x 0.04, never falling.
    found = statistics.holm({"d": 0.04, "a": 0.01, "c": 0.03, "b": 0.015})
    assert found == pytest.approx({"a": 0.04, "b": 0.045, "c": 0.06, "d": 0.06})
    assert statistics.holm({"a": 0.9, "b": 0.8})["a"] == 1


@pytest.mark.parametrize(
    ("difference", "p", "expected"),
    [(1.0, 0.049, "better"), (-1.0, 0.049, "worse"), (1.0, 0.05, "not shown"), (None, None, None)],
)
def test_verdict(difference, p, expected):
    assert statistics.verdict(difference, p) == expected


def test_mean_of_families():
    parts = [statistics.compare(name, *paired(effect=e), mean) for name, e in (("a", 0.2), ("b", -0.2))]
    both = statistics.mean(parts)
    assert both.difference == pytest.approx((parts[0].difference + parts[1].difference) / 2)
    assert both.replicates.std() == pytest.approx(np.hypot(*(p.replicates.std() for p in parts)) / 2, rel=0.1)
    assert both.n == 800
