"""What is checked of what stage `lora` trains, before anything is built."""

from detectron2.config import CfgNode

from visft.engine.settings import unknown
from visft.errors import ConfigError
from visft.meta_arch import TUNES


def check_tuning(cfg: CfgNode) -> None:
    """Check MODEL.VISFT.TUNE and FREEZE_HEADS against the keys that they cannot go with.

    Raises:
        ConfigError: the first that is wrong.
    """
    node, vit = cfg.MODEL.VISFT, cfg.MODEL.CLIP_VIT
    if node.TUNE not in TUNES:
        raise unknown("MODEL.VISFT.TUNE", node.TUNE, TUNES)
    if node.TUNE == "full" and vit.FROZEN_DTYPE:
        raise ConfigError(
            f"MODEL.VISFT.TUNE is full and MODEL.CLIP_VIT.FROZEN_DTYPE is {vit.FROZEN_DTYPE}: all weights train, so "
            'none can be stored in low precision; set FROZEN_DTYPE to ""'
        )
    if node.TUNE == "full" and vit.TRAIN == "lora":
        raise ConfigError(
            "MODEL.VISFT.TUNE is full, which has no LoRA, and MODEL.CLIP_VIT.TRAIN is lora; leave TRAIN at none, a "
            "ViSFT run sets it by its stage"
        )
    if not node.FREEZE_HEADS and "lora" in cfg.VISFT.STAGES and not cfg.VISFT.SOLVER.LORA.BASE_LR > 0:
        raise ConfigError(
            f"VISFT.SOLVER.LORA.BASE_LR is {cfg.VISFT.SOLVER.LORA.BASE_LR} and MODEL.VISFT.FREEZE_HEADS is False: the "
            "heads' rate is a multiple of it; set it above 0, or train the heads alone in stage heads"
        )
