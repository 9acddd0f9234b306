#!/usr/bin/env python
"""Does stage 2 help where the tower was never tuned? The recipe, and the controls without which a gain means nothing.

    run.py [--arms NAME ...] [--split development] [--output DIR] [--workers N]    train and evaluate what is not
    run.py --arms NAME ... --weights                                               train it again, for its weights
    run.py --report [--split development] [--results DIR]                          table and plot of what is finished

arms.yaml says what is compared. The same command continues where it broke off: a training goes on from its last
checkpoint, an evaluation from its last benchmark. Folders below --output: `demo_world_FIRST-SCENE` and
`runs/ARM-SEED-ID`, where ID is a hash of the settings. The scores of a finished run go to `results/scores/` beside this
file and its losses to `results/logs/`, so that they outlive --output; such a run is not repeated unless its weights are
asked for, and the report needs nothing else. `--redraw` makes the report again from its results.json alone.
"""

import argparse
import concurrent.futures
import csv
import functools
import hashlib
import itertools
import json
import logging
import os
import re
import resource
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from detectron2.data import MetadataCatalog

from demoworld.dataset import DemoData
from demoworld.tower import WEIGHTS_FILE
from towerbench import Context, report, resolve, statistics, suite
from towerbench.arguments import SPLITS
from visft.applications.compared_towers import load
from visft.checkpoint import files
from visft.data.datasets import demo_world
from visft.engine import launch, settings
from visft.errors import ConfigError, TrainingError
from visft.model_zoo import get_config_file
from visft.utils import cli, markdown

logger = logging.getLogger("visft.experiment")

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RESULTS, DOCUMENTS = HERE / "results", (ROOT / "docs" / "experiments.md", ROOT / "MODEL_ZOO.md")
PLACES = {RESULTS: "experiment", RESULTS / "region_text": "region-text"}
"""Folders of reports whose table is also in DOCUMENTS, between comments of this name."""
MAIN_ROWS = 5
"""How many arms, the first ones of the plan, are in the short table between comments `<name>-rows`."""
TOWER, TAG, BASE = "visft-tiny", "demo", "base"
RECORD, TRAINED = "record", "trained.json"
EXPORT = "export/visft_backbone.safetensors"
_ENTRIES = {
    "label",
    "seeds",
    "set",
    "first_scene",
    "classes",
    "names",
    "of",
    "interpolate",
    "iteration",
    "suite",
}


@dataclass(frozen=True)
class Arm:
    """One way to tune the tower; see arms.yaml."""

    name: str
    label: str
    seeds: int
    opts: dict[str, Any] = field(default_factory=dict)
    first_scene: int = 1
    classes: int = 0
    names: str = ""
    of: str = ""
    interpolate: float | None = None
    iteration: int | None = None
    suite: str = ""


