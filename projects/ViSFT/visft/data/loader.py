"""Loaders whose batches depend only on (seed, iteration), not on the number of workers, processes or restarts.

See `visft.data.samplers` for the order of images. The augmentation at a position of the stream depends only on
(seed, position).
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from detectron2.config import CfgNode
from detectron2.data.build import trivial_batch_collator
from detectron2.data.samplers import InferenceSampler
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset

from visft.data.datasets.coco import as_dataset
from visft.data.headers import ImageRules
from visft.data.images import ImageError
from visft.data.mapper import ViSFTMapper, build_test_mapper
from visft.data.repeat_factor import build_repeats, epoch_length
from visft.data.samplers import Positions, TaskDraws, TaskPositions
from visft.data.samples import Samples, TaskSamples, TestSamples
from visft.data.training_records import load_records
from visft.data.workers import loader_options, num_workers, pins_memory
from visft.errors import ConfigError, VisftError

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
    """Build the endless training stream of `DATASETS.TRAIN`, starting at an iteration.

    Args:
        cfg: reads DATASETS.TRAIN, DATALOADER.{NUM_WORKERS, FILTER_EMPTY_ANNOTATIONS, SKIP_BROKEN, SAMPLER_TRAIN,
            REPEAT_THRESHOLD, REPEAT_SQRT}, INPUT and VISFT.INPUT.
        records: dataset dicts as `load_records` makes them; None: all of `DATASETS.TRAIN`.
        repeats: how often each given record occurs in an epoch (see `visft.data.repeat_factor`); None: once.
        reads_masks: whether `gt_masks` are needed.
        batch_size: images per iteration over all processes, like `IMS_PER_BATCH`.
        start_iteration: the first batch. Batches are the same as in a run that started at 0.
        seed: must be the same in all processes and after a restart.

    Raises:
        ConfigError: the processes cannot share `batch_size` evenly.
        DataError: a data set is broken (see `check_registered`), or no image is left.
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
    """Build one pass over a data set in order, one image per batch, split over processes (InferenceSampler).

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


def share_of(batch_size: int, world_size: int, key: str) -> int:
    """Return the number of images per process in a batch.

    Raises:
        ConfigError: the processes cannot share the batch evenly. The message names the config key.
    """
    if batch_size < 1 or batch_size % world_size:
        raise ConfigError(
            f"{key} is {batch_size}, which {world_size} processes cannot share evenly; "
            f"expected a multiple of {world_size}"
        )
    return batch_size // world_size


@dataclass(frozen=True)
class Task:
    """The data of one head in the iterations that sample its task."""

    name: str
    """Name of the head; "": all heads learn from this data."""
    records: Dataset
    """Dataset dicts with its labels."""
    mapper: Callable[[dict], dict]
    batch_size: int
    """Over all processes."""
    seed: int
    """For its order and augmentations."""
    repeats: np.ndarray | None = None
    """How often each record occurs in an epoch; None: once."""


class MixedLoader:
    """Iterator over batches of one task each: lists of mapped dicts whose `task` is the head's name, if it has one.

    All `accumulate` batches of an iteration belong to the sampled task. Each task has its own stream of batches, like
    `TrainLoader`. Its position is the number of batches that earlier iterations of the task have taken.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        draws: TaskDraws,
        *,
        start_iteration: int = 0,
        accumulate: int = 1,
        num_workers: int = 0,
        pin_memory: bool = False,
        skip_broken: bool = False,
        rank: int | None = None,
        world_size: int | None = None,
    ):
        """
        Args:
            tasks: at least one.
            draws: selects the task of each iteration.
            start_iteration: the first iteration. Batches are the same as in a run that started at 0.
            accumulate: batches per iteration.
            num_workers, pin_memory: see `loader_options`.
            skip_broken: replace an image that does not decode by the next one that does, instead of stopping.
            rank, world_size: the default is those of the process group.

        Raises:
            ConfigError: the processes cannot share a task's batch evenly.
        """
        rank = comm.get_rank() if rank is None else rank
        world_size = comm.get_world_size() if world_size is None else world_size
        earlier = [accumulate * count for count in draws.counts(start_iteration)]
        samples, streams, self._counts = [], [], {}
        for task, batches in zip(tasks, earlier, strict=True):
            key = f"VISFT.TASKS.{task.name.upper()}.IMS_PER_BATCH" if task.name else "IMS_PER_BATCH"
            share = share_of(task.batch_size, world_size, key)
            samples.append(Samples(task.records, task.mapper, seed=task.seed, skip_broken=skip_broken))
            start = batches * task.batch_size + rank * share
            streams.append(
                Positions(len(task.records), task.seed, start, share, task.batch_size, task.repeats)
            )
            epoch = len(task.records) if task.repeats is None else epoch_length(task.repeats)
            self._counts[task.name] = _ImageCounts(epoch, task.batch_size, batches, task.name)
        self._loader = DataLoader(
            TaskSamples([task.name for task in tasks], samples),
            sampler=TaskPositions(draws, streams, start_iteration, accumulate),
            batch_size=None,
            collate_fn=_as_it_is,
            **loader_options(num_workers, pin_memory),
        )
        self._batches: Iterator | None = None

    @property
    def skipped(self) -> dict[str, int]:
        """The images that did not decode, with the number of times that this process replaced them."""
        found: dict[str, int] = {}
        for counts in self._counts.values():
            for file_name, number in counts.skipped.items():
                found[file_name] = found.get(file_name, 0) + number
        return found

    def __iter__(self) -> "MixedLoader":
        return self

    def __next__(self) -> list[dict]:
        if self._batches is None:
            self._batches = iter(self._loader)
        task, batch = next(self._batches)
        self._counts[task].see(batch)
        return [sample | {"task": task} for sample in batch] if task else batch


