"""Training of detectron2's stock detectors on a CLIP tower: DefaultTrainer with AdamW and layer-wise decay."""

import argparse
import importlib.util
import logging
import os

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultTrainer, HookBase, default_setup
from detectron2.engine.hooks import EvalHook
from detectron2.evaluation import (
    COCOEvaluator,
    COCOPanopticEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    SemSegEvaluator,
)
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

from visft.checkpoint import files
from visft.data.datasets.catalog import check_coco_json
from visft.data.datasets.layouts import layout_of
from visft.data.loader import TestLoader
from visft.data.stock_data import build_stock_test_loader, build_stock_train_loader
from visft.engine import stopping
from visft.engine.hooks import Progress
from visft.errors import CheckpointError, ConfigError
from visft.evaluation import InstancesEvaluator
from visft.modeling.backbone import lr_factor

logger = logging.getLogger(__name__)

KINDS = ("coco", "lvis", "sem_seg", "coco_panoptic_seg")


class SafeCheckpointer(DetectionCheckpointer):
    """detectron2's checkpointer, restricted to files that contain only tensors and no code."""

    def _load_file(self, filename: str) -> dict:
        if filename.endswith(".pkl"):
            raise CheckpointError(
                f"{filename}: pickle files are not read, because they can run code; convert it to .pth or .safetensors"
            )
        try:
            content = torch.load(filename, map_location="cpu", weights_only=True)
        except Exception:
            content = files.read_tensors(filename)
        return content if "model" in content else {"model": content}


class _Interruptions(HookBase):
    """Saves a checkpoint after the iteration in which a signal stops the run, and before each evaluation."""

    def __init__(self, evaluation_period: int) -> None:
        self._period = evaluation_period

    def after_step(self) -> None:
        done, stop = self.trainer.iter + 1, stopping.requested()
        if stop or (self._period > 0 and done % self._period == 0):
            self.trainer.checkpointer.save(f"model_{self.trainer.iter:07d}", iteration=self.trainer.iter)
        if stop:
            raise stopping.stopped(stop, f"training stops after iteration {done} of {self.trainer.max_iter}")


class StockTrainer(DefaultTrainer):
    """DefaultTrainer with ViTDet's optimizer settings for a CLIP tower and an evaluator for each kind of data set."""

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__(cfg)
        self.checkpointer = SafeCheckpointer(self.model, cfg.OUTPUT_DIR, trainer=self)
        self._hooks.clear()
        self.register_hooks([*self.build_hooks(), Progress()])

    def build_hooks(self) -> list[HookBase | None]:
        """Return detectron2's hooks and one that reacts to signals, placed before evaluation."""
        made = super().build_hooks()
        place = next((i for i, hook in enumerate(made) if isinstance(hook, EvalHook)), len(made))
        return [*made[:place], _Interruptions(self.cfg.TEST.EVAL_PERIOD), *made[place:]]

    def train(self) -> None:
        with stopping.held():
            super().train()

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators: list[DatasetEvaluator] | None = None) -> dict:
        with stopping.released():
            return super().test(cfg, model, evaluators)

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """Build AdamW for the trained parameters, with MODEL.CLIP_VIT.LAYER_DECAY within towers.

        Position embeddings have no weight decay. Weight decay of norms and biases, and gradient clipping, follow
        SOLVER.*.
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
    def build_train_loader(cls, cfg: CfgNode) -> DataLoader:
        return build_stock_train_loader(cfg)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> TestLoader:
        return build_stock_test_loader(cfg, dataset_name)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        folder = os.path.join(cfg.OUTPUT_DIR, "inference")
        kind = _kind(dataset_name)
        parts: list[DatasetEvaluator] = []
        if kind in ("coco", "lvis", "coco_panoptic_seg"):
            results = os.path.join(folder, "coco_instances_results.json")
            parts.append(InstancesEvaluator(dataset_name, results_file=results))
        if kind == "coco" and cfg.MODEL.KEYPOINT_ON:
            parts.append(COCOEvaluator(dataset_name, ("keypoints",), output_dir=folder))
        if kind in ("sem_seg", "coco_panoptic_seg"):
            parts.append(SemSegEvaluator(dataset_name, output_dir=folder, sem_seg_loading_fn=_read_labels))
        if kind == "coco_panoptic_seg" and not _why_no_panoptic_quality(dataset_name):
            parts.append(COCOPanopticEvaluator(dataset_name, folder))
        return DatasetEvaluators(parts)


def _read_labels(file_name: str, dtype: type) -> np.ndarray:
    """Read an image of class indices. detectron2's own reader uses `copy=False`, which numpy 2 refuses."""
    with Image.open(file_name) as image:
        return np.asarray(image, dtype)


