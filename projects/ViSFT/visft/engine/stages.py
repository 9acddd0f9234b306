"""A whole run: stage heads, stage lora, export, report; each part continued or skipped by --resume."""

import argparse
import functools
import hashlib
import json
import logging
import os
import random
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.engine import hooks
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.events import CommonMetricPrinter, JSONWriter, TensorboardXWriter
from detectron2.utils.logger import setup_logger
from torch import nn

from visft.checkpoint import files, load
from visft.checkpoint.run import RunCheckpointer, keep_start, trained_tensors
from visft.checkpoint.run_folder import PARTS, START, run_files
from visft.data import LabelledImages, build_stage_loader, load_labelled
from visft.engine import evaluate, exporting, stopping
from visft.engine.feature_cache import cached_features
from visft.engine.from_run import record_of, seed_of
from visft.engine.hooks import Checkpoints, LearningRate, Writers
from visft.engine.optimizer import build_optimizer, learning_rate
from visft.engine.run_vocabulary import FILE as VOCABULARY_FILE
from visft.engine.run_vocabulary import with_vocabulary, words_of
from visft.engine.trainer import StageTrainer, seed_iteration
from visft.errors import ConfigError
from visft.evaluation import demo_zero_shot
from visft.utils import mixed_precision
from visft.visualization import run_report

logger = logging.getLogger(__name__)

_LEFT_BY_A_RUN = (
    "run.json",
    "report.md",
    "report.json",
    "loss_curves.png",
    "predictions",
    "export",
    "inference",
    VOCABULARY_FILE,
)


