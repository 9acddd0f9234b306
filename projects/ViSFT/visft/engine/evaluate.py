"""Evaluation of every head on DATASETS.TEST, and drawings of predictions."""

import logging
from collections.abc import Mapping
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import Metadata
from detectron2.evaluation import inference_on_dataset
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm
from torch import nn

from visft.classes.open_names import names_of
from visft.data import build_test_loader, build_test_mapper
from visft.errors import ConfigError
from visft.evaluation import build_evaluator, demo_zero_shot
from visft.modeling.backbone.sharding import gathered
from visft.modeling.open_vocabulary import KEY, configured_names
from visft.utils import mixed_precision, progress
from visft.visualization.predictions import draw_predictions

logger = logging.getLogger(__name__)


def evaluate(cfg: CfgNode, model: nn.Module) -> dict[str, float]:
    """Return flat metrics in per cent, such as `detection/bbox/AP50`.

    With several data sets in DATASETS.TEST, each name begins with the data set's. With an open vocabulary, heads are
    scored on the names of each data set. The result is empty without heads and in all but the main process.

    Raises:
        ConfigError: the names of the open vocabulary are not those of a data set.
    """
    figures: dict[str, float] = {}
    for name in cfg.DATASETS.TEST if cfg.MODEL.VISFT.HEADS else ():
        _set_names(cfg, model, name)
        loader, evaluator = build_test_loader(cfg, name), build_evaluator(cfg, name, model.class_names)
        whole = gathered(model)  # processes have different numbers of images
        with (
            whole,
            progress.bar(f"evaluation on {name}", len(loader)) as bar,
            mixed_precision.evaluating(cfg),
        ):
            found = inference_on_dataset(model, loader, evaluator, callbacks={"after_inference": bar.update})
        prefix = f"{name}/" if len(cfg.DATASETS.TEST) > 1 else ""
        figures |= {
            f"{prefix}{key}": float(value) for key, value in flatten_results_dict(found or {}).items()
        }
    comm.synchronize()  # others wait for the main process, which computes the metrics
    return figures


def evaluate_with_zero_shot(cfg: CfgNode, model: nn.Module) -> dict[str, float]:
    """Like `evaluate`, with zero-shot metrics of emoji if the data is the demo world."""
    metrics = evaluate(cfg, model)
    if demo_zero_shot.applies(cfg):
        with gathered(model), mixed_precision.evaluating(cfg):
            if comm.is_main_process():
                metrics |= demo_zero_shot.demo_zero_shot(model.backbone)
    comm.synchronize()
    return metrics


def log_metrics(step: str, metrics: Mapping[str, float]) -> None:
    """Log the main metrics of a step in one line."""
    shown = {
        name: value for name, value in metrics.items() if name.endswith(("/AP", "/AP50", "/top1", "/CIDEr"))
    }
    logger.info("%s: %s", step, ", ".join(f"{name} {value:.2f}" for name, value in shown.items()))


def draw(cfg: CfgNode, model: nn.Module, folder: Path) -> None:
    """Draw ground truth beside each head's predictions for images of DATASETS.TEST[0], in the main process.

    Without heads or DATASETS.TEST, draw nothing. All processes call this if the tower is in pieces.
    """
    if not cfg.MODEL.VISFT.HEADS or not cfg.DATASETS.TEST:
        return
    _set_names(cfg, model, cfg.DATASETS.TEST[0])
    mapper = build_test_mapper(cfg)
    heads, classes = cfg.MODEL.VISFT.HEADS, named_classes(model)
    with gathered(model), mixed_precision.evaluating(cfg):
        if comm.is_main_process():
            draw_predictions(model, mapper, cfg.DATASETS.TEST[0], folder, heads=heads, classes=classes)


def named_classes(model: nn.Module) -> Metadata:
    """The class names of a model's predictions, for detectron2's Visualizer."""
    return Metadata(name="predicted", thing_classes=list(model.class_names))


def _set_names(cfg: CfgNode, model: nn.Module, data_set: str) -> None:
    """Set the classes of a data set as the names of a model with an open vocabulary."""
    if getattr(model, "open_vocabulary", None) is None:
        return
    names, classes = configured_names(cfg, data_set), names_of(data_set)
    if names.shown != classes.shown:
        raise ConfigError(
            f"{KEY}.NAMES has {len(names.shown)} names, which are not the {len(classes.shown)} classes of {data_set}: "
            "set it to ('test',) to evaluate these classes, or to () for the classes that the heads learned"
        )
    model.open_vocabulary.set_names(names)