@dataclass(frozen=True)
class Plan:
    """What arms.yaml says."""

    config: str
    suite: str
    demo_world: dict[str, int]
    arms: dict[str, Arm]
    against: list[str]

    @property
    def seeds(self) -> int:
        """The most that an arm has."""
        return max(arm.seeds for arm in self.arms.values())

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Arms that are compared with each other, each pair once; none that is evaluated on some families alone, whose
        means over families are of other things."""
        whole = [arm.name for arm in self.arms.values() if not arm.suite]
        return [
            (first, second)
            for number, first in enumerate(self.against)
            for second in whole
            if second != first and second not in self.against[:number]
        ]


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
            if parent is None:
                opts = {**common, **own.pop("set", {})}
                first_scene = own.pop("first_scene", content["demo_world"]["first"])
            else:
                opts, first_scene = parent.opts, parent.first_scene
            arms[name] = Arm(name, own.pop("label"), own.pop("seeds"), opts, first_scene, **own)
            if arms[name].names not in ("", "shuffled"):
                raise ConfigError(f"{path}: arm `{name}` has names `{arms[name].names}`; known is `shuffled`")
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: is no readable list of arms ({error!r}); see its comment") from error
    against = content.get("against", [])
    if not set(against) <= set(arms):
        raise ConfigError(f"{path}: against: {against} are not all arms; there are {', '.join(arms)}")
    # A file beside the plan, or a config of the model zoo.
    own = path.parent / content["config"]
    config = str(own) if own.is_file() else get_config_file(content["config"])
    return Plan(config, content.get("suite", "demo"), content["demo_world"], arms, against)


def changed(content: dict[str, Any], classes: int, names: str, seed: int) -> dict[str, Any]:
    """COCO's annotations for a control.

    Args:
        classes: how many of the categories stay annotated, fewer being part of more; 0: all.
        names: `shuffled`: each category is called by the name of another, drawn anew for each seed; "": as it is.
        seed: of the run.
    """
    categories = list(content["categories"])
    if classes:
        order = np.random.default_rng(0).permutation(len(categories))
        categories = [categories[i] for i in sorted(order[:classes])]
    if names == "shuffled":
        called = [row["name"] for row in categories]
        shift = np.random.default_rng(seed).permutation(len(called))
        # One cycle through all of them in a random order: none keeps its own.
        other = {shift[i]: called[shift[(i + 1) % len(called)]] for i in range(len(called))}
        categories = [{**row, "name": other[i]} for i, row in enumerate(categories)]
    kept = {row["id"] for row in categories}
    annotations = [row for row in content["annotations"] if row["category_id"] in kept]
    return {**content, "categories": categories, "annotations": annotations}


def image_counts(scenes: Path) -> list[dict[str, int]]:
    """In how many training images each category is, as LVIS's metadata say it; for federated losses."""
    content = files.read_json(DemoData(scenes).instances("train"))
    seen = {(row["category_id"], row["image_id"]) for row in content["annotations"]}
    counts = Counter(category for category, _ in seen)
    ids = sorted(row["id"] for row in content["categories"])
    return [{"id": number, "image_count": counts[number]} for number in ids]


