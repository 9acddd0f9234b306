"""`tools/sweep.py`: many short runs that differ in a few config keys, compared on the same figures.

Folders below --output:

    heads/ID/               a stage 1, shared by all runs whose settings of stage 1 are equal
    untuned/ID/             the figures before stage lora
    runs/NAME-seedN-ID/     a run: its stage lora, its figures
    demo_world/             the scenes, where the sweep has them made
    results.json, table.md, sweep.png     rewritten after every job

ID is a hash of all that decides a result (config, weight files, annotations), so that what is there is not done again,
whatever the sweep's file looked like when it was done.
"""

import fcntl
import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from visft.applications import sweep_job, sweep_plan, sweep_report
from visft.checkpoint import files, load
from visft.data.datasets import demo_world
from visft.engine import settings
from visft.errors import ConfigError, TrainingError

logger = logging.getLogger(__name__)


def run(config: str | os.PathLike, output: str | os.PathLike) -> dict[str, Any]:
    """Do what is not done yet, and write the results after each job; returns what is in results.json.

    Raises:
        ConfigError, DataError, CheckpointError: something is wrong with the sweep; raised before the first run.
        TrainingError: runs have failed; the others were done all the same.
    """
    sweep = sweep_plan.read(config)
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"--output {folder}: another sweep is at work there; wait for it, or give another folder"
            ) from None
        if sweep.demo_world:
            root = folder / "demo_world"
            demo_world.make(root, num_train=sweep.demo_world["train"], num_val=sweep.demo_world["val"])
            demo_world.register(root)
            os.environ["VISFT_DEMO_DATA"] = str(
                root.resolve()
            )  # for the processes that are started from here
        return _Sweep(sweep_plan.plan(sweep), folder).run()


