"""Checks of a config before any weight is built: device, names, data sets and weight files, in this order."""

import os

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.modeling import BACKBONE_REGISTRY

from visft import export
from visft.checkpoint import files, load
from visft.checkpoint.run_folder import STAGES
from visft.data import check_data_set, register_own_data
from visft.data.repeat_factor import check_sampler
from visft.engine import key_rules, run_vocabulary
from visft.engine.task_checks import check_tasks
from visft.engine.tuning_checks import (
    check_captions_of_objectives,
    check_objectives,
    check_strategy,
    check_tuning,
)
from visft.errors import CheckpointError, ConfigError, DataError, check_one_of, unknown
from visft.modeling import meta_arch
from visft.modeling.backbone import CLIPViT, lora, open_clip_models
from visft.modeling.backbone.class_embeddings import check_prompts
from visft.modeling.backbone.fpn import tower_options, wants_lora
from visft.modeling.compiled import check_compiler
from visft.modeling.heads.common.federated import class_image_counts
from visft.modeling.heads.region_text_head import LOSSES, REGIONS
from visft.utils import mixed_precision

_WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".pkl")


def check(
    cfg: CfgNode,
    *,
    processes: int = 1,
    local_processes: int = 1,
    train: bool = True,
    test: bool = True,
    here: bool = True,
) -> None:
    """Raise an error for the first fault of a config, before anything is built or written.

    Args:
        cfg: from `settings.load_config`, which has checked the keys. Registers own data (`VISFT.DATA`) and makes it
            DATASETS.TRAIN / TEST.
        processes: number of processes on all machines. local_processes: on this machine.
        train, test: whether the images of DATASETS.TRAIN, DATASETS.TEST will be read.
        here: whether the run is on this machine, whose GPUs and data sets are then checked.

    Raises:
        ConfigError, DataError, CheckpointError: the first fault.
    """
    _device(cfg, local_processes, here)
    _names(cfg)
    check_strategy(cfg)
    if cfg.MODEL.META_ARCHITECTURE == "ViSFT":
        _visft_names(cfg, processes)
    _data_sets(cfg, train and here, test and here)
    if cfg.MODEL.META_ARCHITECTURE == "ViSFT" and here:
        check_compiler(cfg.VISFT.COMPILE if train else "")
        run_vocabulary.check(cfg, train=train)
        if train and "lora" in cfg.VISFT.STAGES:
            check_captions_of_objectives(cfg)
    if cfg.MODEL.META_ARCHITECTURE == "ViSFT":
        _class_losses(cfg)
    _weight_files(cfg)


def _device(cfg: CfgNode, local_processes: int, here: bool = True) -> None:
    try:
        device = torch.device(cfg.MODEL.DEVICE)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"MODEL.DEVICE is `{cfg.MODEL.DEVICE}`; expected `cpu` or `cuda`") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"MODEL.DEVICE is `{cfg.MODEL.DEVICE}`; only `cpu` and `cuda` are supported")
    if device.type == "cpu" or not here:
        return
    if not torch.cuda.is_available():
        raise ConfigError(
            "MODEL.DEVICE is `cuda`, but torch finds no GPU; to run without one, append `MODEL.DEVICE cpu` "
            "to the command"
        )
    if local_processes > torch.cuda.device_count():
        raise ConfigError(
            f"--num-gpus {local_processes}: this machine has {torch.cuda.device_count()} GPUs; use at most this number"
        )


def _names(cfg: CfgNode) -> None:
    import detectron2.modeling as modeling

    import visft  # noqa: F401  registers

    architectures = [name for name, _ in modeling.META_ARCH_REGISTRY]
    check_one_of("MODEL.META_ARCHITECTURE", cfg.MODEL.META_ARCHITECTURE, architectures)
    backbones = [name for name, _ in BACKBONE_REGISTRY]
    check_one_of("MODEL.BACKBONE.NAME", cfg.MODEL.BACKBONE.NAME, backbones)
    if cfg.MODEL.BACKBONE.NAME.startswith("build_clip_vit"):
        _lora(cfg, depth=_tower(cfg))
    elif cfg.MODEL.META_ARCHITECTURE == "ViSFT":
        raise ConfigError(
            f"MODEL.BACKBONE.NAME is `{cfg.MODEL.BACKBONE.NAME}`; ViSFT needs `build_clip_vit_backbone`"
        )


def _is_file(pretrained: str) -> bool:
    return os.path.sep in pretrained or os.path.splitext(pretrained)[1] in _WEIGHT_SUFFIXES


def _tower(cfg: CfgNode) -> int:
    """Returns the number of its blocks."""
    vit = cfg.MODEL.CLIP_VIT
    open_clip_models.check_name(vit.NAME)
    if not _is_file(vit.PRETRAINED):
        open_clip_models.check_pretrained(vit.NAME, vit.PRETRAINED)
    options = tower_options(cfg, pyramid=cfg.MODEL.BACKBONE.NAME == "build_clip_vit_fpn_backbone")
    backbone = CLIPViT(open_clip_models.meta_tower(vit.NAME), **options)
    # LoRA draws its weights at random, so it is checked apart.
    backbone.set_train("none" if vit.TRAIN == "lora" else vit.TRAIN)
    key_rules.check_keys(cfg, key_rules.TOWER)
    return len(backbone.blocks)


