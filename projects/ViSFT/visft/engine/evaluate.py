"""Evaluation of every head on DATASETS.TEST, and pictures of it."""

import logging
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.evaluation import inference_on_dataset
from detectron2.evaluation.testing import flatten_results_dict
from torch import nn

from visft.data import build_test_loader, build_test_mapper
from visft.engine.drawing import draw_predictions
from visft.evaluation import build_evaluator

logger = logging.getLogger(__name__)


def evaluate(cfg: CfgNode, model: nn.Module) -> dict[str, float]:
    """Flat figures, `detection/bbox/AP50` and so on, in per cent; empty on all but the main process, and without heads.

    With several data sets in DATASETS.TEST each figure's name begins with its data set's.
    """
    figures: dict[str, float] = {}
    for name in cfg.DATASETS.TEST if cfg.MODEL.VISFT.HEADS else ():
        found = inference_on_dataset(model, build_test_loader(cfg, name), build_evaluator(cfg, name))
        prefix = f"{name}/" if len(cfg.DATASETS.TEST) > 1 else ""
        figures |= {
            f"{prefix}{key}": float(value) for key, value in flatten_results_dict(found or {}).items()
        }
    return figures


def draw(cfg: CfgNode, model: nn.Module, folder: Path) -> None:
    """Draw pictures of the first of DATASETS.TEST: ground truth beside each head's prediction; none without heads."""
    if not cfg.MODEL.VISFT.HEADS:
        return
    mapper = build_test_mapper(cfg)
    draw_predictions(model, mapper, cfg.DATASETS.TEST[0], folder, heads=cfg.MODEL.VISFT.HEADS)
