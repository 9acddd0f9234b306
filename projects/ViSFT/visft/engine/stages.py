"""A whole run, from top to bottom: state, model, data, stages, export, report.

Each part is continued or skipped by `--resume`.
"""

import argparse
import functools
import logging
import os
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils import comm
from torch import nn

from visft.checkpoint import files, load
from visft.checkpoint.run import keep_start, trained_tensors
from visft.checkpoint.run_folder import START, run_files
from visft.data import LabelledImages, load_labelled
from visft.engine import evaluate, exporting
from visft.engine.from_run import record_of, seed_of
from visft.engine.run_state import RunState, start_or_continue, write_logs
from visft.engine.run_vocabulary import with_vocabulary
from visft.engine.stage import checkpoint_settings, run_stage
from visft.engine.trainer import seed_iteration
from visft.utils import mixed_precision
from visft.visualization import run_report

logger = logging.getLogger(__name__)


def run(cfg: CfgNode, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Run the stages of `VISFT.STAGES`, export, and write images and the report; returns all evaluations.

    With `--resume`, a stage continues from its newest whole checkpoint, a finished one is not repeated. Without, an
    earlier run in the same OUTPUT_DIR is moved to its subfolder `earlier-N` first.

    Raises:
        VisftError: of any kind, from weights that do not fit to a loss that is not finite.
    """
    state = start_or_continue(cfg, resume=args.resume)
    _warn_of_untrained_heads(cfg)
    cfg = with_vocabulary(cfg, state.folder)
    model = initial_model(cfg, state.seed)
    state.record = record_of(cfg, model, state.seed).to_metadata()
    _keep_start(cfg, model, state)
    images = functools.cache(lambda: _load_images(cfg, model))
    if not state.evaluations:
        images()  # data without labels for a head stops the run before anything is computed
    if cfg.MODEL.VISFT.HEAD_FILES or cfg.MODEL.WEIGHTS:
        state.evaluate("start", cfg, model)
    for stage in cfg.VISFT.STAGES:
        if _has_weights_to_train(model, stage):
            run_stage(cfg, model, stage, state, images)
    if _is_last_process():
        model.eval()
        exporting.export(cfg, model.backbone, state.folder / "export")
        _report(cfg, model, state)
    return state.evaluations


def evaluate_only(cfg: CfgNode, args: argparse.Namespace) -> dict[str, float]:
    """Evaluate MODEL.WEIGHTS; returns the metrics."""
    folder = Path(cfg.OUTPUT_DIR)
    write_logs(folder)
    cfg = with_vocabulary(cfg)
    model = initial_model(cfg, seed_of(cfg.MODEL.WEIGHTS, cfg.SEED))
    model.eval()
    metrics = evaluate.evaluate_with_zero_shot(cfg, model)
    if comm.is_main_process():
        files.write_json(folder / "evaluation.json", run_report.finite(metrics))
        evaluate.log_metrics("evaluation", metrics)
    return metrics


def initial_model(cfg: CfgNode, seed: int) -> nn.Module:
    """The model before any stage: tower from its base, heads from HEAD_FILES (or fresh), then MODEL.WEIGHTS."""
    mixed_precision.allow_tf32(cfg)
    seed_iteration(seed, "build", 0)
    model = build_model(cfg)
    if cfg.MODEL.WEIGHTS:
        load_run(cfg, model, cfg.MODEL.WEIGHTS)
    return model


def load_run(cfg: CfgNode, model: nn.Module, path: str | os.PathLike) -> None:
    """Load what a run trained; where it trained LoRA alone, its heads are those of HEAD_FILES."""
    optional = ("backbone.", "heads.") if cfg.MODEL.VISFT.HEAD_FILES else ("backbone.",)
    load.load_run_weights(model, path, optional=optional)


def _warn_of_untrained_heads(cfg: CfgNode) -> None:
    """Before the tower is trained through them."""
    node, stages = cfg.MODEL.VISFT, cfg.VISFT.STAGES
    trained = "heads" in stages or node.HEAD_FILES or cfg.MODEL.WEIGHTS
    weighty = [head for head in node.HEADS if node[head.upper()].HEAD != "RegionTextHead"]
    if weighty and node.FREEZE_HEADS and not trained:
        logger.warning(
            "stage lora will go through fresh heads, which nobody has trained: set MODEL.VISFT.HEAD_FILES, or add "
            "stage heads to VISFT.STAGES"
        )


def _keep_start(cfg: CfgNode, model: nn.Module, state: RunState) -> None:
    """Keep what the run starts from and none of its stages trains: its folder alone is a model."""
    trained: set[str] = set()
    for stage in reversed(cfg.VISFT.STAGES):
        model.set_stage(stage)
        trained |= trained_tensors(model).keys()
    read = run_files(cfg.MODEL.WEIGHTS) if cfg.MODEL.WEIGHTS else []
    loaded = {name for file in read for name in files.read_shapes(file)}
    kept = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if (name.startswith("heads.") or name in loaded) and name not in trained
    }
    if comm.is_main_process():
        settings = checkpoint_settings(cfg, START)
        keep_start(state.folder, kept, base=model.backbone.base, settings=settings, record=state.record)
    comm.synchronize()


def _load_images(cfg: CfgNode, model: nn.Module) -> LabelledImages:
    parts = [*model.heads.items(), *model.objectives.items()]
    has_labels = {name: part.has_labels for name, part in parts}
    return load_labelled(cfg, has_labels, [name for name, part in parts if part.reads_masks])


def _has_weights_to_train(model: nn.Module, stage: str) -> bool:
    if stage != "heads" or any(head.trainable for head in model.heads.values()):
        return True
    names = list(model.heads)
    are = f"{names[0]} is" if len(names) == 1 else f"{' and '.join(names)} are"
    logger.info("stage heads is skipped: %s without weights, there is nothing to train", are)
    return False


def _is_last_process() -> bool:
    """End what the processes do together; True in the main one, which goes on alone for as long as it takes."""
    main = comm.is_main_process()
    comm.synchronize()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return main


def _report(cfg: CfgNode, model: nn.Module, state: RunState) -> None:
    if cfg.DATASETS.TEST:
        evaluate.draw(cfg, model, state.folder / "predictions")
    run_report.draw_loss_curves(state.folder, cfg.VISFT.STAGES)
    title = f"ViSFT of {cfg.MODEL.CLIP_VIT.NAME} ({cfg.MODEL.CLIP_VIT.PRETRAINED or 'random weights'})"
    evaluations = {step: metrics for step, metrics in state.evaluations.items() if metrics}
    run_report.write_report(state.folder, evaluations, title=title)
