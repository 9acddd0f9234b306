"""How the tasks share the training: which images each head can learn from, and which task an iteration trains.

`joint`: every iteration shows images to all heads at once; each learns from those that carry its labels. One pass of
the tower serves all. `ratio`, the authors': an iteration draws one task, and its images feed that task's head alone,
in the task's own number and size. Both are functions of (seed, iteration), as all of `visft.data.loader`: a killed run
goes on to the bit, with any number of workers and processes.
"""

import functools
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset, Subset

from visft.data.datasets.coco import as_dataset, outlines_of
from visft.data.headers import ImageRules
from visft.data.loader import (
    ImageCounts,
    Positions,
    Samples,
    TrainLoader,
    build_train_loader,
    derived_seed,
    load_records,
    share_of,
)
from visft.data.mapper import ViSFTMapper
from visft.data.repeat_factor import build_repeats, epoch_length
from visft.data.workers import loader_options, num_workers, pins_memory
from visft.errors import DataError

logger = logging.getLogger(__name__)

_BLOCK = 4096
"""Draws made at once: a resumed run counts a hundred thousand earlier ones in a millisecond."""


@dataclass(frozen=True)
class LabelledImages:
    """Training records, and which of them carry labels for which head.

    Attributes:
        records: detectron2 dataset dicts.
        rows: by head, the ascending indices of the records that it can learn from.
        repeats: of each record, how often it comes in an epoch (see `visft.data.repeat_factor`); None: once.
        mask_readers: the heads and objectives that read masks; None: all.
    """

    records: Dataset
    rows: dict[str, np.ndarray]
    repeats: np.ndarray | None = None
    mask_readers: frozenset[str] | None = None

    def of(self, *heads: str) -> Dataset:
        """The images that carry labels for at least one of the heads, in their order."""
        rows = self._rows_of(heads)
        return self.records if len(rows) == len(self.records) else Subset(self.records, rows)

    def repeats_of(self, *heads: str) -> np.ndarray | None:
        """`repeats` of the images that `of` gives."""
        return None if self.repeats is None else self.repeats[self._rows_of(heads)]

    def masks_for(self, *names: str) -> bool:
        """Whether one of these heads and objectives reads masks."""
        return self.mask_readers is None or not self.mask_readers.isdisjoint(names)

    def _rows_of(self, heads: Sequence[str]) -> np.ndarray:
        return functools.reduce(np.union1d, (self.rows[head] for head in heads))


def load_labelled(
    cfg: CfgNode,
    has_labels: Mapping[str, Callable[[dict], bool]],
    mask_readers: Iterable[str] | None = None,
) -> LabelledImages:
    """Load `DATASETS.TRAIN` (data sets with different labels may stand beside each other) and sort it by labels.

    Args:
        cfg: reads DATASETS.TRAIN, DATALOADER.{FILTER_EMPTY_ANNOTATIONS, SAMPLER_TRAIN, REPEAT_THRESHOLD,
            REPEAT_SQRT} and VISFT.TASK_MIXING.
        has_labels: the `has_labels` of each head, and of each objective of the tower, by its name.
        mask_readers: those of them that read masks; None: all.

    Raises:
        DataError: a data set is broken, or there is no image for any head (mixing by ratio: for one of them), or none
            for an objective among those that the heads are given.
    """
    names = tuple(cfg.DATASETS.TRAIN)
    records = load_records(
        names,
        train=True,
        filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
        rules=ImageRules.of(cfg),
    )
    outlines = [_outline(record) for record in outlines_of(records)]
    rows = {
        head: np.flatnonzero([labelled(outline) for outline in outlines])
        for head, labelled in has_labels.items()
    }
    objectives = [name for name in rows if name in cfg.MODEL.VISFT.OBJECTIVES]
    heads = [name for name in rows if name not in objectives]
    missing = [head for head in heads if not len(rows[head])]
    if missing and (len(missing) == len(heads) or cfg.VISFT.TASK_MIXING == "ratio"):
        raise DataError(
            f"DATASETS.TRAIN ({', '.join(names)}): none of its {len(records)} images has labels for the head "
            f"`{missing[0]}`; add a data set that has, or leave the head out of MODEL.VISFT.HEADS"
        )
    for head in missing:
        logger.warning("no image of %s has labels for the head %s: it learns nothing", names, head)
    drawn = functools.reduce(np.union1d, [rows[name] for name in heads or objectives])
    for name in objectives:
        if not len(np.intersect1d(rows[name], drawn)):
            raise DataError(
                f"DATASETS.TRAIN ({', '.join(names)}): the objective `{name}` can learn from none of its {len(drawn)} "
                "images that are shown; add a data set that it can, or leave it out of MODEL.VISFT.OBJECTIVES"
            )
    useful = len(drawn)
    if useful < len(records):
        logger.info(
            "%d of %d images have no labels that are learned, and are left out",
            len(records) - useful,
            len(records),
        )
    return LabelledImages(
        as_dataset(records),
        rows,
        build_repeats(cfg, records),
        None if mask_readers is None else frozenset(mask_readers),
    )


