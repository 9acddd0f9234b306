"""Checks of the keys for mixing tasks, before anything is built."""

import math

from detectron2.config import CfgNode

from visft.errors import ConfigError


def check_tasks(cfg: CfgNode, processes: int) -> None:
    """Check VISFT.TASK_MIXING, TASK_RATIOS and TASKS against MODEL.VISFT.HEADS and the number of processes.

    Raises:
        ConfigError: names the first wrong key.
    """
    run, heads = cfg.VISFT, tuple(cfg.MODEL.VISFT.HEADS)
    _ratios(tuple(run.TASK_RATIOS), heads)
    if cfg.MODEL.VISFT.BALANCE_GRADIENTS and run.TASK_MIXING == "ratio":
        raise ConfigError(
            "MODEL.VISFT.BALANCE_GRADIENTS is True, but VISFT.TASK_MIXING is `ratio`, whose iterations have only one "
            "head each; set TASK_MIXING to joint, or weigh the tasks with VISFT.TASK_RATIOS"
        )
    for head in heads:
        node = run.TASKS.get(head.upper())
        if node is not None:
            _task(f"VISFT.TASKS.{head.upper()}", node, run.INPUT.AUGMENTATION, processes)


def _ratios(ratios: tuple, heads: tuple[str, ...]) -> None:
    key = "VISFT.TASK_RATIOS"
    if ratios and len(ratios) != len(heads):
        raise ConfigError(
            f"{key} has {len(ratios)} numbers for the {len(heads)} heads {', '.join(heads)}; expected one per head, in "
            "the order of MODEL.VISFT.HEADS, or ()"
        )
    for head, ratio in zip(heads, ratios, strict=False):
        if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 < ratio < math.inf:
            raise ConfigError(
                f"{key} gives {head} {ratio!r}; expected a number above 0 (to leave out a task, remove it from "
                "MODEL.VISFT.HEADS)"
            )


def _task(key: str, node: CfgNode, common: str, processes: int) -> None:
    if node.IMS_PER_BATCH % processes:
        raise ConfigError(
            f"{key}.IMS_PER_BATCH is {node.IMS_PER_BATCH}, which {processes} processes cannot share evenly; set a "
            f"multiple of {processes}"
        )
    recipe = node.AUGMENTATION or common
    unread = ("SIZE",) if recipe == "detection" else ("MIN_SIZE_TRAIN", "MAX_SIZE_TRAIN")
    for name in unread:
        if node[name]:
            other = "MIN_SIZE_TRAIN and MAX_SIZE_TRAIN" if recipe == "detection" else "SIZE"
            raise ConfigError(
                f"{key}.{name} is {node[name]}, which the augmentation `{recipe}` does not read; set {other} instead"
            )
