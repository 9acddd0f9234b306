"""A whole run: state, model, data, stages, export, report. `--resume` continues or skips each part."""

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
from visft.engine.stage import checkpoint_settings, run_stage, share_weights
from visft.engine.trainer import seed_iteration
from visft.modeling.backbone import sharding
from visft.utils import mixed_precision
from visft.visualization import run_report

logger = logging.getLogger(__name__)


def run(cfg: CfgNode, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Run the stages of `VISFT.STAGES`, export, and write images and the report. Returns all evaluations.

    With `--resume`, an unfinished stage continues from its newest complete checkpoint, and a finished stage is
    skipped. Without it, an earlier run in the same OUTPUT_DIR is first moved to its subfolder `earlier-N`.

    Raises:
        VisftError: of any kind, for example if weights do not fit or a loss is not finite.
    """
    state = start_or_continue(cfg, resume=args.resume)
    _warn_of_untrained_heads(cfg)
    cfg = with_vocabulary(cfg, state.folder)
    model = initial_model(cfg, state.seed)
    state.record = record_of(cfg, model, state.seed).to_metadata()
    _keep_start(cfg, model, state)
    shard(cfg, model)
    images = functools.cache(lambda: _load_images(cfg, model))
    if not state.evaluations:
        images()  # stop before anything is computed if a head has no labels
    if cfg.MODEL.VISFT.HEAD_FILES or cfg.MODEL.WEIGHTS:
        state.evaluate("start", cfg, model)
    for stage in cfg.VISFT.STAGES:
        if _has_weights_to_train(model, stage):
            run_stage(cfg, model, stage, state, images)
    model.eval()
    sharded = sharding.is_sharded(model)
    if sharded:  # drawing takes all processes, exporting and reporting none of their pieces
        evaluate.draw(cfg, model, state.folder / "predictions")
    if _is_last_process():
        exporting.export(cfg, model.backbone, state.folder / "export", seed=state.seed)
        if not sharded:
            evaluate.draw(cfg, model, state.folder / "predictions")
        _report(cfg, state)
    return state.evaluations


def evaluate_only(cfg: CfgNode, args: argparse.Namespace) -> dict[str, float]:
    """Evaluate MODEL.WEIGHTS and return the metrics."""
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
    """Return the model before any stage: the base's tower, heads from HEAD_FILES (or new), then MODEL.WEIGHTS."""
    mixed_precision.allow_tf32(cfg)
    seed_iteration(seed, "build", 0)
    model = build_model(cfg)
    if cfg.MODEL.WEIGHTS:
        load_run(cfg, model, cfg.MODEL.WEIGHTS)
    return model


def shard(cfg: CfgNode, model: nn.Module) -> None:
    """With `VISFT.STRATEGY FSDP2` and several processes, leave each of them its pieces of the tower."""
    if cfg.VISFT.STRATEGY == "FSDP2" and comm.get_world_size() > 1:
        share_weights(model)
        model.set_stage(cfg.VISFT.STAGES[-1])
        sharding.shard(model.backbone)


def load_run(cfg: CfgNode, model: nn.Module, path: str | os.PathLike) -> None:
    """Load the trained weights of a run. If it trained only LoRA, its heads come from HEAD_FILES."""
    optional = ("backbone.", "heads.") if cfg.MODEL.VISFT.HEAD_FILES else ("backbone.",)
    load.load_run_weights(model, path, optional=optional)


def _warn_of_untrained_heads(cfg: CfgNode) -> None:
    """Warn if stage lora would train the tower through untrained heads."""
    node, stages = cfg.MODEL.VISFT, cfg.VISFT.STAGES
    trained = "heads" in stages or node.HEAD_FILES or cfg.MODEL.WEIGHTS
    weighty = [head for head in node.HEADS if node[head.upper()].HEAD != "RegionTextHead"]
    if weighty and node.FREEZE_HEADS and not trained:
        logger.warning(
            "stage lora will go through fresh heads, which nobody has trained: set MODEL.VISFT.HEAD_FILES, or add "
            "stage heads to VISFT.STAGES"
        )


def _keep_start(cfg: CfgNode, model: nn.Module, state: RunState) -> None:
    """Save the initial weights that no stage trains, so that the run's folder is a complete model."""
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
    have = f"{names[0]} has" if len(names) == 1 else f"{' and '.join(names)} have"
    logger.info("stage heads is skipped: %s no weights to train", have)
    return False


def _is_last_process() -> bool:
    """Leave the process group. Returns True in the main process, which continues alone without a time limit."""
    main = comm.is_main_process()
    comm.synchronize()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return main


def _report(cfg: CfgNode, state: RunState) -> None:
    run_report.draw_loss_curves(state.folder, cfg.VISFT.STAGES)
    title = f"ViSFT of {cfg.MODEL.CLIP_VIT.NAME} ({cfg.MODEL.CLIP_VIT.PRETRAINED or 'random weights'})"
    evaluations = {step: metrics for step, metrics in state.evaluations.items() if metrics}
    run_report.write_report(state.folder, evaluations, title=title)