def build_stage_loader(
    cfg: CfgNode, stage: str, pictures: LabelledImages, *, start_iteration: int = 0, seed: int
) -> "TrainLoader | MixedLoader":
    """The endless batches of a stage, mixed as `VISFT.TASK_MIXING` says, from an iteration of the trainer on.

    Args:
        cfg: reads VISFT.{TASK_MIXING, TASK_RATIOS, TASKS, INPUT, SOLVER}, MODEL.VISFT.{HEADS, OBJECTIVES}, INPUT and
            DATALOADER.
        stage: `heads` or `lora`; each has its own order of images and tasks.
        start_iteration: the trainer's iteration to go on from; each takes ACCUMULATE batches.
        seed: of the run; the same in all processes, and after a restart.

    Raises:
        ConfigError: the processes cannot share a batch evenly.
    """
    solver = cfg.VISFT.SOLVER[stage.upper()]
    heads = tuple(cfg.MODEL.VISFT.HEADS or cfg.MODEL.VISFT.OBJECTIVES)
    seed = derived_seed(seed, stage)
    if cfg.VISFT.TASK_MIXING == "joint":
        return build_train_loader(
            cfg,
            records=pictures.of(*heads),
            repeats=pictures.repeats_of(*heads),
            reads_masks=pictures.masks_for(*heads, *cfg.MODEL.VISFT.OBJECTIVES),
            batch_size=solver.IMS_PER_BATCH,
            start_iteration=start_iteration * solver.ACCUMULATE,
            seed=seed,
        )
    tasks = [
        Task(
            head,
            pictures.of(head),
            ViSFTMapper(
                task_config(cfg, head),
                is_train=True,
                reads_masks=pictures.masks_for(head, *cfg.MODEL.VISFT.OBJECTIVES),
            ),
            task_value(cfg, head, "IMS_PER_BATCH") or solver.IMS_PER_BATCH,
            pictures.repeats_of(head),
        )
        for head in heads
    ]
    ratios = tuple(cfg.VISFT.TASK_RATIOS) or (1.0,) * len(heads)
    for task, ratio in zip(tasks, ratios, strict=True):
        share = 100 * ratio / sum(ratios)
        logger.info(
            "task %s: %.1f %% of the iterations, %d of %d images a batch",
            task.name,
            share,
            task.batch_size,
            len(task.records),
        )
    return MixedLoader(
        tasks,
        ratios,
        seed=seed,
        start_iteration=start_iteration,
        accumulate=solver.ACCUMULATE,
        num_workers=num_workers(cfg),
        pin_memory=pins_memory(cfg),
        skip_broken=cfg.DATALOADER.SKIP_BROKEN,
    )


def task_value(cfg: CfgNode, head: str, key: str) -> int | str | tuple[int, ...] | None:
    """A key of `VISFT.TASKS.<HEAD>`; None for a head without such a node, which has the common values."""
    node = cfg.VISFT.TASKS.get(head.upper())
    return None if node is None else node[key]


def task_config(cfg: CfgNode, head: str) -> CfgNode:
    """The config with a task's own recipe and sizes (`VISFT.TASKS.<HEAD>`) in the place of the common ones."""
    own = cfg.clone()
    own.defrost()
    for key, node in (
        ("AUGMENTATION", own.VISFT.INPUT),
        ("SIZE", own.VISFT.INPUT),
        ("MIN_SIZE_TRAIN", own.INPUT),
        ("MAX_SIZE_TRAIN", own.INPUT),
    ):
        value = task_value(cfg, head, key)
        if value:
            node[key] = value
    own.freeze()
    return own


