#!/usr/bin/env python
"""Does stage 2 help on tasks that the tower was not tuned on? Compares the recipe with controls.

    run.py [--arms NAME ...] [--split development] [--output DIR] [--workers N]    train and evaluate unfinished runs
    run.py --arms NAME ... --weights                                               train again to get the weights
    run.py --report [--split development] [--results DIR]                          table and plot of finished runs

arms.yaml lists the arms. The same command continues an interrupted one: a training from its last checkpoint, an
evaluation from its last benchmark. Folders in --output are `demo_world_FIRST-SCENE` and `runs/ARM-SEED-ID`, where ID is
a hash of the settings. The scores of a finished run go to `results/scores/` beside this file and its losses to
`results/logs/`, so that they outlive --output. The report needs only these. A finished run is repeated only if
--weights asks for its weights. `--redraw` makes the report from its results.json.
"""

import argparse
import concurrent.futures
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

from arm_runs import BASE, Runs
from arm_tables import RESULTS, overview, results, write
from arms import Arm, read

from towerbench.arguments import SPLITS
from visft.checkpoint import files
from visft.errors import ConfigError, TrainingError
from visft.utils import cli

logger = logging.getLogger("visft.experiment")


def _run(args: argparse.Namespace) -> None:
    plan = read(Path(args.plan))
    if args.redraw:
        write(files.read_json(Path(args.results) / "results.json"), Path(args.results))
        return
    output = Path(args.output).resolve()
    runs = Runs(plan, output, Path(args.results), args.split)
    for name in args.arms:
        if name not in plan.arms:
            raise ConfigError(f"--arms: there is no arm `{name}`; expected some of {', '.join(plan.arms)}")
    if args.report:
        found = results(runs)
        write(found, Path(args.results))
        logger.info("%s", overview(found))
        return
    if args.job:
        name, seed = args.job
        runs.job(None if name == BASE else plan.arms[name], int(seed))
        return
    failed = []
    for jobs in runs.phases([plan.arms[name] for name in args.arms or plan.arms], weights=args.weights):
        for arm in {arm.first_scene: arm for arm, _ in jobs if arm and not arm.of}.values():
            runs.scenes(arm)  # here, so that two jobs do not make the same scenes
        with concurrent.futures.ThreadPoolExecutor(args.workers) as pool:
            statuses = pool.map(lambda job: _process(args, *job), jobs)
            for (arm, seed), status in zip(jobs, statuses, strict=True):
                if status:
                    failed.append(f"{arm.name if arm else BASE}, seed {seed}")
    if failed:
        raise TrainingError(f"failed: {'; '.join(failed)}; the same command tries them again")


def _process(args: argparse.Namespace, arm: Arm | None, seed: int) -> int:
    """Run a job in its own process with one thread. Two such jobs are faster than one with two threads."""
    name = arm.name if arm else BASE
    command = [sys.executable, __file__, "--job", name, str(seed), "--plan", args.plan, "--split", args.split]
    command += ["--output", args.output, "--results", args.results]
    log = Path(args.output) / "logs" / f"{name.replace(' ', '-')}-{seed}-{args.split}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with open(log, "w") as file:
        done = subprocess.run(
            command, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
    logger.info("%s, seed %d: status %d, %.0f s", name, seed, done.returncode, time.monotonic() - start)
    return done.returncode


def main() -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--plan", default=str(Path(__file__).resolve().with_name("arms.yaml")), help="what is compared"
    )
    parser.add_argument("--arms", nargs="+", default=[], help="some of the arms (default: all)")
    parser.add_argument(
        "--split", choices=SPLITS, default="test", help="use development for choosing a recipe"
    )
    parser.add_argument("--output", default="output/demo_ood", help="folder of the runs")
    parser.add_argument("--workers", type=int, default=2, help="parallel runs, with one thread each")
    parser.add_argument(
        "--weights", action="store_true", help="train again if scores exist but weights do not"
    )
    parser.add_argument("--report", action="store_true", help="write the report of finished runs")
    parser.add_argument("--results", default=str(RESULTS), help="folder of the report")
    parser.add_argument("--redraw", action="store_true", help="write the report from its results.json")
    parser.add_argument("--job", nargs=2, metavar=("ARM", "SEED"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    return cli.guard(_run, args, again=cli.SAME)


if __name__ == "__main__":
    sys.exit(main())