class _Sweep:
    """The jobs of a plan, one after the other."""

    def __init__(self, plan: sweep_plan.Plan, folder: Path) -> None:
        self.plan, self.folder = plan, folder
        self.errors: dict[str, str] = {}
        self.number, self.total = 0, len(plan.heads) + len(plan.untuned) + len(plan.runs)

    def run(self) -> dict[str, Any]:
        plan = self.plan
        for identity, words in plan.heads.items():
            self._job(f"stage 1 {identity}", identity, self._heads(identity), train=words)
        for identity in plan.untuned:
            run = next(run for run in plan.runs if run.untuned == identity)
            words = plan.untuned[identity]
            if run.heads:
                if run.heads in self.errors:
                    self._fail(f"untuned tower {identity}", identity, "its stage 1 failed")
                    continue
                words = (*words, "MODEL.VISFT.HEAD_FILES", self._trained_heads(run.heads))
            folder = self.folder / "untuned" / identity
            self._job(
                f"untuned tower {identity}",
                identity,
                folder,
                measure=words,
                amounts=(0.0,),
                key=run.measured_with,
            )
            self._check_measure(identity)
        for run in plan.runs:
            self._run(run)
        results = self._write()
        failed = [run for run in results["runs"] if run["status"] == "failed"]
        logger.info("%s", sweep_report.table(results))
        logger.info("%s", self.folder / "results.json")
        if failed:
            first = failed[0]
            raise TrainingError(
                f"{len(failed)} of {len(plan.runs)} runs failed, first `{first['name']}` with seed {first['seed']} "
                f"({first['error']}); the same command tries them again"
            )
        return results

    def _run(self, run: sweep_plan.Run) -> None:
        label = f"{run.name}, seed {run.seed}"
        train, measure = run.opts, run.measure_opts
        if run.heads:
            if run.heads in self.errors:
                self._fail(label, run.identity, "its stage 1 failed")
                return
            source = ("MODEL.VISFT.HEAD_FILES", self._trained_heads(run.heads))
            train, measure = (*train, *source), (*measure, *source)
        folder = self._run_folder(run)
        self._job(
            label,
            run.identity,
            folder,
            train=train,
            measure=(*measure, "MODEL.WEIGHTS", str(folder)),
            amounts=self.plan.interpolate,
            key=run.measured_with,
        )

    def _job(
        self,
        label: str,
        identity: str,
        folder: Path,
        *,
        train: Sequence[str] = (),
        measure: Sequence[str] = (),
        amounts: Sequence[float] = (),
        key: str = "",
    ) -> None:
        """Run a job in its process, unless it is done; a failure is kept in `errors`."""
        self.number += 1
        where = f"[{self.number}/{self.total}] {label}"
        trained = not train or (folder / sweep_job.FINISHED).is_file()
        if trained and all(sweep_job.label(amount) in sweep_job.measured(folder, key) for amount in amounts):
            logger.info("%s: done before", where)
            return
        folder.mkdir(parents=True, exist_ok=True)
        job = {"config": self.plan.config, "train": train, "measure": measure, "amounts": amounts, "key": key}
        files.write_json(folder / sweep_job.JOB, job)
        logger.info("%s ...", where)
        start = time.monotonic()
        with open(folder / "process.log", "a", encoding="utf-8") as log:
            begin = log.tell()
            command = [sys.executable, "-m", "visft.applications.sweep_job", str(folder)]
            with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log) as process:
                status = process.wait()
        seconds = time.monotonic() - start
        if status == 0:
            self._add_seconds(folder, seconds)
            logger.info("%s: %.0f s", where, seconds)
        else:
            self._fail(where, identity, _reason(folder / "process.log", begin, status))
        self._write()

    def _fail(self, label: str, identity: str, reason: str) -> None:
        self.errors[identity] = reason
        logger.error("%s: failed: %s", label, reason)

    def _check_measure(self, identity: str) -> None:
        """Names in `measure` against the figures there are, before any run is trained."""
        run = next(run for run in self.plan.runs if run.untuned == identity)
        figures = sweep_job.measured(self.folder / "untuned" / identity, run.measured_with).get(
            sweep_job.label(0)
        )
        for name in self.plan.measure if figures else ():
            if name not in figures:
                raise settings.unknown(f"{self.plan.source}: `measure`", name, figures)

    def _add_seconds(self, folder: Path, seconds: float) -> None:
        file = folder / "seconds.json"
        before = files.read_json(file) if file.is_file() else 0.0
        files.write_json(file, round(before + seconds, 1))

    def _heads(self, identity: str) -> Path:
        return self.folder / "heads" / identity

    def _trained_heads(self, identity: str) -> str:
        """HEAD_FILES of the runs that start from a stage 1."""
        return str((str(load.resolve(self._heads(identity), stages=("heads",))[-1].resolve()),))

    def _run_folder(self, run: sweep_plan.Run) -> Path:
        there = sorted((self.folder / "runs").glob(f"*-{run.identity}"))
        plain = re.sub(r"[^a-z0-9.+]+", "-", run.name.lower()).strip("-")[:60]
        return there[0] if there else self.folder / "runs" / f"{plain}-seed{run.seed}-{run.identity}"

    def _write(self) -> dict[str, Any]:
        plan = self.plan
        labels = [sweep_job.label(amount) for amount in plan.interpolate]
        runs = []
        for run in plan.runs:
            folder = self._run_folder(run)
            figures = sweep_job.measured(folder, run.measured_with)
            done = all(label in figures for label in labels)
            failed = run.identity in self.errors
            seconds = folder / "seconds.json"
            before = sweep_job.measured(self.folder / "untuned" / run.untuned, run.measured_with)
            runs.append(
                {
                    "name": run.name,
                    "seed": run.seed,
                    "status": "failed" if failed else "finished" if done else "waiting",
                    "error": self.errors.get(run.identity),
                    "overrides": dict(run.overrides),
                    "folder": str(folder.relative_to(self.folder)),
                    "seconds": files.read_json(seconds) if seconds.is_file() else None,
                    "untuned": before.get(sweep_job.label(0)),
                    "figures": {label: figures[label] for label in labels if label in figures},
                }
            )
        results = {
            "sweep": str(plan.source),
            "config": plan.config,
            "measure": list(plan.measure),
            "interpolate": list(plan.interpolate),
            "runs": runs,
        }
        sweep_report.write(results, self.folder)
        return results


def _reason(log: Path, begin: int, status: int) -> str:
    """Why a process ended with a status: its error message, else its last line."""
    if status < 0:
        return f"its process was killed by signal {-status}"
    with open(log, encoding="utf-8", errors="replace") as file:
        file.seek(begin)
        lines = [line.strip() for line in file if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    last = errors[-1] if errors else lines[-1] if lines else f"status {status}"
    return f"{last} (see {log})"
