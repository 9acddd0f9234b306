"""One job of a sweep in its own process: train, then measure what is not measured yet.

    python -m visft.applications.sweep_job FOLDER

FOLDER/job.json says what to do. FOLDER/finished.json marks the end of the training, FOLDER/measured.json holds the
figures.
"""

import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from visft.checkpoint import files
from visft.engine import checks, evaluate, launch, settings, stages
from visft.evaluation import demo_zero_shot
from visft.modeling.backbone import lora
from visft.utils import cli
from visft.visualization import run_report

JOB, FINISHED, MEASURED, SECONDS = "job.json", "finished.json", "measured.json", "seconds.json"


@dataclass(frozen=True)
class Job:
    """What one process trains and measures. Its folder records what is done.

    Args:
        folder: its own. config: the base config's file.
        train: config keys of the training; none: nothing is trained.
        measure: config keys of the model that is measured.
        amounts: shares of the LoRA's update in the tower, one measurement each.
        key: hash of everything but the weights that decides the figures.
        after: folder of the job whose heads it starts from, if any.
    """

    folder: str
    config: str
    train: Mapping[str, Any] = field(default_factory=dict)
    measure: Mapping[str, Any] = field(default_factory=dict)
    amounts: Sequence[float] = ()
    key: str = ""
    after: str = ""

    @property
    def trained(self) -> bool:
        return not self.train or Path(self.folder, FINISHED).is_file()

    @property
    def done(self) -> bool:
        return self.trained and not self.missing

    @property
    def figures(self) -> dict[str, dict[str, float | None]]:
        """Figures by amount (`0`, `0.5`, `1`); {} if they were measured with other settings."""
        content = _read(self.folder, MEASURED, {})
        return content["figures"] if content.get("key") == self.key else {}

    @property
    def missing(self) -> list[float]:
        """Amounts that are not measured yet."""
        figures = self.figures
        return [amount for amount in self.amounts if f"{amount:g}" not in figures]

    @property
    def seconds(self) -> float | None:
        """Duration of its processes."""
        return _read(self.folder, SECONDS, None)

    def run(self) -> str:
        """Do it in its own process; returns why that failed (the error message or the last line), else ''."""
        folder, start = Path(self.folder), time.monotonic()
        files.write_json(folder / JOB, asdict(self))
        command = [sys.executable, "-m", "visft.applications.sweep_job", self.folder]
        with open(folder / "process.log", "a+", encoding="utf-8", errors="replace") as log:
            begin = log.seek(0, os.SEEK_END)
            with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log) as process:
                status = process.wait()
            log.seek(begin)
            lines = [line.strip() for line in log if line.strip()]
        if status < 0:
            return f"its process was killed by signal {-status}"
        if status:
            errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
            return f"{[f'status {status}', *lines, *errors][-1]} (see {folder / 'process.log'})"
        files.write_json(folder / SECONDS, round((self.seconds or 0.0) + time.monotonic() - start, 1))
        return ""


def _read(folder: str, name: str, default: Any) -> Any:
    file = Path(folder, name)
    return files.read_json(file) if file.is_file() else default


def main(folder: str) -> int:
    """Work of the process; returns its exit status."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    # The sweep holds the other end of standard input. When it dies, this process must end too: the next sweep starts
    # another.
    threading.Thread(target=_end_with_the_sweep, daemon=True).start()
    job = Job(**files.read_json(Path(folder, JOB)))
    if not job.trained:
        words = settings.words({**job.train, "OUTPUT_DIR": folder})
        status = launch.train_config(job.config, words, resume=True)
        if status:
            return status
        files.write_json(Path(folder, FINISHED), {"opts": job.train})
    return cli.guard(_measure, job)


@torch.no_grad()
def _measure(job: Job) -> None:
    if not job.missing:
        return
    cfg = settings.load_config(job.config, settings.words({**job.measure, "OUTPUT_DIR": job.folder}))
    checks.check(cfg, train=False)
    cfg.freeze()
    model = stages.initial_model(cfg, cfg.SEED).eval()
    tuned = {name: tensor.clone() for name, tensor in lora.state_dict(model.backbone).items()}
    for amount in job.missing:
        # Between base and tuned weights (arXiv:2109.01903): linear in the update, so in LoRA's B.
        scaled = {name: t * amount if name.endswith("lora_B") else t for name, t in tuned.items()}
        if scaled:
            lora.load_state_dict(model.backbone, scaled)
        figures = evaluate.evaluate(cfg, model)
        if demo_zero_shot.applies(cfg):
            figures |= demo_zero_shot.demo_zero_shot(model.backbone)
        figures = {name: value for name, value in run_report.finite(figures).items() if "/AP-" not in name}
        found = {**job.figures, f"{amount:g}": figures}
        files.write_json(Path(job.folder, MEASURED), {"key": job.key, "figures": found})


def _end_with_the_sweep() -> None:
    while os.read(sys.stdin.fileno(), 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
