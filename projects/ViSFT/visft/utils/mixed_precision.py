"""Types for computing and storing, by `VISFT.SOLVER.<STAGE>.AMP` and `MODEL.CLIP_VIT.FROZEN_DTYPE`."""

import contextlib

import torch
from detectron2.config import CfgNode

from visft.errors import check_one_of

AMP_TYPES = ("", "auto", "bfloat16", "float16")
FROZEN_TYPES = (*AMP_TYPES, "int8")


def amp_type(cfg: CfgNode, stage: str) -> str:
    """The AMP type of a stage on MODEL.DEVICE: "" (off), `bfloat16` or `float16`.

    `auto` is bfloat16 on a GPU that computes in it, else off.

    Raises:
        ConfigError: AMP is none of AMP_TYPES.
    """
    value = cfg.VISFT.SOLVER[stage.upper()].AMP
    check_one_of(f"VISFT.SOLVER.{stage.upper()}.AMP", value, AMP_TYPES)
    if value != "auto":
        return value
    cuda = torch.device(cfg.MODEL.DEVICE).type == "cuda"
    return "bfloat16" if cuda and torch.cuda.is_bf16_supported(including_emulation=False) else ""


def frozen_type(cfg: CfgNode) -> str:
    """The type in which frozen weights are stored: "" (unchanged), `bfloat16`, `float16` or `int8`.

    `auto` is the AMP type if all stages of the run have the same and none trains these weights.

    Raises:
        ConfigError: FROZEN_DTYPE is none of FROZEN_TYPES.
    """
    vit = cfg.MODEL.CLIP_VIT
    check_one_of("MODEL.CLIP_VIT.FROZEN_DTYPE", vit.FROZEN_DTYPE, FROZEN_TYPES)
    if vit.FROZEN_DTYPE != "auto":
        return vit.FROZEN_DTYPE
    if cfg.MODEL.META_ARCHITECTURE != "ViSFT" or "full" in (cfg.MODEL.VISFT.TUNE, vit.TRAIN):
        return ""
    # The model reports an unknown stage.
    types = {amp_type(cfg, stage) for stage in cfg.VISFT.STAGES if stage.upper() in cfg.VISFT.SOLVER}
    return types.pop() if len(types) == 1 else ""


def autocast(device: str | torch.device, amp: str) -> contextlib.AbstractContextManager:
    """Automatic mixed precision in a type; none for ""."""
    if not amp:
        return contextlib.nullcontext()
    return torch.autocast(torch.device(device).type, dtype=getattr(torch, amp))


def evaluating(cfg: CfgNode) -> contextlib.AbstractContextManager:
    """The AMP of evaluation and prediction: always the last stage's, so that figures can be compared."""
    return autocast(cfg.MODEL.DEVICE, amp_type(cfg, cfg.VISFT.STAGES[-1]))


def allow_tf32(cfg: CfgNode) -> None:
    """Let a GPU use TF32 for products that AMP leaves in float32. Exports are checked without TF32."""
    if torch.device(cfg.MODEL.DEVICE).type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
