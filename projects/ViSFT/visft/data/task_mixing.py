"""Mixing of tasks in training.

`joint`: in every iteration, all heads share one pass of the tower, and each learns from the images with its labels.
`ratio`, the authors' mode: an iteration samples one task, whose images feed only that task's head, with the task's own
batch size and image size. Both depend only on (seed, iteration), so a killed run resumes to the bit with any number of
workers and processes.
"""

import logging

from detectron2.config import CfgNode

from visft.data.labelled_images import LabelledImages
from visft.data.loader import MixedLoader, Task, build_train_loader
from visft.data.mapper import ViSFTMapper
from visft.data.samplers import TaskDraws, derived_seed
from visft.data.workers import num_workers, pins_memory

logger = logging.getLogger(__name__)


def build_stage_loader(
    cfg: CfgNode, stage: str, images: LabelledImages, *, start_iteration: int = 0, seed: int
) -> MixedLoader:
    """Build the endless batches of a stage, mixed by `VISFT.TASK_MIXING`, starting at an iteration of the trainer.

    Args:
        cfg: reads VISFT.{TASK_MIXING, TASK_RATIOS, TASKS, INPUT, SOLVER}, MODEL.VISFT.{HEADS, OBJECTIVES}, INPUT and
            DATALOADER.
        stage: `heads` or `lora`; each has its own order of images and tasks.
        start_iteration: the trainer's iteration to start from; each takes ACCUMULATE batches.
        seed: of the run, the same in all processes and after a restart.

    Raises:
        ConfigError: the processes cannot share a batch evenly.
    """
    solver = cfg.VISFT.SOLVER[stage.upper()]
    heads = tuple(cfg.MODEL.VISFT.HEADS or cfg.MODEL.VISFT.OBJECTIVES)
    seed = derived_seed(seed, stage)
    if cfg.VISFT.TASK_MIXING == "joint":
        return build_train_loader(
            cfg,
            records=images.of(*heads),
            repeats=images.repeats_of(*heads),
            reads_masks=images.masks_for(*heads, *cfg.MODEL.VISFT.OBJECTIVES),
            batch_size=solver.IMS_PER_BATCH,
            start_iteration=start_iteration * solver.ACCUMULATE,
            seed=seed,
        )
    tasks = [
        Task(
            head,
            images.of(head),
            ViSFTMapper(
                task_config(cfg, head),
                is_train=True,
                reads_masks=images.masks_for(head, *cfg.MODEL.VISFT.OBJECTIVES),
            ),
            task_value(cfg, head, "IMS_PER_BATCH") or solver.IMS_PER_BATCH,
            derived_seed(seed, head),
            images.repeats_of(head),
        )
        for head in heads
    ]
    ratios = tuple(cfg.VISFT.TASK_RATIOS) or (1.0,) * len(heads)
    for task, ratio in zip(tasks, ratios, strict=True):
        share = 100 * ratio / sum(ratios)
        logger.info(
            "task %s: %.1f %% of the iterations, %d of %d images per batch",
            task.name,
            share,
            task.batch_size,
            len(task.records),
        )
    return MixedLoader(
        tasks,
        TaskDraws(ratios, derived_seed(seed, "tasks")),
        start_iteration=start_iteration,
        accumulate=solver.ACCUMULATE,
        num_workers=num_workers(cfg),
        pin_memory=pins_memory(cfg),
        skip_broken=cfg.DATALOADER.SKIP_BROKEN,
    )


def task_value(cfg: CfgNode, head: str, key: str) -> int | str | tuple[int, ...] | None:
    """Return a key of `VISFT.TASKS.<HEAD>`, or None for a head without this node, which uses the common values."""
    node = cfg.VISFT.TASKS.get(head.upper())
    return None if node is None else node[key]


def task_config(cfg: CfgNode, head: str) -> CfgNode:
    """Return the config with a task's own augmentation and sizes (`VISFT.TASKS.<HEAD>`) instead of the common ones."""
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