class TaskDraws:
    """Which task each iteration trains: independent draws with given ratios, a function of (seed, iteration).

    Args:
        ratios: above 0, in any unit.
        seed: the same in all processes.
    """

    def __init__(self, ratios: Sequence[float], seed: int):
        bounds = np.cumsum(np.asarray(ratios, dtype=np.float64))
        self._bounds = bounds / bounds[-1]  # the last is exactly 1, and draws are below
        self._seed = seed
        self._latest: tuple[int, np.ndarray] = (-1, np.zeros(0))

    def __call__(self, iteration: int) -> int:
        """Index of the task that an iteration (from 0) trains."""
        block, offset = divmod(iteration, _BLOCK)
        if self._latest[0] != block:
            self._latest = (block, self._block(block))
        return int(self._latest[1][offset])

    def counts(self, iterations: int) -> list[int]:
        """How often each task is drawn in the first `iterations` iterations."""
        counts = np.zeros(len(self._bounds), dtype=np.int64)
        for block in range(-(-iterations // _BLOCK)):
            drawn = self._block(block)[: iterations - block * _BLOCK]
            counts += np.bincount(drawn, minlength=len(counts))
        return counts.tolist()

    def _block(self, block: int) -> np.ndarray:
        uniform = np.random.Generator(np.random.PCG64([self._seed, block])).random(_BLOCK)
        return np.searchsorted(self._bounds, uniform, side="right")


@dataclass(frozen=True)
class Task:
    """What one head learns from when its task is drawn."""

    name: str
    """Of the head."""
    records: Dataset
    """Dataset dicts that carry its labels."""
    mapper: Callable[[dict], dict]
    batch_size: int
    """Over all processes."""
    repeats: np.ndarray | None = None
    """Of each record, how often it comes in an epoch; None: once."""


class MixedLoader:
    """Iterator over batches, each of one task: lists of mapped dicts whose `task` is the head's name.

    All `accumulate` batches of an iteration are of the task that it draws. A task's batches are those of a stream of
    its own (as `TrainLoader`'s), whose position is the number of batches that earlier draws of the task have taken.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        ratios: Sequence[float],
        *,
        seed: int,
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
            ratios: how often each is drawn, relative to the others.
            start_iteration: the first to deliver; the batches are those of a run that started at 0.
            accumulate: batches an iteration.
            num_workers, pin_memory: see `loader_options`.
            skip_broken: put the next image that decodes in the place of one that does not, instead of stopping.
            rank, world_size: default: those of the process group.

        Raises:
            ConfigError: the processes cannot share a task's batch evenly.
        """
        rank = comm.get_rank() if rank is None else rank
        world_size = comm.get_world_size() if world_size is None else world_size
        draws = TaskDraws(ratios, derived_seed(seed, "tasks"))
        earlier = [accumulate * count for count in draws.counts(start_iteration)]
        samples, streams, self._counts = [], [], {}
        for task, batches in zip(tasks, earlier, strict=True):
            share = share_of(task.batch_size, world_size, f"VISFT.TASKS.{task.name.upper()}.IMS_PER_BATCH")
            own = derived_seed(seed, task.name)
            samples.append(Samples(task.records, task.mapper, seed=own, skip_broken=skip_broken))
            start = batches * task.batch_size + rank * share
            streams.append(Positions(len(task.records), own, start, share, task.batch_size, task.repeats))
            epoch = len(task.records) if task.repeats is None else epoch_length(task.repeats)
            self._counts[task.name] = ImageCounts(epoch, task.batch_size, batches, task.name)
        self._loader = DataLoader(
            _TaskSamples([task.name for task in tasks], samples),
            sampler=_TaskPositions(draws, streams, start_iteration, accumulate),
            batch_size=None,
            collate_fn=_as_it_is,
            **loader_options(num_workers, pin_memory),
        )
        self._batches: Iterator | None = None

    @property
    def skipped(self) -> dict[str, int]:
        """The images that did not decode, with how often they were replaced so far in this process."""
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
        return [sample | {"task": task} for sample in batch]


class _TaskPositions:
    """Sampler of whole batches: (index of the task, positions and indices of its images)."""

    def __init__(self, draws: TaskDraws, streams: list[Positions], start: int, accumulate: int):
        self.draws, self.streams, self.start, self.accumulate = draws, streams, start, accumulate

    def __iter__(self) -> Iterator[tuple[int, list[tuple[int, int]]]]:
        streams = [iter(stream) for stream in self.streams]
        for iteration in itertools.count(self.start):
            task = self.draws(iteration)
            for _ in range(self.accumulate):
                yield task, next(streams[task])


class _TaskSamples(Dataset):
    def __init__(self, names: list[str], samples: list[Samples]):
        self.names, self.samples = names, samples

    def __getitem__(self, place: tuple[int, list[tuple[int, int]]]) -> tuple[str, list]:
        task, positions = place
        return self.names[task], [self.samples[task][position] for position in positions]


def _as_it_is(batch: tuple[str, list]) -> tuple[str, list]:
    return batch  # torch's default would make tensors of it


def _outline(record: dict) -> dict:
    """What the mapper will make of a record, as far as a head asks whether there are labels. Reads no image."""
    image = {key: record[key] for key in ("file_name", "image_id", "captions") if record.get(key)}
    if "annotations" in record:
        count = sum(not annotation.get("iscrowd", 0) for annotation in record["annotations"])
        image["instances"] = _empty_instances(count, record["has_masks"])
    return image


@functools.lru_cache(maxsize=1024)  # of a hundred thousand images most have one of a few counts
def _empty_instances(count: int, has_masks: bool) -> Instances:
    instances = Instances((1, 1))
    instances.gt_boxes = Boxes(torch.zeros(count, 4))
    instances.gt_classes = torch.zeros(count, dtype=torch.int64)
    if has_masks:
        instances.gt_masks = BitMasks(torch.zeros(count, 1, 1, dtype=torch.bool))
    return instances
