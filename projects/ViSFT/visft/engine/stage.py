"""One stage of a run: its optimizer, loader, checkpoints and hooks, and the evaluation at its end."""

import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.engine import hooks
from detectron2.utils import comm
from detectron2.utils.events import CommonMetricPrinter, JSONWriter, TensorboardXWriter
from torch import nn

from visft.checkpoint.run import RunCheckpointer
from visft.checkpoint.shards import is_piece
from visft.data import LabelledImages, build_stage_loader
from visft.engine import evaluate, stopping
from visft.engine.feature_cache import cached_features
from visft.engine.hooks import Checkpoints, LearningRate, Writers
from visft.engine.optimizer import build_optimizer, learning_rate
from visft.engine.run_state import RunState
from visft.engine.run_vocabulary import words_of
from visft.engine.trainer import StageTrainer
from visft.modeling.backbone.frozen_weights import is_int8
from visft.modeling.compiled import compiled
from visft.utils import mixed_precision
from visft.visualization import run_report

logger = logging.getLogger(__name__)


def run_stage(
    cfg: CfgNode, model: nn.Module, stage: str, state: RunState, images: Callable[[], LabelledImages]
) -> None:
    """Run one stage from its newest checkpoint, if there is one, and evaluate it.

    Args:
        stage: `heads` or `lora`.
        images: loads the training images. Not called if the stage is already finished.
    """
    solver = cfg.VISFT.SOLVER[stage.upper()]
    folder = state.folder / stage
    folder.mkdir(parents=True, exist_ok=True)
    model.set_stage(stage)
    optimizer = build_optimizer(
        model, solver, layer_decay=cfg.MODEL.CLIP_VIT.LAYER_DECAY, heads=cfg.VISFT.SOLVER.HEADS
    )
    trainer = StageTrainer(
        model,
        iter(()),
        optimizer,
        stage=stage,
        accumulate=solver.ACCUMULATE,
        clip_norm=solver.CLIP_NORM,
        amp=mixed_precision.amp_type(cfg, stage),
        seed=state.seed,
    )
    checkpointer = RunCheckpointer(
        folder,
        model,
        optimizer,
        grad_scaler=trainer.scaler if trainer.scaler.is_enabled() else None,
        stage=stage,
        base=model.backbone.base,
        settings=checkpoint_settings(cfg, stage),
        record=state.record,
        keep=solver.KEEP_CHECKPOINTS,
    )
    start = checkpointer.resume()
    share_weights(model)
    if start < solver.MAX_ITER:
        logger.info("stage %s: iterations %d to %d", stage, start, solver.MAX_ITER)
        loader = build_stage_loader(cfg, stage, images(), start_iteration=start, seed=state.seed)
        trainer.batches = iter(loader)
    else:
        logger.info("stage %s: already finished", stage)

    gibibytes = cfg.VISFT.FEATURE_CACHE if stage == "heads" else 0
    with cached_features(model.backbone, gibibytes) as cache:
        if start < solver.MAX_ITER:
            trainer.register_hooks(_hooks(cfg, model, solver, folder, checkpointer, cache))
            with compiled(model, cfg.VISFT.COMPILE):
                trainer.train(start, solver.MAX_ITER)
    # With new heads, the report compares with the first evaluation.
    wanted = cfg.VISFT.EVAL_BETWEEN_STAGES or stage == cfg.VISFT.STAGES[-1] or not state.evaluations
    metrics = state.evaluate(stage, cfg, model) if wanted else {}
    if start < solver.MAX_ITER and comm.is_main_process() and metrics:
        row = {"iteration": solver.MAX_ITER, **run_report.finite(metrics)}
        with open(folder / "metrics.json", "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def _hooks(cfg: CfgNode, model: nn.Module, solver: CfgNode, folder: Path, checkpointer, cache) -> list:
    def rate(iteration: int) -> float:
        return learning_rate(
            iteration, base=solver.BASE_LR, warmup=solver.WARMUP_ITERS, total=solver.MAX_ITER
        )

    def periodic_evaluation() -> dict[str, float]:
        with stopping.released(), cache.bypassed(), compiled(model, ""):
            return run_report.finite_only(evaluate.evaluate(cfg, model))

    made = [
        hooks.IterationTimer(),
        LearningRate(rate),
        Checkpoints(checkpointer.save, solver.CHECKPOINT_PERIOD, solver.EVAL_PERIOD),
        # The run itself does the last evaluation and stores it, so that a resumed run does not repeat it.
        hooks.EvalHook(solver.EVAL_PERIOD, periodic_evaluation, eval_after_train=False),
    ]
    return made + [Writers(_writers(folder, solver.MAX_ITER))] if comm.is_main_process() else made


def _writers(folder: Path, max_iter: int) -> list:
    return [
        CommonMetricPrinter(max_iter),
        JSONWriter(str(folder / "metrics.json")),
        TensorboardXWriter(str(folder)),
    ]


def checkpoint_settings(cfg: CfgNode, stage: str) -> dict:
    """Return the settings that a reader of a checkpoint needs without the config."""
    lora, node = cfg.MODEL.LORA, cfg.MODEL.VISFT
    settings = {"seed": cfg.SEED, "config": hashlib.sha256(cfg.dump().encode()).hexdigest()}
    if (stage != "lora" or not node.FREEZE_HEADS) and (words := words_of(cfg)):
        settings["vocabulary"] = words
    if stage == "lora" and node.TUNE == "full":
        settings["tune"] = "full"
    elif stage == "lora":
        settings["lora"] = {
            "rank": lora.RANK,
            "alpha": lora.ALPHA,
            "targets": list(lora.TARGETS),
            "last_blocks": lora.LAST_BLOCKS,
        }
    return settings


def share_weights(model: nn.Module) -> None:
    """Send the main process's weights to all processes, because new weights can differ between platforms.

    A tower that all processes read from the same file is not sent, nor are weights in pieces, which differ.
    """
    if comm.get_world_size() > 1:
        base = getattr(model.backbone, "base", None)
        hashes = comm.all_gather(base.sha256 if base and base.pretrained else None)
        read = hashes[0] is not None and len(set(hashes)) == 1
        for name, tensor in model.state_dict().items():
            sent = not (read and name.startswith("backbone.tower.") and ".lora." not in name)
            if sent and not is_piece(tensor):
                for part in (tensor.qdata, tensor.scale) if is_int8(tensor) else (tensor,):
                    torch.distributed.broadcast(part, 0)