class TrainLoader(MixedLoader):
    """Iterator over batches of one stream: lists of mapped dicts that all heads learn from."""

    def __init__(
        self,
        records: list[dict] | Dataset,
        mapper: Callable[[dict], dict],
        *,
        batch_size: int,
        seed: int,
        repeats: np.ndarray | None = None,
        **options,
    ):
        """
        Args:
            records: detectron2 dataset dicts. A list is packed so that workers share its memory.
            mapper: maps a record to a sample; may use `random`, `numpy.random` and torch's CPU generator.
            batch_size: over all processes.
            seed: for order and augmentations.
            repeats: [number of records] how often each record occurs in an epoch; None: once.
            options: those of MixedLoader.
        """
        task = Task("", as_dataset(records), mapper, batch_size, seed, repeats)
        super().__init__([task], TaskDraws((1.0,), seed), **options)


class _ImageCounts:
    """Counts the epochs of a stream, and the images that were replaced because they do not decode.

    Args:
        num_records: images per epoch, on average.
        batch_size: over all processes.
        batches: number of batches delivered before.
        task: its name for messages, if there are several streams.

    Attributes:
        skipped: the images that did not decode, with the number of times that they were replaced.
    """

    def __init__(self, num_records: int, batch_size: int, batches: int, task: str = ""):
        self.skipped: dict[str, int] = {}
        self._num_records, self._batch_size, self._batches = num_records, batch_size, batches
        self._task = f"{task}: " if task else ""
        self._skipped_in_epoch = 0

    def see(self, batch: list) -> None:
        """Count a batch, and remove the entries that `Samples` added for the loader.

        Raises:
            VisftError: an error that `Samples` returned instead of a sample.
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
                "%sEpoch %d: %d times an image that does not decode was replaced by another; the first is %s",
                self._task,
                epochs_now,
                self._skipped_in_epoch,
                next(iter(self.skipped)),
            )
            self._skipped_in_epoch = 0


class TestLoader:
    """Batches of one mapped dict. With `skip_broken`, images that do not decode are left out and counted at the end.

    COCO's evaluation then counts their objects as missed.
    """

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
            TestSamples(as_dataset(records), mapper),
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
                "%d of %d images do not decode and were left out; the first: %s",
                len(skipped),
                len(self),
                skipped[0],
            )


def _as_it_is(batch: tuple[str, list]) -> tuple[str, list]:
    return batch  # torch's default would convert it to tensors
