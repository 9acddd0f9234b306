#!/usr/bin/env python
"""Does stage 2 help where the tower was never tuned? The recipe, and the controls without which a gain means nothing.

    run.py [--arms NAME ...] [--split development] [--output DIR] [--workers N]    train and evaluate what is not
    run.py --report [--split development] [--output DIR] [--results DIR]           table and plot of what is finished

arms.yaml says what is compared. The same command continues where it broke off: a training goes on from its last
checkpoint, an evaluation from its last benchmark. Folders below --output: `demo_world`, `base`, and `runs/ARM-SEED-ID`,
where ID is a hash of the settings. The report goes to `results/` beside this file; `--redraw` makes it again from its
results.json alone.
"""

import argparse
import concurrent.futures
import hashlib
import json
import logging
import os
import resource
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from visft.checkpoint import files
from visft.data.demo_world import dataset
from visft.engine import cli, launch, sweep_plan
from visft.errors import ConfigError, TrainingError
from visft.evaluation.benchmarks import Context, report, resolve, statistics, suite
from visft.evaluation.benchmarks.registry import SPLITS
from visft.evaluation.benchmarks.towers import Tower
from visft.model_zoo import get_config_file

logger = logging.getLogger("visft.experiment")

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TOWER, TAG = "visft-tiny", "demo"
EXPORT = "export/visft_backbone.safetensors"
_ENTRIES = {"label", "seeds", "set", "of", "interpolate", "iteration", "suite"}


@dataclass(frozen=True)
class Arm:
    """One way to tune the tower; see arms.yaml."""

    name: str
    label: str
    seeds: int
    opts: dict[str, Any] = field(default_factory=dict)
    of: str = ""
    interpolate: float | None = None
    iteration: int | None = None
    suite: str = "demo"


@dataclass(frozen=True)
class Plan:
    """What arms.yaml says."""

    config: str
    demo_world: dict[str, int]
    arms: dict[str, Arm]


def read(path: Path) -> Plan:
    """Read arms.yaml.

    Raises:
        ConfigError: it is broken, or names an entry or arm that there is not.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        arms, common = {}, content["settings"]
        for name, entry in content["arms"].items():
            unknown = set(entry) - _ENTRIES
            if unknown:
                raise ConfigError(
                    f"{path}: arm `{name}` has an entry `{min(unknown)}`; known are {', '.join(sorted(_ENTRIES))}"
                )
            own = dict(entry)
            parent = arms.get(own.get("of", ""))
            if own.get("of") and parent is None:
                raise ConfigError(
                    f"{path}: arm `{name}` is of `{own['of']}`, which no arm before it is called"
                )
            opts = {**common, **own.pop("set", {})} if parent is None else parent.opts
            arms[name] = Arm(name, own.pop("label"), own.pop("seeds"), opts, **own)
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: is no readable list of arms ({error!r}); see its comment") from error
    return Plan(content["config"], content["demo_world"], arms)


class Runs:
    """Where the runs of a plan are, and what each has to do."""

    def __init__(self, plan: Plan, output: Path, split: str) -> None:
        self.plan, self.output, self.split = plan, output, split
        self.context = Context(split=split)

    def folder(self, arm: Arm, seed: int) -> Path:
        """Of an arm's run with a seed. Arms of another arm's weights have one of their own for the evaluation."""
        identity = [arm.opts, arm.interpolate, arm.iteration, files.sha256(self._tower())]
        name = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:10]
        return self.output / "runs" / f"{arm.name.replace(' ', '-')}-{seed}-{name}"

    def tasks(self, names: str, seeds: list[int]) -> list[suite.Task]:
        """The benchmarks that can be run here."""
        classes = [cls for cls in resolve(names) if cls.missing(self.context) is None]
        return [suite.Task(cls(self.context), seeds) for cls in classes]

    def evaluate_base(self, seeds: int) -> dict[str, np.ndarray]:
        """Scores `[seeds, items, k]` of the tower as it is."""
        tower = Tower(TOWER, TAG)
        return suite.evaluate(
            tower, self.tasks("demo", list(range(seeds))), self._scores(self.output / "base")
        )

    def job(self, arm: Arm, seed: int) -> None:
        """Train and evaluate one run, as far as it is not done."""
        folder = self.folder(arm, seed)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "trained.json").is_file():
            start = time.monotonic()
            (self._derive if arm.of else self._train)(arm, seed, folder)
            record = {
                "arm": arm.name,
                "seed": seed,
                "opts": arm.opts,
                "seconds": round(time.monotonic() - start),
            }
            record["peak_gb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2)
            files.write_json(folder / "trained.json", record)
        tower = Tower(TOWER, str(folder / EXPORT), label=f"{arm.name}, seed {seed}")
        suite.evaluate(tower, self.tasks(arm.suite, [seed]), self._scores(folder))

    def scores(self, arm: Arm) -> dict[str, np.ndarray] | None:
        """Scores `[seeds, items, k]` of all runs of an arm that are finished, by benchmark; None: not all are."""
        found: dict[str, list[np.ndarray]] = {}
        for seed in range(arm.seeds):
            folder = self.folder(arm, seed)
            if not (folder / "trained.json").is_file():
                return None
            sha256 = files.sha256(folder / EXPORT)
            for task in self.tasks(arm.suite, [seed]):
                scores = suite.stored(self._scores(folder), sha256, task)
                if scores is None:
                    return None
                found.setdefault(task.benchmark.name, []).append(scores[0])
        return {name: np.stack(rows) for name, rows in found.items()}

    def records(self, arm: Arm) -> list[dict[str, Any]]:
        """What each run of an arm took."""
        return [files.read_json(self.folder(arm, seed) / "trained.json") for seed in range(arm.seeds)]

    def _scores(self, folder: Path) -> Path:
        folder = folder / self.split
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _train(self, arm: Arm, seed: int, folder: Path) -> None:
        words = [*sweep_plan.words(arm.opts), "SEED", str(seed), "OUTPUT_DIR", str(folder)]
        status = launch.main(["--config-file", get_config_file(self.plan.config), "--resume", *words])
        if status:
            raise TrainingError(
                f"arm `{arm.name}`, seed {seed}: ended with status {status}; see {folder}/log.txt"
            )

    def _derive(self, arm: Arm, seed: int, folder: Path) -> None:
        """Export weights that another arm's run has kept."""
        source = self.folder(self.plan.arms[arm.of], seed)
        if not (source / "trained.json").is_file():
            raise ConfigError(
                f"arm `{arm.name}` is of `{arm.of}`, whose run {source} is not finished; run it first"
            )
        weights = source / "lora"
        if arm.iteration is not None:
            weights = weights / f"model_{arm.iteration:07d}.safetensors"
        words = ["--config-file", get_config_file(self.plan.config), "--format", "open_clip"]
        words += ["--weights", str(weights), "--output", str(folder / EXPORT)]
        if arm.interpolate is not None:
            words += ["--interpolate", str(arm.interpolate)]
        command = [sys.executable, str(ROOT / "tools" / "export_backbone.py"), *words]
        (folder / EXPORT).parent.mkdir(exist_ok=True)
        done = subprocess.run(
            [*command, *sweep_plan.words(_of_tower(arm.opts))], capture_output=True, text=True
        )
        if done.returncode:
            raise TrainingError(f"arm `{arm.name}`, seed {seed}: {done.stderr.strip().splitlines()[-1]}")

    @staticmethod
    def _tower() -> Path:
        from visft.backbone.open_clip_zoo import TINY_WEIGHTS

        return Path(TINY_WEIGHTS)


