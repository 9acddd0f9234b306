"""Paired bootstrap intervals of differences, Holm's correction, and verdicts by rule."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

REPLICATES = 4000
LEVEL = 0.05
RULE = (
    "Intervals are 95 % of a paired bootstrap: seeds and items are drawn anew, the same ones for both towers (Efron's "
    "percentile interval). A family is `better` or `worse` when its difference is not 0 at the 5 % level after Holm's "
    "correction over the families of this table, else `not shown`. The mean over the families is one test of its own."
)


@dataclass(frozen=True)
class Comparison:
    """Figures of two towers in percentage points, with bootstrap replicates.

    Attributes:
        base, tuned: the figures. `tuned` is None if there is only one tower.
        replicates: `[REPLICATES]` differences.
        n: number of items.
    """

    base: float
    tuned: float | None
    replicates: np.ndarray | None
    n: int

    @property
    def difference(self) -> float | None:
        """Tuned minus base."""
        return None if self.tuned is None else self.tuned - self.base

    def interval(self) -> tuple[float, float] | tuple[None, None]:
        """The 95 % interval of the difference."""
        if self.replicates is None:
            return None, None
        low, high = np.quantile(self.replicates, [LEVEL / 2, 1 - LEVEL / 2])
        return float(low), float(high)

    def p_value(self) -> float | None:
        """The two-sided p-value: twice the smaller share of replicates on either side of 0, and never 0."""
        if self.replicates is None:
            return None
        below, above = (self.replicates <= 0).sum(), (self.replicates >= 0).sum()
        return float(min(1.0, 2 * (1 + min(below, above)) / (1 + len(self.replicates))))


def compare(
    name: str,
    base: np.ndarray,
    tuned: np.ndarray | None,
    figure: Callable[[np.ndarray], np.ndarray],
    replicates: int = REPLICATES,
    item_set: str = "",
    seed_set: str = "",
) -> Comparison:
    """Compare two towers on one benchmark.

    Args:
        name: of the benchmark. Without a shared set, it alone seeds the draws.
        base, tuned: scores `[seeds, items, k]` of the same seeds and items.
        figure: maps means `[..., k]` to figures `[...]` in 0..1.
        item_set: a name shared by benchmarks with the same items. Each replicate draws the same items for all of them,
            so that `mean` does not count their common luck as independent. "": the benchmark's own.
        seed_set: the same for seeds, for example those of a training, whose luck all benchmarks share.
    """
    n = base.shape[1]
    value = 100 * float(figure(base.mean((0, 1))))
    if tuned is None:
        return Comparison(value, None, None, n)
    of_seeds, of_items = _generator(f"seeds/{seed_set or name}"), _generator(f"items/{item_set or name}")
    differences = []
    size = max(1, 20_000_000 // max(1, n))
    for start in range(0, replicates, size):
        count = min(size, replicates - start)
        seeds = _weights(of_seeds, count, len(base))
        items = _weights(of_items, count, n)
        sides = [_resampled(scores, seeds, items) for scores in (base, tuned)]
        differences.append(100 * (figure(sides[1]) - figure(sides[0])))
    return Comparison(value, 100 * float(figure(tuned.mean((0, 1)))), np.concatenate(differences), n)


def mean(parts: Sequence[Comparison]) -> Comparison:
    """Return the mean of comparisons, replicate by replicate (see `item_set` of `compare`). n is their sum."""
    tuned = [part.tuned for part in parts]
    paired = all(value is not None for value in tuned)
    return Comparison(
        base=float(np.mean([part.base for part in parts])),
        tuned=float(np.mean(tuned)) if paired else None,
        replicates=np.mean([part.replicates for part in parts], axis=0) if paired else None,
        n=sum(part.n for part in parts),
    )


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Return Holm's adjusted p-values (Scandinavian Journal of Statistics 6, 1979)."""
    adjusted, running = {}, 0.0
    for place, name in enumerate(sorted(p_values, key=p_values.get)):
        running = max(running, min(1.0, (len(p_values) - place) * p_values[name]))
        adjusted[name] = running
    return adjusted


def verdict(difference: float | None, adjusted: float | None) -> str | None:
    """`better`, `worse` or `not shown`, see `RULE`; None where nothing was compared."""
    if difference is None or adjusted is None:
        return None
    if adjusted >= LEVEL or difference == 0:
        return "not shown"
    return "better" if difference > 0 else "worse"


def _generator(purpose: str) -> np.random.Generator:
    return np.random.default_rng(int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:8], "little"))


def _weights(generator: np.random.Generator, count: int, n: int) -> np.ndarray:
    """Return the shares `[count, n]` of n items in `count` draws of n with replacement."""
    return generator.multinomial(n, np.full(n, 1 / n), size=count).astype(np.float64) / n


def _resampled(scores: np.ndarray, seeds: np.ndarray, items: np.ndarray) -> np.ndarray:
    """Return means `[count, k]` of scores `[seeds, items, k]` under weights `[count, seeds]` and `[count, items]`."""
    total = np.zeros((len(items), scores.shape[2]))
    for s in range(scores.shape[0]):
        total += seeds[:, s : s + 1] * (items @ scores[s])
    return total
