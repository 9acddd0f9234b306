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
"""Report folders whose table is also in DOCUMENTS, between comments with this name."""
MAIN_ROWS = 5
"""Number of arms, from the start of the plan, in the short table between the comments `<name>-rows`."""
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
    """One way to tune the tower. See arms.yaml."""

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
    """The content of arms.yaml."""

    config: str
    suite: str
    demo_world: dict[str, int]
    arms: dict[str, Arm]
    against: list[str]

    @property
    def seeds(self) -> int:
        """The largest number of seeds of an arm."""
        return max(arm.seeds for arm in self.arms.values())

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Pairs of arms to compare, each once. Arms evaluated on only some families are left out, because their means
        are not comparable."""
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
        ConfigError: the file is broken, or names an unknown entry or arm.
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
                    f"{path}: arm `{name}` is of `{own['of']}`, but no arm before it has this name"
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
        raise ConfigError(f"{path}: is not a valid list of arms ({error!r}); see its comment") from error
    against = content.get("against", [])
    if not set(against) <= set(arms):
        raise ConfigError(f"{path}: against is {against}; expected some of the arms {', '.join(arms)}")
    # A file beside the plan, or a config of the model zoo.
    own = path.parent / content["config"]
    config = str(own) if own.is_file() else get_config_file(content["config"])
    return Plan(config, content.get("suite", "demo"), content["demo_world"], arms, against)


def changed(content: dict[str, Any], classes: int, names: str, seed: int) -> dict[str, Any]:
    """Return COCO annotations for a control.

    Args:
        classes: the number of categories that stay annotated; smaller sets are parts of larger ones. 0: all.
        names: `shuffled`: each category gets the name of another one, sampled again for each seed. "": unchanged.
        seed: of the run.
    """
    categories = list(content["categories"])
    if classes:
        order = np.random.default_rng(0).permutation(len(categories))
        categories = [categories[i] for i in sorted(order[:classes])]
    if names == "shuffled":
        called = [row["name"] for row in categories]
        shift = np.random.default_rng(seed).permutation(len(called))
        # One cycle through all categories in random order, so none keeps its own name.
        other = {shift[i]: called[shift[(i + 1) % len(called)]] for i in range(len(called))}
        categories = [{**row, "name": other[i]} for i, row in enumerate(categories)]
    kept = {row["id"] for row in categories}
    annotations = [row for row in content["annotations"] if row["category_id"] in kept]
    return {**content, "categories": categories, "annotations": annotations}


def image_counts(scenes: Path) -> list[dict[str, int]]:
    """Return the number of training images with each category, in the form of LVIS's metadata, for federated losses."""
    content = files.read_json(DemoData(scenes).instances("train"))
    seen = {(row["category_id"], row["image_id"]) for row in content["annotations"]}
    counts = Counter(category for category, _ in seen)
    ids = sorted(row["id"] for row in content["categories"])
    return [{"id": number, "image_count": counts[number]} for number in ids]


