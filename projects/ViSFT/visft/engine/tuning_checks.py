"""Checks of what stage `lora` trains and with which losses, before anything is built."""

from detectron2.config import CfgNode

from visft.data.datasets.captions import check_captions
from visft.errors import ConfigError, DataError
from visft.modeling.tower_losses import objective_class
from visft.utils import mixed_precision


def check_tuning(cfg: CfgNode) -> None:
    """Check MODEL.VISFT.TUNE and FREEZE_HEADS against conflicting keys.

    Raises:
        ConfigError: names the first conflict.
    """
    node, vit = cfg.MODEL.VISFT, cfg.MODEL.CLIP_VIT
    if node.TUNE == "full" and mixed_precision.frozen_type(cfg):
        raise ConfigError(
            f"MODEL.VISFT.TUNE is full and MODEL.CLIP_VIT.FROZEN_DTYPE is {vit.FROZEN_DTYPE}: all weights train, so "
            'none can be stored in low precision; set FROZEN_DTYPE to ""'
        )
    if node.TUNE == "full" and vit.TRAIN == "lora":
        raise ConfigError(
            "MODEL.VISFT.TUNE is full, which has no LoRA, and MODEL.CLIP_VIT.TRAIN is lora; leave TRAIN at none: a "
            "ViSFT run sets it by its stage"
        )
    if not node.FREEZE_HEADS and "lora" in cfg.VISFT.STAGES and not cfg.VISFT.SOLVER.LORA.BASE_LR > 0:
        raise ConfigError(
            f"VISFT.SOLVER.LORA.BASE_LR is {cfg.VISFT.SOLVER.LORA.BASE_LR} and MODEL.VISFT.FREEZE_HEADS is False: the "
            "heads' rate is a multiple of it; set it above 0, or train only the heads in stage heads"
        )


def check_strategy(cfg: CfgNode) -> None:
    """Check VISFT.STRATEGY against keys that a tower in pieces cannot follow: its processes run it equally often.

    Raises:
        ConfigError: names the first conflict.
    """
    run = cfg.VISFT
    if run.STRATEGY != "FSDP2":
        return
    if cfg.MODEL.META_ARCHITECTURE != "ViSFT":
        raise ConfigError(
            f"VISFT.STRATEGY is FSDP2 and MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE}, whose trainer is "
            "detectron2's, with DistributedDataParallel; set STRATEGY to DDP"
        )
    mixed = "lora" in run.STAGES and (cfg.MODEL.VISFT.TUNE == "full" or not cfg.MODEL.VISFT.FREEZE_HEADS)
    for key, wrong, why, expected in (
        ("VISFT.FEATURE_CACHE", run.FEATURE_CACHE > 0, "computes an image in one process alone", "0"),
        (
            "MODEL.CLIP_VIT.MEMORY_BUDGET_GIB",
            cfg.MODEL.CLIP_VIT.MEMORY_BUDGET_GIB > 0,
            "runs a block once more",
            "0",
        ),
        (
            "MODEL.CLIP_VIT.FROZEN_DTYPE",
            cfg.MODEL.CLIP_VIT.FROZEN_DTYPE == "int8",
            "cannot be cut",
            "bfloat16",
        ),
        ("VISFT.COMPILE", bool(run.COMPILE), "was not tried with blocks in pieces", '""'),
        (
            "VISFT.SOLVER.LORA.AMP",
            mixed and run.SOLVER.LORA.AMP == "float16",
            "scales whole gradients and pieces by different calls, and TUNE or FREEZE_HEADS make both train",
            "bfloat16",
        ),
    ):
        if wrong:
            raise ConfigError(
                f"VISFT.STRATEGY is FSDP2, and {key} {why}; set {key} to {expected}, or STRATEGY to DDP"
            )


def check_objectives(cfg: CfgNode) -> None:
    """Check MODEL.VISFT.OBJECTIVES and their keys, and the keys that need heads.

    Raises:
        ConfigError: names the first wrong key.
    """
    node, run = cfg.MODEL.VISFT, cfg.VISFT
    for name in node.OBJECTIVES:
        objective_class(cfg, name).check(cfg, name)
    if len(set(node.OBJECTIVES)) != len(node.OBJECTIVES):
        raise ConfigError(
            f"MODEL.VISFT.OBJECTIVES names a tower loss twice: {', '.join(node.OBJECTIVES)}; expected each once"
        )
    if node.HEADS:
        return
    for key, wrong, expected in (
        ("MODEL.VISFT.HEAD_FILES", node.HEAD_FILES, "()"),
        ("MODEL.VISFT.FREEZE_HEADS", not node.FREEZE_HEADS, "True"),
        ("MODEL.VISFT.BALANCE_GRADIENTS", node.BALANCE_GRADIENTS, "False"),
        ("VISFT.TASK_MIXING", run.TASK_MIXING == "ratio", "joint"),
    ):
        if wrong:
            raise ConfigError(
                f"MODEL.VISFT.HEADS is empty, so {key} has no head to act on; set it to {expected}"
            )


def check_captions_of_objectives(cfg: CfgNode) -> None:
    """Check that DATASETS.TRAIN has captions, if a tower loss learns from them.

    Raises:
        DataError: it has none.
    """
    for name in cfg.MODEL.VISFT.OBJECTIVES:
        if objective_class(cfg, name).reads_captions and not sum(map(check_captions, cfg.DATASETS.TRAIN)):
            raise DataError(
                f"MODEL.VISFT.OBJECTIVES has {name}, which learns from captions, and no image of DATASETS.TRAIN "
                f"({', '.join(cfg.DATASETS.TRAIN)}) has any: set VISFT.DATA.TRAIN_CAPTIONS or TRAIN_SHARDS, or remove "
                f"{name}"
            )