def _of_tower(opts: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in opts.items() if key.startswith("MODEL.LORA")}


def results(runs: Runs, pairs: list[tuple[str, str]]) -> dict[str, Any]:
    """Every finished arm against the tower as it is, in the schema of evaluate_backbone's results.json, and `pairs` of
    arms against each other; seeds are those of the training, drawn anew in the bootstrap as items are."""
    finished = {name: runs.scores(arm) for name, arm in runs.plan.arms.items()}
    finished = {name: scores for name, scores in finished.items() if scores is not None}
    most = max(runs.plan.arms[name].seeds for name in finished)
    base = runs.evaluate_base(most)
    benchmarks = {task.benchmark.name: task.benchmark for task in runs.tasks("demo", [0])}

    def against(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> dict[str, Any]:
        names = [name for name in benchmarks if name in first and name in second]
        parts = {}
        for name in names:
            count = min(len(second[name]), max(len(first[name]), len(second[name])))
            before = first[name][np.arange(count) % len(first[name])]
            benchmark = benchmarks[name]
            parts[name] = statistics.compare(
                name, before, second[name][:count], benchmark.figure, item_set=benchmark.item_set
            )
        return suite.compared([benchmarks[name] for name in names], parts)

    tables = {name: against(base, scores) for name, scores in finished.items()}
    found: dict[str, Any] = {
        "schema": suite.SCHEMA,
        "model": TOWER,
        "towers": [{"label": "base", "weights": TAG, "sha256": files.sha256(runs._tower())}],
        "split": runs.split,
        "seeds": most,
        "rule": statistics.RULE,
        "left_out": {},
    }
    for name in finished:
        arm, records = runs.plan.arms[name], runs.records(runs.plan.arms[name])
        found["towers"].append(
            {
                "label": name,
                "weights": arm.label,
                "sha256": files.sha256(runs.folder(arm, 0) / EXPORT),
                "seeds": arm.seeds,
                "opts": arm.opts,
                "train_seconds": float(np.median([record["seconds"] for record in records])),
                "peak_gb": max(record["peak_gb"] for record in records),
            }
        )
    for key in ("families", "mean", "benchmarks"):
        several = {name: table[key] for name, table in tables.items()}
        found[key] = several if len(several) > 1 else next(iter(several.values()))
    found["pairs"] = [
        {"first": first, "second": second, **against(finished[second], finished[first])}
        for first, second in pairs
        if first in finished and second in finished
    ]
    return found


def overview(found: dict[str, Any]) -> str:
    """One row an arm: its difference from the tower as it is in every family, and their mean with its interval."""
    rows = report.comparisons(found)
    names = [row["name"] for row in rows[0][1]["families"]]
    lines = [
        f"| arm | {' | '.join(names)} | mean | 95 % interval | verdict |",
        f"|---|{'---:|' * (len(names) + 2)}---|",
    ]
    marks = {"better": " +", "worse": " -"}
    for label, tables in rows:
        by_name = {row["name"]: row for row in tables["families"]}
        cells = [
            f"{by_name[n]['difference']:+.2f}{marks.get(by_name[n]['verdict'], '')}" if n in by_name else ""
            for n in names
        ]
        mean = tables["mean"]
        cells += [
            f"{mean['difference']:+.2f}",
            f"{mean['low']:+.2f} to {mean['high']:+.2f}",
            mean["verdict"] or "",
        ]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    for pair in found.get("pairs", []):
        mean = pair["mean"]
        lines += [
            "",
            f"{pair['first']} less {pair['second']}, mean over families: {mean['difference']:+.2f} ",
        ]
        lines[-1] += f"({mean['low']:+.2f} to {mean['high']:+.2f}): {mean['verdict'] or 'not shown'}."
    return "\n".join(lines) + "\n"


def write(found: dict[str, Any], folder: Path) -> None:
    """results.json, report.md, report.html, forest.png, and overview.md."""
    folder.mkdir(parents=True, exist_ok=True)
    report.write(found, folder)
    with files.write_aside(folder / "overview.md") as partial:
        partial.write_text(overview(found), encoding="utf-8")


def _run(args: argparse.Namespace) -> None:
    plan = read(Path(args.plan))
    if args.redraw:
        write(files.read_json(Path(args.results) / "results.json"), Path(args.results))
        return
    output = Path(args.output).resolve()
    runs = Runs(plan, output, args.split)
    for name in args.arms:
        if name not in plan.arms:
            raise ConfigError(f"--arms: there is no arm `{name}`; there are {', '.join(plan.arms)}")
    dataset.make(output / "demo_world", num_train=plan.demo_world["train"], num_val=plan.demo_world["val"])
    dataset.register(output / "demo_world")
    os.environ["VISFT_DEMO_DATA"] = str(output / "demo_world")
    if args.job:
        name, seed = args.job
        runs.job(plan.arms[name], int(seed))
        return
    if args.report:
        found = results(runs, [("recipe", name) for name in plan.arms if name != "recipe"])
        write(found, Path(args.results))
        logger.info("%s", overview(found))
        return
    arms = [plan.arms[name] for name in args.arms or plan.arms]
    # Trainings first: others are of their weights. The first seeds of all arms come before the second ones.
    jobs = sorted(
        ((arm, seed) for arm in arms for seed in range(arm.seeds)), key=lambda job: (bool(job[0].of), job[1])
    )
    failed = []
    with concurrent.futures.ThreadPoolExecutor(args.workers) as pool:
        for (arm, seed), status in zip(jobs, pool.map(lambda job: _process(args, *job), jobs), strict=True):
            if status:
                failed.append(f"{arm.name}, seed {seed}")
    if failed:
        raise TrainingError(f"failed: {'; '.join(failed)}; the same command tries them again")


def _process(args: argparse.Namespace, arm: Arm, seed: int) -> int:
    """A job in a process of its own, with one thread: two of them beside each other do more than one with two."""
    command = [sys.executable, __file__, "--plan", args.plan, "--output", args.output, "--split", args.split]
    log = Path(args.output) / "logs" / f"{arm.name.replace(' ', '-')}-{seed}-{args.split}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with open(log, "w") as file:
        done = subprocess.run(
            [*command, "--job", arm.name, str(seed)],
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    logger.info("%s, seed %d: status %d, %.0f s", arm.name, seed, done.returncode, time.monotonic() - start)
    return done.returncode


def main() -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plan", default=str(HERE / "arms.yaml"), help="what is compared")
    parser.add_argument("--arms", nargs="+", default=[], help="some of them; left out: all")
    parser.add_argument("--split", choices=SPLITS, default="test", help="development: to choose a recipe by")
    parser.add_argument("--output", default="output/demo_ood", help="folder of the runs")
    parser.add_argument("--workers", type=int, default=2, help="runs beside each other, of one thread each")
    parser.add_argument("--report", action="store_true", help="write the report of what is finished")
    parser.add_argument("--results", default=str(HERE / "results"), help="folder of the report")
    parser.add_argument("--redraw", action="store_true", help="write the report again from its results.json")
    parser.add_argument("--job", nargs=2, metavar=("ARM", "SEED"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    return cli.guard(_run, args)


if __name__ == "__main__":
    sys.exit(main())
