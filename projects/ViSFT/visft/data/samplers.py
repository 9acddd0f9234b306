"""The order of training images and tasks, which depends only on (seed, iteration).

The training stream of a task is a sequence of positions 0, 1, 2, ... Each epoch is a permutation of the task's images,
which depends on (seed, epoch). A batch takes `batch_size` positions, and each process takes its share in the order of
ranks.
"""

import functools
import hashlib
import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from visft.data.repeat_factor import RepeatedOrder

_BLOCK = 4096
"""Number of tasks sampled at once. A resumed run counts a hundred thousand earlier ones in a millisecond."""


def derived_seed(seed: int, word: str) -> int:
    """Derive a seed for one use, such as a stage. Different uses have independent streams."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {word}".encode(), digest_size=6).digest(), "little")


class Positions:
    """Batch sampler: lists of (position in the stream, index of the record).

    Args:
        num_records: images per epoch. seed: of the order.
        start: position of this process's first image.
        share: images per batch in this process. stride: in all processes.
        repeats: [num_records] how often each occurs in an epoch, on average; None: once.
    """

    def __init__(
        self,
        num_records: int,
        seed: int,
        start: int,
        share: int,
        stride: int,
        repeats: np.ndarray | None = None,
    ):
        self.num_records, self.seed = num_records, seed
        self._repeated = None if repeats is None else RepeatedOrder(repeats, seed)
        self.start, self.share, self.stride = start, share, stride

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        first = self.start
        while True:
            yield [(p, self._index(p)) for p in range(first, first + self.share)]
            first += self.stride

    def _index(self, position: int) -> int:
        if self._repeated is not None:
            return self._repeated(position)
        epoch, offset = divmod(position, self.num_records)
        return int(_permutation(self.num_records, self.seed, epoch)[offset])


@functools.lru_cache(maxsize=16)  # for several streams, whose batches may span two epochs
def _permutation(length: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(length)


class TaskDraws:
    """Samples the task of each iteration with given ratios, independently, as a function of (seed, iteration).

    Args:
        ratios: relative frequencies above 0.
        seed: the same in all processes.
    """

    def __init__(self, ratios: Sequence[float], seed: int):
        bounds = np.cumsum(np.asarray(ratios, dtype=np.float64))
        self._bounds = bounds / bounds[-1]  # the last is exactly 1, above all samples
        self._seed = seed
        self._latest: tuple[int, np.ndarray] = (-1, np.zeros(0))

    def __call__(self, iteration: int) -> int:
        """Return the index of the task of an iteration (from 0)."""
        block, offset = divmod(iteration, _BLOCK)
        if self._latest[0] != block:
            self._latest = (block, self._block(block))
        return int(self._latest[1][offset])

    def counts(self, iterations: int) -> list[int]:
        """Return how often each task occurs in the first `iterations` iterations."""
        counts = np.zeros(len(self._bounds), dtype=np.int64)
        for block in range(-(-iterations // _BLOCK)):
            drawn = self._block(block)[: iterations - block * _BLOCK]
            counts += np.bincount(drawn, minlength=len(counts))
        return counts.tolist()

    def _block(self, block: int) -> np.ndarray:
        uniform = np.random.Generator(np.random.PCG64([self._seed, block])).random(_BLOCK)
        return np.searchsorted(self._bounds, uniform, side="right")


class TaskPositions:
    """Sampler of whole batches: (index of the task, positions and indices of its images)."""

    def __init__(self, draws: TaskDraws, streams: list[Positions], start: int, accumulate: int):
        self.draws, self.streams, self.start, self.accumulate = draws, streams, start, accumulate

    def __iter__(self) -> Iterator[tuple[int, list[tuple[int, int]]]]:
        streams = [iter(stream) for stream in self.streams]
        for iteration in itertools.count(self.start):
            task = self.draws(iteration)
            for _ in range(self.accumulate):
                yield task, next(streams[task])