class Runs:
    """Where the runs of a plan are, what each has to do, and what is kept of those that are finished."""

    def __init__(self, plan: Plan, output: Path, results: Path, split: str) -> None:
        self.plan, self.output, self.results, self.split = plan, output, results, split
        self.context = Context(split=split)

    def name(self, arm: Arm | None, seed: int) -> str:
        """Of an arm's run with a seed, with a hash of all that decides it; None: the tower as it is."""
        if arm is None:
            return f"{BASE}-{seed}-{self.tower_sha256[:10]}"
        identity = [arm.opts, arm.interpolate, arm.iteration, self.tower_sha256]
        if arm.first_scene != 1:  # runs of before there was this entry keep their names
            identity.append(arm.first_scene)
        if arm.classes or arm.names:
            identity.append([arm.classes, arm.names])
        digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:10]
        return f"{arm.name.replace(' ', '-')}-{seed}-{digest}"

    def folder(self, arm: Arm | None, seed: int) -> Path:
        """Of a run. Arms of another arm's weights have one of their own for the evaluation."""
        return self.output / "runs" / self.name(arm, seed)

    def tasks(self, arm: Arm | None, seed: int) -> list[suite.Task]:
        """The benchmarks that can be run here; of the tower as it is those where the seed makes a difference."""
        names = arm.suite if arm and arm.suite else self.plan.suite
        classes = [cls for cls in resolve(names) if cls.missing(self.context) is None]
        if arm is None:
            classes = [cls for cls in classes if cls.max_seeds is None or seed < cls.max_seeds]
        return [suite.Task(cls(self.context), [seed], every_seed=True) for cls in classes]

    def job(self, arm: Arm | None, seed: int) -> None:
        """Train and evaluate one run, as far as it is not done. One whose scores are kept is trained again where its
        weights are gone: other arms are of them."""
        folder = self.folder(arm, seed)
        folder.mkdir(parents=True, exist_ok=True)
        record = {"arm": arm.name if arm else BASE, "seed": seed, "tower": self.tower_sha256}
        if arm is not None:
            record |= self._trained(arm, seed, folder)
        if arm is not None and not arm.of:
            self._keep_log(arm, seed, folder)
        if self.kept(arm, seed) is not None:
            return
        if arm is None:
            tower = load(TOWER, TAG)
        else:
            tower = load(TOWER, str(folder / EXPORT), label=f"{arm.name}, seed {seed}")
        tasks = self.tasks(arm, seed)
        start = time.monotonic()
        (folder / self.split).mkdir(exist_ok=True)
        scores = suite.evaluate(tower, tasks, folder / self.split)
        record["evaluation_seconds"] = round(time.monotonic() - start)
        record["fingerprints"] = {task.benchmark.name: task.fingerprint() for task in tasks}
        file = self._kept_file(arm, seed)
        file.parent.mkdir(parents=True, exist_ok=True)
        with files.write_aside(file) as partial, open(partial, "wb") as stream:
            arrays = {name: rows[0].astype(np.float32) for name, rows in scores.items()}
            np.savez_compressed(stream, **{RECORD: np.array(json.dumps(record))}, **arrays)

    def kept(self, arm: Arm | None, seed: int) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
        """Scores `[items, k]` by benchmark, and the record, of a finished run; None: it is not, or benchmarks have
        changed since."""
        file = self._kept_file(arm, seed)
        if not file.is_file():
            return None
        with np.load(file, allow_pickle=False) as content:
            scores = {name: content[name].astype(np.float64) for name in content.files if name != RECORD}
            record = json.loads(str(content[RECORD]))
        if record["fingerprints"] != {
            task.benchmark.name: task.fingerprint() for task in self.tasks(arm, seed)
        }:
            return None
        return scores, record

    def all_kept(self, arm: Arm | None, seeds: int) -> tuple[dict[str, np.ndarray], list[dict]] | None:
        """Scores `[seeds, items, k]` by benchmark, and the records, of the first of an arm's seeds as far as they are
        finished; None: the first is not."""
        every = (self.kept(arm, seed) for seed in range(seeds))
        runs = list(itertools.takewhile(lambda run: run is not None, every))
        if not runs:
            return None
        scores = {name: np.stack([found[name] for found, _ in runs if name in found]) for name in runs[0][0]}
        return scores, [record for _, record in runs]

    def _kept_file(self, arm: Arm | None, seed: int) -> Path:
        return self.results / "scores" / self.split / f"{self.name(arm, seed)}.npz"

    def phases(
        self, arms: Sequence[Arm], *, weights: bool = False
    ) -> tuple[list[tuple[Arm | None, int]], list[tuple[Arm | None, int]]]:
        """What is left to do for arms: first runs that train and the tower as it is, then those that are of other runs'
        weights. The first seeds of all arms come before the second ones.

        Args:
            weights: runs whose scores are kept and whose weights are gone count as left.
        """
        left = [(arm, seed) for seed in range(self.plan.seeds) for arm in arms if seed < arm.seeds]
        left = [job for job in left if self.kept(*job) is None or (weights and not self.is_trained(*job))]
        derived = [job for job in left if job[0].of]
        own = [job for job in left if not job[0].of]
        for arm, seed in derived:
            source = self.plan.arms[arm.of], seed
            if source not in own and not self.is_trained(*source):
                own.append(source)
        bases = [(None, seed) for seed in range(self.plan.seeds) if self.kept(None, seed) is None]
        return bases + own, derived

    def _trained(self, arm: Arm, seed: int, folder: Path) -> dict[str, Any]:
        file = folder / TRAINED
        if not file.is_file():
            start = time.monotonic()
            (self._derive if arm.of else self._train)(arm, seed, folder)
            record = {"opts": arm.opts, "train_seconds": round(time.monotonic() - start)}
            record["peak_gb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2)
            record["weights"] = files.sha256(folder / EXPORT)
            files.write_json(file, record)
        return files.read_json(file)

    def is_trained(self, arm: Arm, seed: int) -> bool:
        """Whether the weights of a run are here."""
        return (self.folder(arm, seed) / TRAINED).is_file()

    def scenes(self, arm: Arm) -> Path:
        """The demo world that an arm trains on, made if need be."""
        numbers = self.plan.demo_world
        folder = self.output / f"demo_world_{arm.first_scene}"
        demo_world.make(
            folder, num_train=numbers["train"], num_val=numbers["val"], first_train=arm.first_scene
        )
        return folder

    def _train(self, arm: Arm, seed: int, folder: Path) -> None:
        scenes = self.scenes(arm)
        demo_world.register(scenes)
        os.environ["VISFT_DEMO_DATA"] = str(scenes)
        MetadataCatalog.get(demo_world.NAMES["train"]).class_image_count = image_counts(scenes)
        # Every checkpoint stays, for arms that are of one on the way.
        words = [*settings.words(arm.opts), "VISFT.SOLVER.LORA.KEEP_CHECKPOINTS", "0"]
        if arm.classes or arm.names:
            data = DemoData(scenes)
            content = changed(files.read_json(data.instances("train")), arm.classes, arm.names, seed)
            files.write_json(folder / "instances.json", content)
            words += ["VISFT.DATA.TRAIN_JSON", str(folder / "instances.json")]
            words += ["VISFT.DATA.TRAIN_IMAGES", str(data.images("train"))]
        words += ["SEED", str(seed), "OUTPUT_DIR", str(folder)]
        status = launch.train_config(self.plan.config, words, resume=True)
        if status:
            raise TrainingError(
                f"arm `{arm.name}`, seed {seed}: ended with status {status}; see {folder}/log.txt"
            )

    def _keep_log(self, arm: Arm, seed: int, folder: Path) -> None:
        """Write results/logs/NAME.csv: medians of 20 iterations, losses added up by head."""
        lines = (folder / "lora" / "metrics.json").read_text(encoding="utf-8").splitlines()
        # By iteration: where a training was continued, some come twice.
        rows = {row["iteration"]: row for row in map(json.loads, lines) if "total_loss" in row}
        file = self.results / "logs" / f"{self.name(arm, seed)}.csv"
        file.parent.mkdir(parents=True, exist_ok=True)
        with files.write_aside(file) as partial, open(partial, "w", newline="", encoding="utf-8") as stream:
            heads = sorted({key.split("/")[0] for row in rows.values() for key in row if "/" in key})
            table = csv.writer(stream, lineterminator="\n")
            table.writerow(["iteration", "lr", "grad_norm", "total_loss", *heads])
            for iteration, row in sorted(rows.items()):
                sums = [
                    sum(value for key, value in row.items() if key.startswith(f"{head}/")) for head in heads
                ]
                figures = [row["lr"], row["grad_norm"], row["total_loss"], *sums]
                table.writerow([iteration + 1, *(f"{figure:.5g}" for figure in figures)])

    def _derive(self, arm: Arm, seed: int, folder: Path) -> None:
        """Export weights that another arm's run has kept."""
        source = self.folder(self.plan.arms[arm.of], seed)
        if not self.is_trained(self.plan.arms[arm.of], seed):
            raise ConfigError(
                f"arm `{arm.name}` is of `{arm.of}`, whose run {source} is not finished; run it first"
            )
        weights = source / "lora"
        if arm.iteration is not None:
            weights = weights / f"model_{arm.iteration:07d}.safetensors"
        words = ["--config-file", self.plan.config, "--format", "open_clip"]
        words += ["--weights", str(weights), "--output", str(folder / EXPORT)]
        if arm.interpolate is not None:
            words += ["--interpolate", str(arm.interpolate)]
        command = [sys.executable, str(ROOT / "tools" / "export_backbone.py"), *words]
        (folder / EXPORT).parent.mkdir(exist_ok=True)
        done = subprocess.run(
            [*command, *settings.words(_of_tower(arm.opts))], capture_output=True, text=True
        )
        if done.returncode:
            raise TrainingError(f"arm `{arm.name}`, seed {seed}: {done.stderr.strip().splitlines()[-1]}")

    @functools.cached_property
    def tower_sha256(self) -> str:
        """Of the shipped tower: what was tuned from another one is another run."""
        return files.sha256(WEIGHTS_FILE)


def _of_tower(opts: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in opts.items() if key.startswith("MODEL.LORA")}


def results(runs: Runs) -> dict[str, Any]:
    """Every arm, with the seeds that are finished, against the tower as it is, in the schema of evaluate_backbone's
    results.json, and the plan's `pairs` of arms against each other; seeds are those of the training, drawn anew in the
    bootstrap as items are.

    Raises:
        ConfigError: no arm is finished, or the tower as it is was not evaluated.
    """
    finished = {name: runs.all_kept(arm, arm.seeds) for name, arm in runs.plan.arms.items()}
    finished = {name: kept for name, kept in finished.items() if kept is not None}
    base = runs.all_kept(None, runs.plan.seeds)
    if base is None or not finished:
        raise ConfigError(
            f"{runs.results}/scores: no arm is finished, or the tower as it is was not evaluated; run.py does both"
        )
    benchmarks = {task.benchmark.name: task.benchmark for task in runs.tasks(None, 0)}

    def against(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> dict[str, Any]:
        names = [name for name in benchmarks if name in first and name in second]
        parts = {
            name: statistics.compare(
                name,
                first[name],
                second[name],
                benchmarks[name].figure,
                item_set=benchmarks[name].item_set,
                seed_set="training",
            )
            for name in names
        }
        return suite.compared([benchmarks[name] for name in names], parts)

    def against_base(scores: dict[str, np.ndarray]) -> dict[str, Any]:
        rows = {name: base[0][name][np.arange(len(of)) % len(base[0][name])] for name, of in scores.items()}
        return against(rows, scores)

    def against_each_other(first: str, second: str) -> dict[str, Any]:
        seeds = min(len(finished[name][1]) for name in (first, second))
        cut = [{n: rows[:seeds] for n, rows in finished[name][0].items()} for name in (second, first)]
        return against(*cut)

    tables = {name: against_base(scores) for name, (scores, _) in finished.items()}
    found: dict[str, Any] = {
        "schema": suite.SCHEMA,
        "model": TOWER,
        "towers": [{"label": "base", "weights": TAG, "sha256": runs.tower_sha256}],
        "split": runs.split,
        "seeds": max(len(records) for _, records in finished.values()),
        "rule": statistics.RULE,
        "left_out": {},
    }
    for name, (_, records) in finished.items():
        arm = runs.plan.arms[name]
        found["towers"].append(
            {
                "label": name,
                "weights": arm.label,
                "sha256": records[0]["weights"],
                "seeds": len(records),
                "opts": arm.opts,
                "first_scene": arm.first_scene,
                "train_seconds": float(np.median([record["train_seconds"] for record in records])),
                "evaluation_seconds": float(np.median([record["evaluation_seconds"] for record in records])),
                "peak_gb": max(record["peak_gb"] for record in records),
            }
        )
    for key in ("families", "mean", "benchmarks"):
        several = {name: table[key] for name, table in tables.items()}
        found[key] = several if len(several) > 1 else next(iter(several.values()))
    found["pairs"] = [
        {"first": first, "second": second, **against_each_other(first, second)}
        for first, second in runs.plan.pairs
        if first in finished and second in finished
    ]
    return found


def overview(found: dict[str, Any]) -> str:
    """One row an arm: its difference from the tower as it is in every family, their mean with its interval, and what it
    took; then the first arms against the others."""
    rows, towers = report.comparisons(found), {tower["label"]: tower for tower in found["towers"]}
    names = [row["name"] for row in rows[0][1]["families"]]
    lines = [
        f"| arm | seeds | {' | '.join(names)} | mean | 95 % interval | | training, s | GB |",
        f"|---|{'---:|' * (len(names) + 2)}---|---|---:|---:|",
    ]
    for label, tables in rows:
        tower, mean = towers[label], tables["mean"]
        by_name = {row["name"]: row for row in tables["families"]}
        cells = [
            markdown.plain(label),
            str(tower["seeds"]),
            *(_difference(by_name.get(name)) for name in names),
        ]
        cells.append(
            f"{mean['difference']:+.2f}" + ("" if len(by_name) == len(names) else f" of {len(by_name)}")
        )
        cells += [
            _interval(mean),
            mean["verdict"] or "",
            f"{tower['train_seconds']:.0f}",
            f"{tower['peak_gb']:.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    base = ", ".join(f"{row['name']} {row['base']:.1f}" for row in rows[0][1]["families"])
    lines += ["", f"The tower as it is: {base}."]
    if found.get("pairs"):
        lines += ["", *_pairs(found["pairs"])]
    return "\n".join(lines) + "\n"


def _pairs(pairs: Sequence[dict[str, Any]]) -> list[str]:
    """One row an arm: the means of those in `against` less its own."""
    means = {(pair["first"], pair["second"]): pair["mean"] for pair in pairs}
    firsts = dict.fromkeys(pair["first"] for pair in pairs)
    lines = [
        "Means over families, of an arm less another:",
        "",
        f"| | {' | '.join(f'{markdown.plain(first)} less it | 95 % interval | ' for first in firsts)} |",
        f"|---|{'---:|---|---|' * len(firsts)}",
    ]
    for second in dict.fromkeys(pair["second"] for pair in pairs):
        cells = [markdown.plain(second)]
        for first in firsts:
            mean = means.get((first, second))
            cells += (
                [f"{mean['difference']:+.2f}", _interval(mean), mean["verdict"] or ""] if mean else [""] * 3
            )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _difference(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    mark = {"better": "**", "worse": "_"}.get(row["verdict"], "")
    return f"{mark}{row['difference']:+.2f}{mark}"


def _interval(row: dict[str, Any]) -> str:
    return f"{row['low']:+.2f} to {row['high']:+.2f}"


def write(found: dict[str, Any], folder: Path) -> None:
    """results.json, report.md, report.html, forest.png, overview.md, and, of PLACES, the tables in DOCUMENTS."""
    folder.mkdir(parents=True, exist_ok=True)
    report.write(found, folder)
    with files.write_aside(folder / "overview.md") as partial:
        partial.write_text(overview(found), encoding="utf-8")
    place = PLACES.get(folder.resolve())
    if place:
        for document in DOCUMENTS:
            text = filled(document.read_text(encoding="utf-8"), found, place)
            with files.write_aside(document) as partial:
                partial.write_text(text, encoding="utf-8")


def filled(document: str, found: dict[str, Any], place: str) -> str:
    """A document with the overview between the comments `<!-- place -->` and `<!-- /place -->` made anew.

    Between `<!-- place-rows -->` and its end are only the rows of the first arms.
    """
    whole = overview(found)
    rows = "".join(whole.splitlines(keepends=True)[: 2 + MAIN_ROWS])
    for name, text in ((place, whole), (f"{place}-rows", rows)):
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.S)
        document = pattern.sub(lambda at, text=text: f"{at[1]}{text}{at[2]}", document)
    return document


def _run(args: argparse.Namespace) -> None:
    plan = read(Path(args.plan))
    if args.redraw:
        write(files.read_json(Path(args.results) / "results.json"), Path(args.results))
        return
    output = Path(args.output).resolve()
    runs = Runs(plan, output, Path(args.results), args.split)
    for name in args.arms:
        if name not in plan.arms:
            raise ConfigError(f"--arms: there is no arm `{name}`; there are {', '.join(plan.arms)}")
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
            runs.scenes(arm)  # here, so that no two jobs make the same
        with concurrent.futures.ThreadPoolExecutor(args.workers) as pool:
            statuses = pool.map(lambda job: _process(args, *job), jobs)
            for (arm, seed), status in zip(jobs, statuses, strict=True):
                if status:
                    failed.append(f"{arm.name if arm else BASE}, seed {seed}")
    if failed:
        raise TrainingError(f"failed: {'; '.join(failed)}; the same command tries them again")


def _process(args: argparse.Namespace, arm: Arm | None, seed: int) -> int:
    """A job in a process of its own, with one thread: two of them beside each other do more than one with two."""
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
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plan", default=str(HERE / "arms.yaml"), help="what is compared")
    parser.add_argument("--arms", nargs="+", default=[], help="some of them; left out: all")
    parser.add_argument("--split", choices=SPLITS, default="test", help="development: to choose a recipe by")
    parser.add_argument("--output", default="output/demo_ood", help="folder of the runs")
    parser.add_argument("--workers", type=int, default=2, help="runs beside each other, of one thread each")
    parser.add_argument(
        "--weights", action="store_true", help="train again where scores are kept and weights are gone"
    )
    parser.add_argument("--report", action="store_true", help="write the report of what is finished")
    parser.add_argument("--results", default=str(RESULTS), help="folder of the report")
    parser.add_argument("--redraw", action="store_true", help="write the report again from its results.json")
    parser.add_argument("--job", nargs=2, metavar=("ARM", "SEED"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    return cli.guard(_run, args, again=cli.SAME)


if __name__ == "__main__":
    sys.exit(main())
