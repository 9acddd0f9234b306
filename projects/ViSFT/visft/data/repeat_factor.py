"""Repeat-factor sampling (LVIS, arXiv 1908.03195, appendix B.2): images of rare classes repeat within an epoch.

The factors are those of detectron2's RepeatFactorTrainingSampler. The order depends only on (seed, epoch), like that
of the plain stream (see `visft.data.loader`). Both are equal if no image is repeated.
"""

import bisect
import functools
import itertools
import logging
from collections import Counter
from collections.abc import Iterable

import numpy as np
from detectron2.config import CfgNode

from visft.data.datasets.coco import outlines_of
from visft.errors import ConfigError

logger = logging.getLogger(__name__)

SAMPLERS = ("TrainingSampler", "RepeatFactorTrainingSampler")
"""Values of DATALOADER.SAMPLER_TRAIN."""


def check_sampler(cfg: CfgNode) -> None:
    """Check the keys of the training sampler.

    Raises:
        ConfigError: DATALOADER.SAMPLER_TRAIN is not one of `SAMPLERS`, or REPEAT_THRESHOLD would repeat nothing.
    """
    loader = cfg.DATALOADER
    if loader.SAMPLER_TRAIN not in SAMPLERS:
        raise ConfigError(
            f"DATALOADER.SAMPLER_TRAIN is `{loader.SAMPLER_TRAIN}`; expected {' or '.join(SAMPLERS)}"
        )
    if loader.SAMPLER_TRAIN == SAMPLERS[1] and not loader.REPEAT_THRESHOLD > 0:
        raise ConfigError(
            f"DATALOADER.REPEAT_THRESHOLD is {loader.REPEAT_THRESHOLD}, with which RepeatFactorTrainingSampler repeats "
            "nothing: set a frequency above 0 (LVIS: 0.001)"
        )


def build_repeats(cfg: CfgNode, records: list[dict]) -> np.ndarray | None:
    """Return the repeat factors [len(records)] of a config, or None if every image occurs once per epoch.

    Args:
        cfg: reads DATALOADER.{SAMPLER_TRAIN, REPEAT_THRESHOLD, REPEAT_SQRT}.

    Raises:
        ConfigError: see `check_sampler`.
    """
    check_sampler(cfg)
    if cfg.DATALOADER.SAMPLER_TRAIN != SAMPLERS[1]:
        return None
    factors = repeat_factors(records, cfg.DATALOADER.REPEAT_THRESHOLD, cfg.DATALOADER.REPEAT_SQRT)
    logger.info(
        "repeat factors: %d of %d images come more than once, up to %.1f times; an epoch has %d",
        (factors > 1).sum(),
        len(factors),
        factors.max(),
        epoch_length(factors),
    )
    return factors


def repeat_factors(records: Iterable[dict], threshold: float, sqrt: bool = True) -> np.ndarray:
    """Return [number of records] how often each occurs in an epoch, on average; at least 1.

    A class in a fraction f of the images has the factor max(1, sqrt(threshold / f)). An image has that of its rarest
    class.

    Args:
        threshold: the fraction of images below which classes are repeated.
        sqrt: False: the factor of a class is max(1, threshold / f).
    """
    classes = [{a["category_id"] for a in record.get("annotations", ())} for record in outlines_of(records)]
    counts = Counter(itertools.chain.from_iterable(classes))
    factor = {c: max(1.0, (threshold * len(classes) / n) ** (0.5 if sqrt else 1)) for c, n in counts.items()}
    return np.array([max((factor[c] for c in own), default=1.0) for own in classes])


def epoch_length(factors: np.ndarray) -> int:
    """Return the average number of images per epoch."""
    return round(float(factors.sum()))


class RepeatedOrder:
    """Maps positions of the endless stream to records.

    In an epoch, an image occurs as often as the integer part of its factor, and once more with the probability of its
    fractional part, sampled again for each epoch. So epochs differ slightly in length.

    Args:
        factors: [number of records].
        seed: the same in all processes and after a restart.
    """

    def __init__(self, factors: np.ndarray, seed: int):
        self._whole = np.floor(factors).astype(np.int64)
        self._rest = factors - self._whole
        self._seed = seed
        self._starts = [0]  # of epochs, extended on demand
        self._epoch = functools.lru_cache(maxsize=2)(self._shuffled)  # a batch may span the end of an epoch

    def __call__(self, position: int) -> int:
        """Return the index of the record at a position."""
        while position >= self._starts[-1]:
            self._starts.append(self._starts[-1] + int(self._copies(len(self._starts) - 1).sum()))
        epoch = bisect.bisect_right(self._starts, position) - 1
        return int(self._epoch(epoch)[position - self._starts[epoch]])

    def _copies(self, epoch: int) -> np.ndarray:
        drawn = np.random.Generator(np.random.PCG64([self._seed, epoch, 1])).random(len(self._rest))
        return self._whole + (drawn < self._rest)

    def _shuffled(self, epoch: int) -> np.ndarray:
        records = np.repeat(np.arange(len(self._whole)), self._copies(epoch))
        return np.random.Generator(np.random.PCG64([self._seed, epoch])).permutation(records)
