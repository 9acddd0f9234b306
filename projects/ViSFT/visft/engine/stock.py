"""Stock detectors of detectron2 over a CLIP tower: its DefaultTrainer, with AdamW and layer-wise decay."""

import argparse
import logging
import os

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultTrainer, default_setup
from detectron2.evaluation import (
    COCOEvaluator,
    COCOPanopticEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    SemSegEvaluator,
)
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping
from detectron2.utils import comm
from torch import nn

from visft.backbone import lr_factor
from visft.checkpoint import files
from visft.errors import CheckpointError, ConfigError
from visft.evaluation import InstancesEvaluator
from visft.evaluation.average_precision import is_fast

logger = logging.getLogger(__name__)


class SafeCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, for files that hold tensors and nothing that runs."""

    def _load_file(self, filename: str) -> dict:
        if filename.endswith(".pkl"):
            raise CheckpointError(
                f"{filename}: pickle files are not read, for they can run code; convert it to .pth or .safetensors"
            )
        try:
            content = torch.load(filename, map_location="cpu", weights_only=True)
        except Exception:
            content = files.read_tensors(filename)
        return content if "model" in content else {"model": content}


class StockTrainer(DefaultTrainer):
    """DefaultTrainer whose optimizer treats a CLIP tower as ViTDet does, and which evaluates by the data set's kind."""

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__(cfg)
        self.checkpointer = SafeCheckpointer(self.model, cfg.OUTPUT_DIR, trainer=self)
        self._hooks.clear()
        self.register_hooks(self.build_hooks())

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """AdamW over what trains; MODEL.CLIP_VIT.LAYER_DECAY within towers, no weight decay on position embeddings.

        Weight decay of norms and biases, and gradient clipping, follow SOLVER.*.
        """
        parameters = get_default_optimizer_params(
            model,
            base_lr=cfg.SOLVER.BASE_LR,
            weight_decay=cfg.SOLVER.WEIGHT_DECAY,
            weight_decay_norm=cfg.SOLVER.WEIGHT_DECAY_NORM,
            bias_lr_factor=cfg.SOLVER.BIAS_LR_FACTOR,
            weight_decay_bias=cfg.SOLVER.WEIGHT_DECAY_BIAS,
            overrides={name: {"weight_decay": 0.0} for name in ("pos_embed", "positional_embedding")},
            lr_factor_func=lr_factor(model, cfg.MODEL.CLIP_VIT.LAYER_DECAY),
        )
        adamw = maybe_add_gradient_clipping(cfg, torch.optim.AdamW)
        return adamw(parameters, lr=cfg.SOLVER.BASE_LR, eps=1e-8)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        folder = os.path.join(cfg.OUTPUT_DIR, "inference")
        kind = MetadataCatalog.get(dataset_name).get("evaluator_type", "coco")
        if kind == "coco":
            return COCOEvaluator(dataset_name, output_dir=folder)
        if kind == "lvis":
            return InstancesEvaluator(dataset_name, fast=is_fast(cfg.VISFT.COCO_METRIC))
        if kind == "sem_seg":
            return SemSegEvaluator(dataset_name, output_dir=folder)
        if kind == "coco_panoptic_seg":
            return DatasetEvaluators(
                [
                    COCOEvaluator(dataset_name, output_dir=folder),
                    SemSegEvaluator(dataset_name, output_dir=folder),
                    COCOPanopticEvaluator(dataset_name, folder),
                ]
            )
        raise ConfigError(
            f"DATASETS.TEST: {dataset_name} is of the kind `{kind}`; this tool evaluates coco, lvis, "
            "sem_seg and coco_panoptic_seg"
        )


def run(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Train a stock detector, from MODEL.WEIGHTS or with --resume from OUTPUT_DIR's last checkpoint."""
    default_setup(cfg, args)
    trainer = StockTrainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    trainer.train()


def evaluate_only(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Evaluate MODEL.WEIGHTS, or with --resume OUTPUT_DIR's last checkpoint."""
    default_setup(cfg, args)
    model = StockTrainer.build_model(cfg)
    SafeCheckpointer(model, cfg.OUTPUT_DIR).resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
    results = StockTrainer.test(cfg, model)
    if comm.is_main_process():
        logger.info("%s", results)