class Runs:
    """The runs of a plan: their folders, their jobs, and the saved results of finished runs."""

    def __init__(self, plan: Plan, output: Path, results: Path, split: str) -> None:
        self.plan, self.output, self.results, self.split = plan, output, results, split
        self.context = Context(split=split)

    def name(self, arm: Arm | None, seed: int) -> str:
        """Return the name of an arm's run with a seed, with a hash of its settings. None: the untuned tower."""
        if arm is None:
            return f"{BASE}-{seed}-{self.tower_sha256[:10]}"
        identity = [arm.opts, arm.interpolate, arm.iteration, self.tower_sha256]
        if arm.first_scene != 1:  # runs from before this entry existed keep their names
            identity.append(arm.first_scene)
        if arm.classes or arm.names:
            identity.append([arm.classes, arm.names])
        digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:10]
        return f"{arm.name.replace(' ', '-')}-{seed}-{digest}"

    def folder(self, arm: Arm | None, seed: int) -> Path:
        """Return the folder of a run. Arms that use another arm's weights have their own folder for the evaluation."""
        return self.output / "runs" / self.name(arm, seed)

    def tasks(self, arm: Arm | None, seed: int) -> list[suite.Task]:
        """Return the benchmarks that can run here. For the untuned tower, only those that depend on the seed."""
        names = arm.suite if arm and arm.suite else self.plan.suite
        classes = [cls for cls in resolve(names) if cls.missing(self.context) is None]
        if arm is None:
            classes = [cls for cls in classes if cls.max_seeds is None or seed < cls.max_seeds]
        return [suite.Task(cls(self.context), [seed], every_seed=True) for cls in classes]

    def job(self, arm: Arm | None, seed: int) -> None:
        """Train and evaluate one run if it is not finished.

        A run with saved scores but without weights is trained again, because other arms need the weights.
        """
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
        """Return scores `[items, k]` by benchmark and the record of a finished run.

        None if the run is not finished, or if benchmarks have changed since.
        """
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
        """Return scores `[seeds, items, k]` by benchmark and the records of an arm's finished seeds, up to the first
        unfinished one. None if the first is not finished."""
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
        """Return the unfinished jobs of arms: first the untuned tower and runs that train, then runs that use other
        runs' weights. The first seeds of all arms come before the second ones.

        Args:
            weights: also include runs with saved scores but without weights.
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
        """Whether the weights of a run exist."""
        return (self.folder(arm, seed) / TRAINED).is_file()

    def scenes(self, arm: Arm) -> Path:
        """Return the demo world that an arm trains on, making it if needed."""
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
        # Keep every checkpoint, for arms that use an intermediate one.
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
        """Write results/logs/NAME.csv: medians of 20 iterations, with losses summed by head."""
        lines = (folder / "lora" / "metrics.json").read_text(encoding="utf-8").splitlines()
        # Index by iteration, because a resumed training has some rows twice.
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
        """Export weights from another arm's run."""
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
        """Hash of the shipped tower. Runs from another tower are different runs."""
        return files.sha256(WEIGHTS_FILE)


def _of_tower(opts: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in opts.items() if key.startswith("MODEL.LORA")}


def results(runs: Runs) -> dict[str, Any]:
    """Compare every arm with the untuned tower, and the plan's `pairs` with each other, on their finished seeds.

    The result has the schema of evaluate_backbone's results.json. Seeds are those of the training; the bootstrap
    samples them like items.

    Raises:
        ConfigError: no arm is finished, or the untuned tower was not evaluated.
    """
    finished = {name: runs.all_kept(arm, arm.seeds) for name, arm in runs.plan.arms.items()}
    finished = {name: kept for name, kept in finished.items() if kept is not None}
    base = runs.all_kept(None, runs.plan.seeds)
    if base is None or not finished:
        raise ConfigError(
            f"{runs.results}/scores: no arm is finished, or the untuned tower was not evaluated; run run.py first"
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
    """Return a table with one row per arm: its difference from the untuned tower in every family, their mean with its
    interval, time and memory. A second table compares the arms in `against` with the others."""
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
    lines += ["", f"The untuned tower: {base}."]
    if found.get("pairs"):
        lines += ["", *_pairs(found["pairs"])]
    return "\n".join(lines) + "\n"


def _pairs(pairs: Sequence[dict[str, Any]]) -> list[str]:
    """Return a table with one row per arm: the means of the arms in `against` minus its own."""
    means = {(pair["first"], pair["second"]): pair["mean"] for pair in pairs}
    firsts = dict.fromkeys(pair["first"] for pair in pairs)
    lines = [
        "Means over families, one arm minus another:",
        "",
        f"| | {' | '.join(f'{markdown.plain(first)} minus this arm | 95 % interval | ' for first in firsts)} |",
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
    """Write results.json, report.md, report.html, forest.png, overview.md, and for PLACES the tables in DOCUMENTS."""
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
    """Return a document with a new overview between the comments `<!-- place -->` and `<!-- /place -->`.

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
    parser.add_argument("--plan", default=str(HERE / "arms.yaml"), help="what is compared")
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
