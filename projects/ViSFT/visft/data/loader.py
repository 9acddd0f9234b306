"""Loaders whose every batch follows from (seed, iteration): not from the number of workers, processes or restarts.

The training stream is a sequence of positions 0, 1, 2, ...: epoch after epoch, each a permutation of the data set drawn
from (seed, epoch). The augmentation of the sample at a position is drawn from (seed, position). Iteration k takes
positions k * batch_size to (k + 1) * batch_size, of which each process takes its share in the order of ranks.
"""

import contextlib
import functools
import hashlib
import logging
import random
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data.build import trivial_batch_collator
from detectron2.data.samplers import InferenceSampler
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset

from visft.data.datasets.coco import as_dataset
from visft.data.headers import ImageRules
from visft.data.images import ImageError
from visft.data.mapper import ViSFTMapper, build_test_mapper
from visft.data.repeat_factor import RepeatedOrder, build_repeats, epoch_length
from visft.data.training_records import load_records
from visft.data.workers import loader_options, num_workers, pins_memory
from visft.errors import ConfigError, DataError, VisftError

logger = logging.getLogger(__name__)


def build_train_loader(
    cfg: CfgNode,
    *,
    records: Dataset | None = None,
    repeats: np.ndarray | None = None,
    reads_masks: bool = True,
    batch_size: int,
    start_iteration: int = 0,
    seed: int,
) -> "TrainLoader":
    """The endless training stream of `DATASETS.TRAIN`, from one iteration on.

    Args:
        cfg: reads DATASETS.TRAIN, DATALOADER.{NUM_WORKERS, FILTER_EMPTY_ANNOTATIONS, SKIP_BROKEN, SAMPLER_TRAIN,
            REPEAT_THRESHOLD, REPEAT_SQRT}, INPUT and VISFT.INPUT.
        records: dataset dicts as `load_records` makes them; None: all of `DATASETS.TRAIN`.
        repeats: of given records, how often each comes in an epoch (see `visft.data.repeat_factor`); None: once.
        reads_masks: whether `gt_masks` are wanted.
        batch_size: images an iteration over all processes, as `IMS_PER_BATCH`.
        start_iteration: the first batch to deliver; the batches are those of a run that started at 0.
        seed: must be the same in all processes, and the same after a restart.

    Raises:
        ConfigError: the processes cannot share `batch_size` evenly.
        DataError: a data set is broken (see `check_registered`), or nothing is left of it.
    """
    if records is None:
        records = load_records(
            tuple(cfg.DATASETS.TRAIN),
            train=True,
            filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
            rules=ImageRules.of(cfg),
        )
        repeats = build_repeats(cfg, records)
    return TrainLoader(
        records,
        ViSFTMapper(cfg, is_train=True, reads_masks=reads_masks),
        repeats=repeats,
        batch_size=batch_size,
        start_iteration=start_iteration,
        seed=seed,
        num_workers=num_workers(cfg),
        pin_memory=pins_memory(cfg),
        skip_broken=cfg.DATALOADER.SKIP_BROKEN,
    )


def build_test_loader(cfg: CfgNode, dataset_name: str) -> "TestLoader":
    """One pass over a data set in its order, an image a batch, each process its share (detectron2's InferenceSampler).

    Raises:
        DataError: the data set is broken.
    """
    return TestLoader(
        load_records((dataset_name,), train=False, rules=ImageRules.of(cfg)),
        build_test_mapper(cfg),
        num_workers=num_workers(cfg),
        pin_memory=pins_memory(cfg),
        skip_broken=cfg.DATALOADER.SKIP_BROKEN,
    )


