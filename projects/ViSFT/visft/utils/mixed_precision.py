"""In which types a run computes and stores, by `VISFT.SOLVER.<STAGE>.AMP` and `MODEL.CLIP_VIT.FROZEN_DTYPE`."""

import contextlib

import torch
from detectron2.config import CfgNode

AMP_TYPES = ("", "auto", "bfloat16", "float16")
FROZEN_TYPES = ("", "auto", "bfloat16", "float16")


def amp_type(cfg: CfgNode, stage: str) -> str:
    """What the AMP of a stage means on MODEL.DEVICE: "" (off), `bfloat16` or `float16`.

    `auto` is bfloat16 on a GPU that computes in it, else off.
    """
    value = cfg.VISFT.SOLVER[stage.upper()].AMP
    if value != "auto":
        return value
    cuda = torch.device(cfg.MODEL.DEVICE).type == "cuda"
    return "bfloat16" if cuda and torch.cuda.is_bf16_supported(including_emulation=False) else ""


def frozen_type(cfg: CfgNode) -> str:
    """How weights that do not train are stored: "" (as they are), `bfloat16` or `float16`.

    `auto` is the type of AMP, where all stages of the run agree in it and no stage trains these weights.
    """
    vit = cfg.MODEL.CLIP_VIT
    if vit.FROZEN_DTYPE != "auto":
        return vit.FROZEN_DTYPE
    if cfg.MODEL.META_ARCHITECTURE != "ViSFT" or "full" in (cfg.MODEL.VISFT.TUNE, vit.TRAIN):
        return ""
    # An unknown stage is said by the model, which knows the names.
    types = {amp_type(cfg, stage) for stage in cfg.VISFT.STAGES if stage.upper() in cfg.VISFT.SOLVER}
    return types.pop() if len(types) == 1 else ""


def autocast(device: str | torch.device, amp: str) -> contextlib.AbstractContextManager:
    """Automatic mixed precision in a type; "": none."""
    if not amp:
        return contextlib.nullcontext()
    return torch.autocast(torch.device(device).type, dtype=getattr(torch, amp))


def evaluating(cfg: CfgNode) -> contextlib.AbstractContextManager:
    """What evaluation and prediction compute in: the AMP of the last stage, before it too, for figures to compare."""
    return autocast(cfg.MODEL.DEVICE, amp_type(cfg, cfg.VISFT.STAGES[-1]))


def allow_tf32(cfg: CfgNode) -> None:
    """On a GPU, products that AMP leaves in float32 are computed in TF32. Exports are checked without."""
    if torch.device(cfg.MODEL.DEVICE).type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