def _kind(dataset_name: str) -> str:
    return MetadataCatalog.get(dataset_name).get("evaluator_type", "coco")


def _why_no_panoptic_quality(dataset_name: str) -> str:
    """Return what COCO's panoptic evaluation lacks, or ""."""
    if importlib.util.find_spec("panopticapi") is None:
        return "the package panopticapi is not installed (pip install git+https://github.com/cocodataset/panopticapi)"
    metadata = MetadataCatalog.get(dataset_name)
    for key in ("panoptic_json", "panoptic_root"):
        if not os.path.exists(metadata.get(key) or ""):
            return f"its {key} `{metadata.get(key)}` does not exist"
    return ""


def _check_training_data(cfg: CfgNode) -> None:
    """Check the training data of a stock detector.

    Raises:
        ConfigError: the detector learns masks and a data set has none, the config uses pickled proposals, or cropping
            polygons needs a missing package.
    """
    if cfg.INPUT.CROP.ENABLED and cfg.MODEL.MASK_ON and importlib.util.find_spec("shapely") is None:
        raise ConfigError(
            "INPUT.CROP.ENABLED is True: detectron2 crops polygons with the package `shapely`, which is not installed: "
            "`pip install shapely`, or set the key to False"
        )
    if cfg.MODEL.LOAD_PROPOSALS:
        raise ConfigError(
            "MODEL.LOAD_PROPOSALS is True: proposals come in pickle files, which are not read, because they can run "
            "code; set it to False, with a proposal generator in MODEL.PROPOSAL_GENERATOR.NAME"
        )
    for name in cfg.DATASETS.TRAIN if cfg.MODEL.MASK_ON else ():
        meta = MetadataCatalog.get(name)
        if not os.path.isfile(meta.get("json_file") or ""):
            continue
        if not check_coco_json(meta.json_file, train=True, layout=layout_of(meta)).masked:
            raise ConfigError(
                f"MODEL.MASK_ON is True, and no annotation of {name} ({meta.json_file}) has a mask; set MODEL.MASK_ON "
                "to False to learn only boxes, or train on a data set with masks"
            )


def _check_evaluators(cfg: CfgNode) -> None:
    """Check before training that the test sets can be evaluated.

    Raises:
        ConfigError: this tool does not evaluate data sets of this kind.
    """
    for name in cfg.DATASETS.TEST:
        if _kind(name) not in KINDS:
            raise ConfigError(
                f"DATASETS.TEST: {name} is of the kind `{_kind(name)}`; expected one of {', '.join(KINDS)}; name "
                "another data set, or set evaluator_type in its metadata"
            )
        if _kind(name) == "coco_panoptic_seg" and (reason := _why_no_panoptic_quality(name)):
            logger.warning(
                "%s is evaluated for boxes, masks and semantic segmentation, without panoptic quality: %s",
                name,
                reason,
            )


def _start(cfg: CfgNode, args: argparse.Namespace) -> None:
    default_setup(cfg, args)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="visft")
    _check_evaluators(cfg)


def run(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Train a stock detector from MODEL.WEIGHTS, or with --resume from the last checkpoint in OUTPUT_DIR."""
    _start(cfg, args)
    _check_training_data(cfg)
    trainer = StockTrainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    trainer.train()


def evaluate_only(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Evaluate MODEL.WEIGHTS, or with --resume the last checkpoint in OUTPUT_DIR."""
    _start(cfg, args)
    model = StockTrainer.build_model(cfg)
    SafeCheckpointer(model, cfg.OUTPUT_DIR).resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
    results = StockTrainer.test(cfg, model)
    if comm.is_main_process():
        logger.info("%s", results)
