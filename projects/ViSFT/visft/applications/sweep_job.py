"""One job of a sweep, in a process of its own: train what is not trained yet, then measure what is not measured yet.

    python -m visft.applications.sweep_job FOLDER

FOLDER/job.json says what to do; FOLDER/finished.json is there when the training has ended, FOLDER/measured.json holds
the figures.
"""

import logging
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from visft.checkpoint import files
from visft.engine import checks, evaluate, launch, settings, stages
from visft.evaluation import demo_zero_shot
from visft.modeling.backbone import lora
from visft.utils import cli
from visft.visualization import run_report

logger = logging.getLogger(__name__)

JOB, FINISHED, MEASURED = "job.json", "finished.json", "measured.json"


def main(folder: str) -> int:
    """The process's work; returns its exit status."""
    # The sweep holds the other end of standard input. When it dies, however it does, this process must not go on
    # beside the one that the next sweep starts.
    threading.Thread(target=_end_with_the_sweep, daemon=True).start()
    job = files.read_json(Path(folder) / JOB)
    if job["train"] and not (Path(folder) / FINISHED).is_file():
        opts = [*job["train"], "OUTPUT_DIR", folder]
        status = launch.train_config(job["config"], opts, resume=True)
        if status:
            return status
        files.write_json(Path(folder) / FINISHED, {"opts": job["train"]})
    if job["measure"]:
        return cli.guard(_measure, Path(folder), job)
    return 0


def label(amount: float) -> str:
    """An amount of interpolation as results name it: `0`, `0.5`, `1`."""
    return f"{amount:g}"


def measured(folder: str | os.PathLike, key: str) -> dict[str, dict[str, float | None]]:
    """Figures that a job has measured, by amount (see `label`); {} when they were measured with other settings."""
    file = Path(folder) / MEASURED
    content = files.read_json(file) if file.is_file() else {}
    return content.get("figures", {}) if content.get("key") == key else {}


def _measure(folder: Path, job: dict) -> None:
    found = measured(folder, job["key"])
    missing = [amount for amount in job["amounts"] if label(amount) not in found]
    if not missing:
        return
    cfg = settings.load_config(job["config"], [*job["measure"], "OUTPUT_DIR", str(folder)])
    checks.check(cfg, train=False)
    cfg.freeze()
    model = stages.initial_model(cfg, cfg.SEED)
    model.eval()
    tuned = {name: tensor.clone() for name, tensor in lora.state_dict(model.backbone).items()}
    for amount in missing:
        _interpolate(model.backbone, tuned, amount)
        figures = evaluate.evaluate(cfg, model)
        if demo_zero_shot.applies(cfg):
            figures |= demo_zero_shot.demo_zero_shot(model.backbone)
        figures = {name: value for name, value in run_report.finite(figures).items() if "/AP-" not in name}
        found[label(amount)] = figures
        files.write_json(folder / MEASURED, {"key": job["key"], "figures": found})


@torch.no_grad()
def _interpolate(backbone: nn.Module, tuned: dict[str, torch.Tensor], amount: float) -> None:
    """Weights between base and tuned (arXiv:2109.01903): linear in the update, so in LoRA's B."""
    if tuned:
        scaled = {name: t * amount if name.endswith("lora_B") else t for name, t in tuned.items()}
        lora.load_state_dict(backbone, scaled)


def _end_with_the_sweep() -> None:
    while os.read(sys.stdin.fileno(), 1):
        pass
    os._exit(1)


def run(arguments: Sequence[str]) -> int:
    """As a command: one argument, the job's folder."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    return main(arguments[0])


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
