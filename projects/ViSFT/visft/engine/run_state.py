"""The state of a run that survives a kill, in `OUTPUT_DIR/run.json`."""

import logging
import os
import random
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch import nn

from visft.checkpoint import files
from visft.checkpoint.run_folder import PARTS
from visft.engine import evaluate
from visft.engine.run_vocabulary import FILE as VOCABULARY_FILE
from visft.errors import ConfigError
from visft.visualization import run_report

logger = logging.getLogger(__name__)

FILE = "run.json"

_LEFT_BY_A_RUN = (
    FILE,
    "report.md",
    "report.json",
    "loss_curves.png",
    "predictions",
    "export",
    "inference",
    VOCABULARY_FILE,
)


class RunState:
    """The seed of a run, its number of threads per process (which affects the last bits of sums), and its evaluations.

    Attributes:
        evaluations: the metrics of each step (`start`, `heads`, `lora`), in per cent.
        record: the run's record for its checkpoints.
    """

    def __init__(
        self, folder: Path, seed: int, threads: int, evaluations: dict[str, dict[str, float]]
    ) -> None:
        self.folder, self.seed, self.threads, self.evaluations = folder, seed, threads, evaluations
        self.record: dict[str, str] = {}

    def evaluate(self, step: str, cfg: CfgNode, model: nn.Module) -> dict[str, float]:
        """Return the metrics after a step. A step that was evaluated before a kill is read from `run.json`."""
        if step not in self.evaluations:
            self.evaluations[step] = metrics = evaluate.evaluate_with_zero_shot(cfg, model)
            self.save()
            if metrics:
                evaluate.log_metrics(step, metrics)
        return self.evaluations[step]

    def save(self) -> None:
        """Write `run.json` in the main process."""
        if comm.is_main_process():
            known = {step: run_report.finite(metrics) for step, metrics in self.evaluations.items()}
            state = {"seed": self.seed, "threads": self.threads, "evaluations": known}
            files.write_json(self.folder / FILE, state)


def start_or_continue(cfg: CfgNode, *, resume: bool) -> RunState:
    """Return the state of the run in OUTPUT_DIR, or of a new run.

    Without `resume`, the files of an earlier run are moved to `earlier-N`.

    Raises:
        ConfigError: the existing run has another seed.
    """
    folder = Path(cfg.OUTPUT_DIR)
    write_logs(folder)
    if comm.is_main_process():
        files.remove_leftovers(folder)
        if not resume:
            _set_earlier_run_aside(folder)
        files.write_text(folder / "config.yaml", cfg.dump())
    comm.synchronize()
    known = None
    if comm.is_main_process() and (folder / FILE).is_file():
        known = files.read_json(folder / FILE)
        logger.info("continuing the run in %s", folder)
    seed = cfg.SEED if cfg.SEED >= 0 else random.SystemRandom().randrange(2**31)
    seed, known = comm.all_gather((seed, known))[0]  # the main process decides
    if known is None:
        state = RunState(folder, seed, torch.get_num_threads(), {})
        state.save()
        return state
    if cfg.SEED >= 0 and cfg.SEED != known["seed"]:
        raise ConfigError(
            f"SEED is {cfg.SEED}, but the run in {folder} was started with {known['seed']}; resume with the config "
            "of its start"
        )
    threads = known.get("threads", torch.get_num_threads())
    if torch.device(cfg.MODEL.DEVICE).type == "cpu" and threads != torch.get_num_threads():
        logger.warning(
            "the run was started with %d threads per process and continues with %d: its result will differ from that "
            "of an uninterrupted run in the last bits (OMP_NUM_THREADS sets the number)",
            threads,
            torch.get_num_threads(),
        )
    nan = float("nan")
    evaluations = {
        step: {name: nan if value is None else value for name, value in metrics.items()}
        for step, metrics in known["evaluations"].items()
    }
    return RunState(folder, known["seed"], threads, evaluations)


def write_logs(folder: Path) -> None:
    """Log to the terminal and to `log.txt` in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    rank = comm.get_rank()
    for name in ("detectron2", "fvcore", "visft"):
        setup_logger(
            str(folder), distributed_rank=rank, name=name, abbrev_name={"detectron2": "d2"}.get(name)
        )


def _set_earlier_run_aside(folder: Path) -> None:
    """Move the files of an earlier run to `earlier-N`, so that they are kept but not resumed."""
    names = [name for name in (*_LEFT_BY_A_RUN, *PARTS) if (folder / name).exists()]
    if not any(name in names for name in (FILE, "heads", "lora")):
        return
    number = 1
    while (folder / f"earlier-{number}").exists():
        number += 1
    target = folder / f"earlier-{number}"
    target.mkdir()
    for name in names:
        os.rename(folder / name, target / name)
    logger.info("moved an earlier run's files to %s (--resume would have continued it)", target)
