#!/usr/bin/env python
r"""Compares what `tools/train_net.py --plan` says of a stage with real steps on the CPU, with random weights.

    scripts/measure_plan.py --config-file configs/visft_vit_b16.yaml --stage lora [--images N] \
        [--size PIXELS] [KEY VALUE ...]

The steps train on the batch that the plan assumes. Prints one line of JSON: GiB of the plan's peak, of the process's
own peak above what Python and its libraries took before, and their quotient; the same of operations, as torch's
FlopCounterMode counts them.
"""

import argparse
import json
import logging
import re
import tempfile
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch.utils.flop_counter import FlopCounterMode

from visft.applications import plan, simulated_step
from visft.engine import checks, settings
from visft.engine.optimizer import build_optimizer
from visft.engine.trainer import StageTrainer
from visft.utils import memory


def resident() -> int:
    """Bytes of this process in memory."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmRSS:\s+(\d+)", text)[1])


def measured(cfg: CfgNode, stage: str, images: list[dict]) -> dict[str, float]:
    """Peak bytes of two steps, above what was there before the model, and operations of another."""
    import scipy.optimize  # noqa: F401  a library that the first step loads

    before = resident()
    model = build_model(cfg)
    model.set_stage(stage)
    solver = cfg.VISFT.SOLVER[stage.upper()]
    optimizer = build_optimizer(model, solver, heads=cfg.VISFT.SOLVER.HEADS)
    trainer = StageTrainer(model, iter([images] * 3), optimizer, stage=stage, clip_norm=solver.CLIP_NORM)
    memory.reset_peak()
    with EventStorage() as trainer.storage:
        for trainer.iter in range(2):
            trainer.run_step()
        peak = memory.peak() - before
        with FlopCounterMode(display=False, custom_mapping=simulated_step.CPU_ATTENTION) as counter:
            trainer.run_step()
    return {"peak": peak, "step_flop": counter.get_total_flops()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True)
    parser.add_argument("--stage", choices=("heads", "lora"), required=True)
    parser.add_argument("--images", type=int, default=1, help="images of a batch")
    parser.add_argument("--size", type=int, default=224, help="side of the images in pixels")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config keys and values")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    cfg = settings.load_config(arguments.config_file, arguments.opts)
    cfg.MODEL.DEVICE, cfg.MODEL.CLIP_VIT.PRETRAINED, cfg.MODEL.CLIP_VIT.FROZEN_DTYPE = "cpu", "", ""
    cfg.MODEL.VISFT.HEAD_FILES, cfg.VISFT.STAGES = (), (arguments.stage,)
    cfg.VISFT.TASK_MIXING, cfg.VISFT.TASK_RATIOS = "joint", ()
    cfg.VISFT.INPUT.AUGMENTATION, cfg.VISFT.INPUT.SIZE = "square", arguments.size
    solver = cfg.VISFT.SOLVER[arguments.stage.upper()]
    solver.IMS_PER_BATCH, solver.AMP = arguments.images, ""
    checks.check(cfg, here=False)
    cfg.freeze()
    row = plan.plan(cfg)["steps"][0]
    size = (arguments.size, arguments.size)
    images = simulated_step.batch(
        arguments.images, size, objects=plan.OBJECTS, words=plan.CAPTION_WORDS, fake=False
    )
    with tempfile.TemporaryDirectory() as folder:
        found = measured(plan.resolved(cfg, Path(folder)), arguments.stage, images)
    words = {"config": Path(arguments.config_file).stem, "tower": cfg.MODEL.CLIP_VIT.NAME}
    words |= {"stage": arguments.stage, "images": arguments.images, "side": arguments.size}
    for key, unit, planned in (
        ("peak", 2**30, row["peak"]),
        ("step_flop", 1e12, row["step_flop"]),
    ):
        words |= {
            f"{key}_planned": round(planned / unit, 3),
            f"{key}_measured": round(found[key] / unit, 3),
            f"{key}_quotient": round(planned / found[key], 3),
        }
    print(json.dumps(words | {"torch": torch.__version__, "threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main()
