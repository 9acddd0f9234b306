"""`tools/benchmark.py`: the cost of an iteration with one pass of the tower for all heads, and with one for each."""

import argparse
import contextlib
import functools
import logging
import platform
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.utils.events import EventStorage
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils.data import Subset

from visft.checkpoint import files
from visft.data import ViSFTMapper, load_labelled
from visft.data.loader import TrainLoader
from visft.engine import checks, settings, stages
from visft.engine.optimizer import build_optimizer
from visft.engine.run_vocabulary import with_vocabulary
from visft.engine.trainer import StageTrainer
from visft.errors import ConfigError, DataError
from visft.modeling.compiled import compiled
from visft.utils import memory, mixed_precision

logger = logging.getLogger(__name__)

JOINT = "joint"
PARTS = ("tower", "heads", "other")
"""Parts of an iteration's time: forward and backward of the tower; the same of the heads, with matching and losses;
image preparation and the optimizer's step."""


def run(args: argparse.Namespace) -> None:
    """Check, measure, print the table of `summary`."""
    if args.plot:
        raise ConfigError("--plot is for --against reference; add that, or leave --plot out")
    cfg = checked_config(args)
    model, loader = build(cfg, args.stage, args.images)
    images = next(loader)
    with compiled(model, cfg.VISFT.COMPILE):
        found = summary(measure(trainer_of(cfg, model), images, rounds=args.rounds))
    found |= conditions(args, cfg, images, model.device) | {"stage": args.stage}
    if args.output:
        files.write_json(args.output, found)
    print(table(found), flush=True)


def checked_config(args: argparse.Namespace) -> CfgNode:
    """The config of one stage, checked as before a run.

    Raises:
        ConfigError, DataError, CheckpointError: there is nothing to measure.
    """
    cfg = settings.load_config(args.config_file, args.opts)
    if cfg.MODEL.META_ARCHITECTURE != "ViSFT":
        raise ConfigError(
            f"MODEL.META_ARCHITECTURE is `{cfg.MODEL.META_ARCHITECTURE}`; the benchmark is of ViSFT, whose heads share "
            "a tower"
        )
    if not cfg.MODEL.VISFT.HEADS:
        raise ConfigError("MODEL.VISFT.HEADS is empty; the benchmark compares heads, so name some")
    if args.rounds < 1 or args.images < 0:
        raise ConfigError("--rounds is a number of rounds, at least 1, and --images of images, at least 0")
    cfg.VISFT.STAGES = (args.stage,)
    checks.check(cfg, test=False)
    return cfg


def build(cfg: CfgNode, stage: str, size: int) -> tuple[nn.Module, TrainLoader]:
    """The model of a stage, and batches of DATASETS.TRAIN's images with labels for every head, mapped for training.

    Args:
        size: images a batch; 0: the stage's IMS_PER_BATCH.

    Raises:
        DataError: there is no such image.
    """
    with tempfile.TemporaryDirectory() as folder:  # for a vocabulary that is built from the captions
        cfg = with_vocabulary(cfg, folder)
        model = stages.initial_model(cfg, max(cfg.SEED, 0))
    model.set_stage(stage)
    images = load_labelled(cfg, {name: head.has_labels for name, head in model.heads.items()})
    rows = functools.reduce(np.intersect1d, images.rows.values())
    if not len(rows):
        raise DataError(
            f"DATASETS.TRAIN ({', '.join(cfg.DATASETS.TRAIN)}): no image has labels for all of "
            f"{', '.join(model.heads)}; name a data set with all of them, or fewer of MODEL.VISFT.HEADS"
        )
    records, mapper = Subset(images.records, rows), ViSFTMapper(cfg, is_train=True)
    size = size or cfg.VISFT.SOLVER[stage.upper()].IMS_PER_BATCH
    return model, TrainLoader(records, mapper, batch_size=size, seed=max(cfg.SEED, 0))


def trainer_of(cfg: CfgNode, model: nn.Module) -> StageTrainer:
    """The trainer of a model in its stage, without batches."""
    solver = cfg.VISFT.SOLVER[model.stage.upper()]
    return StageTrainer(
        model,
        iter(()),
        build_optimizer(model, solver),
        stage=model.stage,
        clip_norm=solver.CLIP_NORM,
        amp=mixed_precision.amp_type(cfg, model.stage),
    )