def run(cfg: CfgNode, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Run the stages of `VISFT.STAGES`, export, and write images and the report; returns all evaluations.

    With `--resume`, a stage continues from its newest whole checkpoint, a finished one is not repeated. Without, an
    earlier run in the same OUTPUT_DIR is moved to its subfolder `earlier-N` first.

    Raises:
        VisftError: of any kind, from weights that do not fit to a loss that is not finite.
    """
    folder = Path(cfg.OUTPUT_DIR)
    state = _start(cfg, folder, resume=args.resume)
    _warn_of_untrained_heads(cfg)
    cfg = with_vocabulary(cfg, folder)
    model = initial_model(cfg, state.seed)
    state.record = record_of(cfg, model, state.seed).to_metadata()
    _keep_start(cfg, model, state)
    parts = [*model.heads.items(), *model.objectives.items()]
    has_labels = {name: part.has_labels for name, part in parts}
    mask_readers = [name for name, part in parts if part.reads_masks]
    images = functools.cache(lambda: load_labelled(cfg, has_labels, mask_readers))
    if not state.evaluations:
        images()  # data without labels for a head stops the run before anything is computed
    if cfg.MODEL.VISFT.HEAD_FILES or cfg.MODEL.WEIGHTS:
        state.evaluate("start", cfg, model)
    for stage in cfg.VISFT.STAGES:
        if stage == "heads" and not any(head.trainable for head in model.heads.values()):
            logger.info(
                "stage heads is skipped: %s without weights, there is nothing to train", _are(model.heads)
            )
            continue
        _run_stage(cfg, model, stage, state, images)
    if _let_others_go():
        _finish(cfg, model, folder, state)
    return state.evaluations


def _let_others_go() -> bool:
    """End what the processes do together; True in the main one, which goes on alone for as long as it takes."""
    main = comm.is_main_process()
    comm.synchronize()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return main


def _are(names: Iterable[str]) -> str:
    names = list(names)
    return f"{names[0]} is" if len(names) == 1 else f"{' and '.join(names)} are"


def evaluate_only(cfg: CfgNode, args: argparse.Namespace) -> dict[str, float]:
    """Evaluate MODEL.WEIGHTS; returns the figures."""
    _loggers(Path(cfg.OUTPUT_DIR))
    cfg = with_vocabulary(cfg)
    model = initial_model(cfg, seed_of(cfg.MODEL.WEIGHTS, cfg.SEED))
    model.eval()
    figures = _figures(cfg, model)
    if comm.is_main_process():
        files.write_json(Path(cfg.OUTPUT_DIR) / "evaluation.json", run_report.finite(figures))
        _log_figures("evaluation", figures)
    return figures


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


class _State:
    """What a run must remember between kills (`run.json`): its seed, the threads of a process (on which the last bits
    of sums depend), and the evaluations it has made. `record` is what its checkpoints say of it."""

    def __init__(
        self, folder: Path, seed: int, threads: int, evaluations: dict[str, dict[str, float]]
    ) -> None:
        self.folder, self.seed, self.threads, self.evaluations = folder, seed, threads, evaluations
        self.record: dict[str, str] = {}

    def evaluate(self, step: str, cfg: CfgNode, model: nn.Module) -> dict[str, float]:
        """Figures after a step; from `run.json` when the step was evaluated before a kill."""
        if step not in self.evaluations:
            self.evaluations[step] = figures = _figures(cfg, model)
            self.save()
            if figures:
                _log_figures(step, figures)
        return self.evaluations[step]

    def save(self) -> None:
        if comm.is_main_process():
            known = {step: run_report.finite(figures) for step, figures in self.evaluations.items()}
            state = {"seed": self.seed, "threads": self.threads, "evaluations": known}
            files.write_json(self.folder / "run.json", state)


def _start(cfg: CfgNode, folder: Path, resume: bool) -> _State:
    _loggers(folder)
    if comm.is_main_process():
        files.remove_leftovers(folder)
        if not resume:
            _set_earlier_run_aside(folder)
        run_report.write_atomically(folder / "config.yaml", cfg.dump())
    comm.synchronize()
    state = None
    if comm.is_main_process() and (folder / "run.json").is_file():
        state = files.read_json(folder / "run.json")
        logger.info("continuing the run in %s", folder)
    seed = cfg.SEED if cfg.SEED >= 0 else random.SystemRandom().randrange(2**31)
    found = comm.all_gather((seed, state))[0]  # the main process decides for all
    seed, state = found
    if state is None:
        run_state = _State(folder, seed, torch.get_num_threads(), {})
        run_state.save()
        return run_state
    nan = float("nan")
    known = {
        step: {name: nan if value is None else value for name, value in figures.items()}
        for step, figures in state["evaluations"].items()
    }
    if cfg.SEED >= 0 and cfg.SEED != state["seed"]:
        raise ConfigError(
            f"SEED is {cfg.SEED}, but the run in {folder} was started with {state['seed']}; resume with the config "
            "that it was started with"
        )
    threads = state.get("threads", torch.get_num_threads())
    if torch.device(cfg.MODEL.DEVICE).type == "cpu" and threads != torch.get_num_threads():
        logger.warning(
            "the run was started with %d threads a process and goes on with %d: its result will differ from that of "
            "an uninterrupted run in the last bits (OMP_NUM_THREADS sets the number)",
            threads,
            torch.get_num_threads(),
        )
    return _State(folder, state["seed"], threads, known)


def _loggers(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rank = comm.get_rank()
    for name in ("detectron2", "fvcore", "visft"):
        setup_logger(
            str(folder), distributed_rank=rank, name=name, abbrev_name={"detectron2": "d2"}.get(name)
        )


def _set_earlier_run_aside(folder: Path) -> None:
    """Move what an earlier run left to `earlier-N`, so that nothing is lost and nothing resumes from it."""
    names = [name for name in (*_LEFT_BY_A_RUN, *PARTS) if (folder / name).exists()]
    if not any(name in names for name in ("run.json", "heads", "lora")):
        return
    number = 1
    while (folder / f"earlier-{number}").exists():
        number += 1
    target = folder / f"earlier-{number}"
    target.mkdir()
    for name in names:
        os.rename(folder / name, target / name)
    logger.info("moved an earlier run's files to %s (--resume would have continued it)", target)


def _run_stage(
    cfg: CfgNode, model: nn.Module, stage: str, state: _State, pictures: Callable[[], LabelledImages]
) -> None:
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
        settings=_settings(cfg, stage),
        record=state.record,
        keep=solver.KEEP_CHECKPOINTS,
    )
    start = checkpointer.resume()
    _share_weights(model)
    if start < solver.MAX_ITER:
        logger.info("stage %s: iterations %d to %d", stage, start, solver.MAX_ITER)
        loader = build_stage_loader(cfg, stage, pictures(), start_iteration=start, seed=state.seed)
        trainer.batches = iter(loader)
    else:
        logger.info("stage %s: finished before", stage)

    gibibytes = cfg.VISFT.FEATURE_CACHE if stage == "heads" else 0
    with cached_features(model.backbone, gibibytes) as cache:
        if start < solver.MAX_ITER:
            trainer.register_hooks(_hooks(cfg, model, solver, folder, checkpointer, cache))
            trainer.train(start, solver.MAX_ITER)
    # Of fresh heads, the first evaluation is what the report compares with.
    wanted = cfg.VISFT.EVAL_BETWEEN_STAGES or stage == cfg.VISFT.STAGES[-1] or not state.evaluations
    figures = state.evaluate(stage, cfg, model) if wanted else {}
    if start < solver.MAX_ITER and comm.is_main_process() and figures:
        row = {"iteration": solver.MAX_ITER, **run_report.finite(figures)}
        with open(folder / "metrics.json", "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def _keep_start(cfg: CfgNode, model: nn.Module, state: _State) -> None:
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
        settings = _settings(cfg, START)
        keep_start(state.folder, kept, base=model.backbone.base, settings=settings, record=state.record)
    comm.synchronize()


def _hooks(cfg: CfgNode, model: nn.Module, solver: CfgNode, folder: Path, checkpointer, cache) -> list:
    def rate(iteration: int) -> float:
        return learning_rate(
            iteration, base=solver.BASE_LR, warmup=solver.WARMUP_ITERS, total=solver.MAX_ITER
        )

    def periodic_evaluation() -> dict[str, float]:
        with stopping.released(), cache.bypassed():
            return run_report.finite_only(_figures(cfg, model, with_zero_shot=False))

    made = [
        hooks.IterationTimer(),
        LearningRate(rate),
        Checkpoints(checkpointer.save, solver.CHECKPOINT_PERIOD, solver.EVAL_PERIOD),
        # The last evaluation is the run's own: it is remembered, so that a kill does not repeat it.
        hooks.EvalHook(solver.EVAL_PERIOD, periodic_evaluation, eval_after_train=False),
    ]
    return made + [Writers(_writers(folder, solver.MAX_ITER))] if comm.is_main_process() else made


def _writers(folder: Path, max_iter: int) -> list:
    return [
        CommonMetricPrinter(max_iter),
        JSONWriter(str(folder / "metrics.json")),
        TensorboardXWriter(str(folder)),
    ]


def _settings(cfg: CfgNode, stage: str) -> dict:
    """What explains a checkpoint's weights to a reader without the config."""
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


def _share_weights(model: nn.Module) -> None:
    """Give every process the main one's weights, should fresh ones differ by platform.

    A tower that all read from the same file is the same everywhere, and is not sent.
    """
    if comm.get_world_size() > 1:
        import torch.distributed as dist

        base = getattr(model.backbone, "base", None)
        hashes = comm.all_gather(base.sha256 if base and base.pretrained else None)
        read = hashes[0] is not None and len(set(hashes)) == 1
        for name, tensor in model.state_dict().items():
            if not (read and name.startswith("backbone.tower.") and ".lora." not in name):
                dist.broadcast(tensor, 0)


def _warn_of_untrained_heads(cfg: CfgNode) -> None:
    """Said before the tower is trained through frozen heads that nobody has trained."""
    node, stages = cfg.MODEL.VISFT, cfg.VISFT.STAGES
    trained = "heads" in stages or node.HEAD_FILES or cfg.MODEL.WEIGHTS
    weighty = [head for head in node.HEADS if node[head.upper()].HEAD != "RegionTextHead"]
    if weighty and node.FREEZE_HEADS and not trained:
        logger.warning(
            "stage lora will go through fresh heads, which nobody has trained: set MODEL.VISFT.HEAD_FILES, or add "
            "stage heads to VISFT.STAGES"
        )


def _figures(cfg: CfgNode, model: nn.Module, with_zero_shot: bool = True) -> dict[str, float]:
    figures = evaluate.evaluate(cfg, model)
    if with_zero_shot and comm.is_main_process() and demo_zero_shot.applies(cfg):
        with mixed_precision.evaluating(cfg):
            figures |= demo_zero_shot.demo_zero_shot(model.backbone)
    comm.synchronize()
    return figures


def _log_figures(step: str, figures: Mapping[str, float]) -> None:
    shown = {
        name: value for name, value in figures.items() if name.endswith(("/AP", "/AP50", "/top1", "/CIDEr"))
    }
    logger.info("%s: %s", step, ", ".join(f"{name} {value:.2f}" for name, value in shown.items()))


def _finish(cfg: CfgNode, model: nn.Module, folder: Path, state: _State) -> None:
    model.eval()
    exporting.export(cfg, model.backbone, folder / "export")
    if cfg.DATASETS.TEST:
        evaluate.draw(cfg, model, folder / "predictions")
    run_report.draw_loss_curves(folder, cfg.VISFT.STAGES)
    title = f"ViSFT of {cfg.MODEL.CLIP_VIT.NAME} ({cfg.MODEL.CLIP_VIT.PRETRAINED or 'random weights'})"
    evaluations = {step: figures for step, figures in state.evaluations.items() if figures}
    run_report.write_report(folder, evaluations, title=title)