def _lora(cfg: CfgNode, depth: int) -> None:
    config = lora.LoraConfig(**lora.options(cfg))
    if not wants_lora(cfg):  # LAST_BLOCKS is not read, and may be for a tower with more blocks
        depth = max(depth, config.last_blocks)
    lora.check(config, depth)


def _visft_names(cfg: CfgNode, processes: int) -> None:
    meta_arch.check_config(cfg)
    key_rules.check_keys(cfg, key_rules.RUN)
    for stage in cfg.VISFT.STAGES:
        _solver(cfg, stage, processes)
    if list(cfg.VISFT.STAGES) != [stage for stage in STAGES if stage in cfg.VISFT.STAGES]:
        raise ConfigError(f"VISFT.STAGES is {tuple(cfg.VISFT.STAGES)}; expected each once, heads before lora")
    check_tuning(cfg)
    check_objectives(cfg)
    check_tasks(cfg, processes)
    _exports(cfg)
    check_sampler(cfg)


def _exports(cfg: CfgNode) -> None:
    for name in cfg.VISFT.EXPORT:
        if export.FORMATS[name].needs_lora and "lora" not in cfg.VISFT.STAGES:
            raise ConfigError(
                f"VISFT.EXPORT has {name}, which only writes LoRA, but VISFT.STAGES has no stage lora; remove {name} "
                "or add the stage"
            )
        if export.FORMATS[name].needs_lora and cfg.MODEL.VISFT.TUNE == "full":
            raise ConfigError(
                f"VISFT.EXPORT has {name}, which only writes LoRA, but MODEL.VISFT.TUNE is full, without LoRA; "
                f"remove {name} or set TUNE to lora"
            )
        if name != "open_clip":
            export.check(name, open_clip_models.meta_tower(cfg.MODEL.CLIP_VIT.NAME))


def _solver(cfg: CfgNode, stage: str, processes: int) -> None:
    key, solver = f"VISFT.SOLVER.{stage.upper()}", cfg.VISFT.SOLVER[stage.upper()]
    if mixed_precision.amp_type(cfg, stage) == "float16" and torch.device(cfg.MODEL.DEVICE).type == "cpu":
        raise ConfigError(f'{key}.AMP is float16, which needs a GPU; on the CPU use bfloat16 or ""')
    if solver.IMS_PER_BATCH % processes:
        raise ConfigError(
            f"{key}.IMS_PER_BATCH is {solver.IMS_PER_BATCH}, which {processes} processes cannot share evenly; set a "
            f"multiple of {processes}"
        )


def _data_sets(cfg: CfgNode, train: bool, test: bool) -> None:
    register_own_data(cfg)
    if not cfg.DATASETS.TRAIN:
        raise ConfigError(
            "DATASETS.TRAIN is empty, but its first data set defines the classes: name one, or set "
            "VISFT.DATA.TRAIN_JSON and VISFT.DATA.TRAIN_IMAGES"
        )
    for key, name in [("TRAIN", n) for n in cfg.DATASETS.TRAIN] + [("TEST", n) for n in cfg.DATASETS.TEST]:
        if name not in DatasetCatalog:
            raise DataError(str(unknown(f"DATASETS.{key}", name, DatasetCatalog.list())))
    for name in (*(cfg.DATASETS.TRAIN if train else ()), *(cfg.DATASETS.TEST if test else ())):
        check_data_set(cfg, name)


def _class_losses(cfg: CfgNode) -> None:
    """Run after the checks of data sets, because the federated loss needs the frequencies of their classes."""
    for head in cfg.MODEL.VISFT.HEADS:
        key, node = f"MODEL.VISFT.{head.upper()}", cfg.MODEL.VISFT[head.upper()]
        if "PROMPTS" in node:
            check_prompts(f"{key}.PROMPTS", node.PROMPTS)
            check_one_of(f"{key}.REGIONS", node.REGIONS, REGIONS)
            check_one_of(f"{key}.LOSS", node.LOSS, LOSSES)
        if node.get("FED_LOSS_CLASSES") and node.HEAD != "RCNNHead":
            class_image_counts(cfg, head)


def _weight_files(cfg: CfgNode) -> None:
    vit = cfg.MODEL.CLIP_VIT
    if cfg.MODEL.BACKBONE.NAME.startswith("build_clip_vit") and _is_file(vit.PRETRAINED):
        open_clip_models.check_pretrained(vit.NAME, vit.PRETRAINED)
        try:
            files.read_shapes(open_clip_models.local_file(vit.PRETRAINED))
        except CheckpointError as error:
            raise CheckpointError(f"MODEL.CLIP_VIT.PRETRAINED: {error}") from error
    if cfg.MODEL.META_ARCHITECTURE == "ViSFT":
        architecture, _ = open_clip_models.trained_name(vit.NAME, vit.PRETRAINED)
        if cfg.MODEL.WEIGHTS:
            load.check_file(cfg.MODEL.WEIGHTS, key="MODEL.WEIGHTS", architecture=architecture)
        for file in cfg.MODEL.VISFT.HEAD_FILES:
            load.check_file(file, key="MODEL.VISFT.HEAD_FILES", architecture=architecture, heads_only=True)
    elif cfg.MODEL.WEIGHTS and "://" not in cfg.MODEL.WEIGHTS:
        try:
            files.read_shapes(cfg.MODEL.WEIGHTS)
        except CheckpointError as error:
            raise CheckpointError(f"MODEL.WEIGHTS: {error}") from error
