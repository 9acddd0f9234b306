"""Maps the records of a stream to samples, with random numbers that depend only on seed and position."""

import contextlib
import random
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch.utils.data import Dataset

from visft.data.images import ImageError
from visft.errors import DataError, VisftError


class Samples(Dataset):
    """Maps records by (position, index) from `Positions`.

    Errors of the data are returned, not raised, because a worker process would bury the message in its traceback.
    """

    def __init__(self, records: Dataset, mapper: Callable[[dict], dict], *, seed: int, skip_broken: bool):
        self.records, self.mapper = records, mapper
        self.seed, self.skip_broken = seed, skip_broken

    def __getitem__(self, place: tuple[int, int]) -> dict | VisftError:
        position, index = place
        skipped = []
        for step in range(len(self.records)):
            record = self.records[(index + step) % len(self.records)]
            try:
                with _seeded(self.seed, position):
                    sample = self.mapper(record)
            except ImageError as error:
                if not self.skip_broken:
                    return error
                skipped.append(record["file_name"])
            except VisftError as error:
                return error
            else:
                return sample | {"skipped": skipped} if skipped else sample
        return DataError(
            f"none of the {len(self.records)} training images decodes, the first is {skipped[0]}; copy them again"
        )


class TaskSamples(Dataset):
    """Maps whole batches by (index of the task, positions and indices of its images) from `TaskPositions`."""

    def __init__(self, names: list[str], samples: list[Samples]):
        self.names, self.samples = names, samples

    def __getitem__(self, place: tuple[int, list[tuple[int, int]]]) -> tuple[str, list]:
        task, positions = place
        return self.names[task], [self.samples[task][position] for position in positions]


class TestSamples(Dataset):
    """Maps records by their index."""

    def __init__(self, records: Dataset, mapper: Callable[[dict], dict]):
        self.records, self.mapper = records, mapper

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict | VisftError:
        try:
            # detectron2's transforms use numpy's generator even with only one size to choose from.
            with _seeded(0, index):
                return self.mapper(self.records[index])
        except VisftError as error:
            return error


@contextlib.contextmanager
def _seeded(seed: int, position: int) -> Iterator[None]:
    """Within the block, seed the global generators of Python, numpy and torch (CPU). Restores them afterwards.

    `torch.manual_seed` would also change CUDA's generators.
    """
    words = np.random.SeedSequence([seed, position]).generate_state(4)
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    random.seed(int(words[0]))
    np.random.seed(words[1:3])
    torch.default_generator.manual_seed(int(words[3]))
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])