def conditions(args: argparse.Namespace, cfg: CfgNode, images: list[dict], device: torch.device) -> dict:
    """What figures were measured on."""
    return {
        "config": Path(args.config_file).stem,
        "tower": cfg.MODEL.CLIP_VIT.NAME,
        "images": [list(image["image"].shape[1:]) for image in images],
        "rounds": args.rounds,
        "device": _device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def measure(trainer: StageTrainer, images: list[dict], *, rounds: int) -> list[dict[str, dict[str, float]]]:
    """Run complete iterations of every kind in turn, round after round.

    Args:
        trainer: of a ViSFT model in its stage. The weights change.
        images: the batch of every iteration, with labels for all heads.
        rounds: number of measured rounds, after one to warm up.

    Returns:
        For each round, for `joint` and for each head alone: seconds in `total` and in `tower`, `heads` and `other` (see
        PARTS); `memory`: the peak in GiB of the GPU, else of the process (0 if unknown).
    """
    kinds = {JOINT: images}
    model = trainer.model
    learning = [name for name, head in model.heads.items() if head.trainable or model.stage == "lora"]
    kinds |= {name: [image | {"task": name} for image in images] for name in learning}
    probe = _Probe(trainer)
    found = []
    try:
        with EventStorage() as trainer.storage:
            for number in range(rounds + 1):
                trainer.iter = number  # in a round, all kinds draw the same dropout and points
                row = {kind: probe.iteration(batch) for kind, batch in kinds.items()}
                if number:
                    found.append(row)
    finally:
        probe.remove()
    return found


def summary(rounds: Sequence[dict[str, dict[str, float]]]) -> dict:
    """Medians over the rounds.

    Returns:
        `kinds`: for each kind what `measure` gives, and for `ratio` the sum of one iteration per head (of memory, the
        maximum). `speed`: how many times as fast `joint` is as `ratio`, the median of the rounds' quotients.
        `tower_speed`: the same for the tower's time.
    """
    rounds = [row | {"ratio": _one_of_each(row)} for row in rounds]
    kinds = {
        kind: {key: statistics.median(row[kind][key] for row in rounds) for key in rounds[0][kind]}
        for kind in rounds[0]
    }

    def quotient(key: str) -> float:
        return statistics.median(row["ratio"][key] / row[JOINT][key] for row in rounds)

    return {"kinds": kinds, "speed": quotient("total"), "tower_speed": quotient("tower")}


def _one_of_each(row: dict[str, dict[str, float]]) -> dict[str, float]:
    alone = [figures for kind, figures in row.items() if kind != JOINT]
    total = {key: sum(figures[key] for figures in alone) for key in ("total", *PARTS)}
    return total | {"memory": max(figures["memory"] for figures in alone)}


def table(found: dict) -> str:
    """The figures of `summary` and what they were measured on, as text."""
    heads = [kind for kind in found["kinds"] if kind not in (JOINT, "ratio")]
    names = {JOINT: "joint, all heads"} | {head: f"ratio, {head}" for head in heads}
    names["ratio"] = f"ratio, {len(heads)} iterations"
    rows = []
    for kind, name in names.items():
        row = found["kinds"][kind]
        rows.append([name, 1 / row["total"], *(row[part] for part in ("total", *PARTS)), row["memory"]])
    columns = ["", "iterations/s", "total s", *(f"{part} s" for part in PARTS), "peak GiB"]
    return (
        f"{heading(found, found['stage'])}\n{tabulate(rows, columns, tablefmt='plain', floatfmt='.3f')}\n"
        f"One joint iteration is {found['speed']:.2f} times as fast as {len(heads)} of ratio, one a task; its tower "
        f"takes {found['tower_speed']:.2f} times less."
    )


def heading(found: dict, stage: str) -> str:
    """What `conditions` found, in a line."""
    height, width = (max(sides) for sides in zip(*found["images"], strict=True))
    threads = "1 thread" if found["threads"] == 1 else f"{found['threads']} threads"
    return (
        f"{found['tower']}, stage {stage}, {len(found['images'])} images in {height} x {width}; {found['device']}, "
        f"{threads}, torch {found['torch']}; medians of {found['rounds']} interleaved rounds"
    )


class _Probe:
    """Times a trainer's iterations by hooks around the tower, on its features and on trained parameters."""

    def __init__(self, trainer: StageTrainer) -> None:
        self.trainer, self.cuda = trainer, trainer.device.type == "cuda"
        self._marks: dict[str, float | torch.cuda.Event] = {}
        backbone = trainer.model.backbone
        self._handles = [
            backbone.register_forward_pre_hook(lambda module, inputs: self._mark("forward")),
            backbone.register_forward_hook(self._after_tower),
            # The last call is the end of the backward pass.
            *(
                p.register_post_accumulate_grad_hook(lambda p: self._mark("backward"))
                for p in trainer.parameters
            ),
        ]

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def iteration(self, images: list[dict]) -> dict[str, float]:
        """One step of the trainer; its seconds and its peak memory (see `measure`)."""
        self.trainer.batches = iter([images])
        self._marks.clear()
        reset_peak(self.trainer.device)
        self._mark("start")
        self.trainer.run_step()
        self._mark("end")
        if self.cuda:
            torch.cuda.synchronize()
        total, tower = self._between("start", "end"), self._between("forward", "features")
        heads = self._between("features", "gradient" if "gradient" in self._marks else "backward")
        if "gradient" in self._marks:
            tower += self._between("gradient", "backward")
        row = {"total": total, "tower": tower, "heads": heads, "other": total - tower - heads}
        return row | {"memory": peak(self.trainer.device)}

    def _after_tower(self, module: nn.Module, inputs: tuple, output: dict[str, Tensor]) -> None:
        features = output[self.trainer.model.feature]
        if features.requires_grad:  # called once, when all heads' gradients are summed
            features.register_hook(lambda gradient: self._mark("gradient"))
        self._mark("features")

    def _mark(self, name: str) -> None:
        if self.cuda:
            # Kernels run asynchronously; waiting at each mark would slow what is measured.
            self._marks[name] = torch.cuda.Event(enable_timing=True)
            self._marks[name].record()
        else:
            self._marks[name] = time.perf_counter()

    def _between(self, first: str, second: str) -> float:
        a, b = self._marks[first], self._marks[second]
        return a.elapsed_time(b) / 1000 if self.cuda else b - a


def reset_peak(device: torch.device) -> None:
    """Count the peak memory from now on, where the system allows it."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    else:
        memory.reset_peak()


def peak(device: torch.device) -> float:
    """Peak memory in GiB: what tensors took on the GPU, else what the process held (0 if unknown)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return (memory.peak() or 0) / 2**30


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        return names[0] if names else platform.machine()
    return platform.processor() or platform.machine()