def derived_seed(seed: int, word: str) -> int:
    """A seed for one use of a seed, such as a stage: streams of different uses are independent."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {word}".encode(), digest_size=6).digest(), "little")


def share_of(batch_size: int, world_size: int, key: str) -> int:
    """Images a process of a batch.

    Raises:
        ConfigError: the processes cannot share it evenly; names the config key.
    """
    if batch_size < 1 or batch_size % world_size:
        raise ConfigError(
            f"{key} is {batch_size}, which {world_size} processes cannot share evenly; "
            f"expected a multiple of {world_size}"
        )
    return batch_size // world_size


class ImageCounts:
    """What a loader's stream has seen: epochs, and images that were replaced because they do not decode.

    Args:
        num_records: images an epoch, on average.
        batch_size: over all processes.
        batches: that were delivered before.
        task: named in messages, where there are several streams.

    Attributes:
        skipped: the images that did not decode, with how often they were replaced.
    """

    def __init__(self, num_records: int, batch_size: int, batches: int, task: str = ""):
        self.skipped: dict[str, int] = {}
        self._num_records, self._batch_size, self._batches = num_records, batch_size, batches
        self._task = f"{task}: " if task else ""
        self._skipped_in_epoch = 0

    def see(self, batch: list) -> None:
        """Count a batch; what `Samples` left in it for the loader is taken out.

        Raises:
            VisftError: the one that stands in the place of a sample.
        """
        for sample in batch:
            if isinstance(sample, VisftError):
                raise sample
            for file_name in sample.pop("skipped", ()):
                self.skipped[file_name] = self.skipped.get(file_name, 0) + 1
                self._skipped_in_epoch += 1
        self._batches += 1
        epochs_before, epochs_now = (
            i * self._batch_size // self._num_records for i in (self._batches - 1, self._batches)
        )
        if epochs_now > epochs_before and self._skipped_in_epoch:
            logger.warning(
                "%sEpoch %d: %d times an image that does not decode was replaced by another, the first is %s",
                self._task,
                epochs_now,
                self._skipped_in_epoch,
                next(iter(self.skipped)),
            )
            self._skipped_in_epoch = 0


class TrainLoader:
    """Iterator over batches, each a list of mapped dicts. See the module for how batches are made."""

    def __init__(
        self,
        records: list[dict] | Dataset,
        mapper: Callable[[dict], dict],
        *,
        repeats: np.ndarray | None = None,
        batch_size: int,
        start_iteration: int = 0,
        seed: int,
        num_workers: int = 0,
        pin_memory: bool = False,
        skip_broken: bool = False,
        rank: int | None = None,
        world_size: int | None = None,
    ):
        """
        Args:
            records: detectron2 dataset dicts; as a list they are packed, so that workers share their memory.
            mapper: makes a sample of a record; may draw from `random`, `numpy.random` and torch's CPU generator.
            repeats: [number of records] how often each comes in an epoch; None: once.
            batch_size: over all processes.
            num_workers, pin_memory: see `loader_options`.
            skip_broken: put the next image that decodes in the place of one that does not, instead of stopping.
            rank, world_size: default: those of the process group.
        """
        rank = comm.get_rank() if rank is None else rank
        world_size = comm.get_world_size() if world_size is None else world_size
        share = share_of(batch_size, world_size, "IMS_PER_BATCH")
        records = as_dataset(records)
        epoch = len(records) if repeats is None else epoch_length(repeats)
        self._counts = ImageCounts(epoch, batch_size, start_iteration)
        self._loader = DataLoader(
            Samples(records, mapper, seed=seed, skip_broken=skip_broken),
            batch_sampler=Positions(
                len(records), seed, start_iteration * batch_size + rank * share, share, batch_size, repeats
            ),
            collate_fn=trivial_batch_collator,
            **loader_options(num_workers, pin_memory),
        )
        self._batches: Iterator | None = None

    @property
    def skipped(self) -> dict[str, int]:
        """The images that did not decode, with how often they were replaced (by `skip_broken`) so far in this
        process."""
        return self._counts.skipped

    def __iter__(self) -> "TrainLoader":
        return self

    def __next__(self) -> list[dict]:
        if self._batches is None:
            self._batches = iter(self._loader)
        batch = next(self._batches)
        self._counts.see(batch)
        return batch


class TestLoader:
    """Batches of one mapped dict. With `skip_broken`, images that do not decode are left out, with a count at the
    end; COCO's evaluation then counts their objects as missed."""

    def __init__(
        self,
        records: Sequence[dict],
        mapper: Callable[[dict], dict],
        *,
        num_workers: int = 0,
        pin_memory: bool = False,
        skip_broken: bool = False,
    ):
        self._skip_broken = skip_broken
        self._loader = DataLoader(
            _TestSamples(as_dataset(records), mapper),
            batch_size=1,
            sampler=InferenceSampler(len(records)),
            collate_fn=trivial_batch_collator,
            **loader_options(num_workers, pin_memory),
        )

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[list[dict]]:
        skipped = []
        for batch in self._loader:
            (sample,) = batch
            if isinstance(sample, ImageError) and self._skip_broken:
                skipped.append(sample)
            elif isinstance(sample, VisftError):
                raise sample
            else:
                yield batch
        if skipped:
            logger.warning(
                "%d of %d images do not decode and were left out, the first: %s",
                len(skipped),
                len(self),
                skipped[0],
            )


class Positions:
    """Batch sampler: lists of (position in the stream, index of the record).

    Args:
        num_records: images an epoch. seed: of the order.
        start: position of this process's first image.
        share: images a batch in this process. stride: in all processes.
        repeats: [num_records] how often each comes in an epoch, on average; None: once.
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


@functools.lru_cache(maxsize=16)  # several streams; and a batch may span the end of an epoch
def _permutation(length: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(length)


class Samples(Dataset):
    """Maps records by (position, index), as `Positions` gives them. What is wrong with the data is returned, not
    raised: a worker process would bury the sentence in its own traceback."""

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
            f"none of the {len(self.records)} images to train on decodes, the first is {skipped[0]}; copy them again"
        )


class _TestSamples(Dataset):
    def __init__(self, records: Dataset, mapper: Callable[[dict], dict]):
        self.records, self.mapper = records, mapper

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict | VisftError:
        try:
            # detectron2's transforms draw from numpy also where there is but one size to draw.
            with _seeded(0, index):
                return self.mapper(self.records[index])
        except VisftError as error:
            return error


@contextlib.contextmanager
def _seeded(seed: int, position: int) -> Iterator[None]:
    """Inside, the global generators of Python, numpy and torch (CPU) follow from the arguments; then they are as
    before.

    torch's is set on its own: `torch.manual_seed` would change CUDA's too.
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
