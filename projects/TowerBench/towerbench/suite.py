"""Runs benchmarks on towers, tower by tower, benchmark by benchmark, seed by seed. Finished parts are not repeated."""

import hashlib
import io
import json
import logging
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from demoworld import files
from towerbench import statistics
from towerbench.errors import CheckpointError
from towerbench.features import FeatureStore, Images
from towerbench.registry import FAMILIES, Benchmark, Context
from towerbench.towers import Tower

logger = logging.getLogger(__name__)

SCHEMA = 1
SCORES = "scores"

IMAGE_SECONDS = 0.0085
"""Seconds for an image of the native size to be made and to pass the tower, like `Benchmark.readout_seconds`."""


@dataclass(frozen=True)
class Entry:
    """A tower to compare: its label, and the tag or file of its CLIP."""

    label: str
    pretrained: str


def run(
    name: str,
    towers: Sequence[Entry],
    benchmarks: Sequence[type[Benchmark]],
    context: Context,
    *,
    seeds: int,
    output: str | os.PathLike,
    load: Callable[..., Tower] = Tower.load,
) -> dict[str, Any]:
    """Evaluate, compare with the first tower, and return the content of `results.json`.

    Args:
        name: open_clip's name of the architecture.
        towers: the first is the base.
        seeds: 0 to seeds - 1 are used.
        output: folder for `scores/TOWER/BENCHMARK.safetensors`, from which an interrupted run continues.
        load: makes a tower from the name of an architecture, a tag or file, and a label, like `Tower.load`.

    Raises:
        TowerBenchError: a tower or data set is broken.
    """
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    ready, left_out = [], {}
    for cls in benchmarks:
        reason = cls.missing(context)
        if reason:
            left_out[cls.name] = reason
        else:
            ready.append(Task(cls(context), range(seeds)))
    about, scores = [], {}
    texts: dict[str, dict] = {}
    progress = Progress(len(towers) * _seconds(ready))
    for entry in towers:
        tower = load(name, entry.pretrained, label=entry.label)
        about.append({"label": entry.label, "weights": entry.pretrained, "sha256": tower.sha256})
        if not tower.has_map:
            whole = _seconds(ready)
            for task in [task for task in ready if task.needs_map]:
                left_out[task.benchmark.name] = f"{name} is no plain vision transformer"
                logger.info("not run: %s: %s", task.benchmark.name, left_out[task.benchmark.name])
                ready.remove(task)
            progress.skip(len(towers) * (whole - _seconds(ready)))
        shared = texts.setdefault(tower.text_sha256, {})
        scores[entry.label] = evaluate(tower, ready, output, shared, progress)
        del tower
    progress.close()
    logger.info("evaluated in %s", progress.format_interval(progress.format_dict["elapsed"]))
    return _results(name, about, [task.benchmark for task in ready], scores, context, seeds, left_out)


class Task:
    """A benchmark with its sets of images for every seed.

    Args:
        seeds: the requested seeds. A benchmark with fewer seeds takes them modulo its number.
        every_seed: train readouts for every seed, too, however long it takes (`quick_seeds` is ignored).
    """

    def __init__(self, benchmark: Benchmark, seeds: Sequence[int], *, every_seed: bool = False) -> None:
        self.benchmark = benchmark
        limits = [benchmark.max_seeds, None if every_seed else benchmark.quick_seeds]
        most = min((limit for limit in limits if limit is not None), default=None)
        self.seeds = sorted({seed if most is None else seed % most for seed in seeds})
        self.sets = [dict(benchmark.images(seed)) for seed in self.seeds]

    @property
    def images(self) -> list[Images]:
        return [images for named in self.sets for images in named.values()]

    @property
    def needs_map(self) -> bool:
        return any(images.dense or images.scale != 1 for images in self.images)

    def fingerprint(self) -> str:
        """Hash of everything but the tower that affects the scores."""
        cls = type(self.benchmark)
        sets = [[(n, *p.identity, p.count, p.dense) for n, p in named.items()] for named in self.sets]
        parts = [cls.name, cls.version, self.benchmark.context.split, self.seeds, sets]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _seconds(tasks: Sequence[Task]) -> float:
    """Return the cost of tasks for a tower: each image once, and every readout."""
    passed = {images.identity: images for task in tasks for images in task.images}
    readouts = sum(task.benchmark.readout_seconds * len(task.seeds) for task in tasks)
    return readouts + sum(_passing_seconds(images, images.count) for images in passed.values())


def _passing_seconds(images: Images, count: int) -> float:
    """Return the cost of `count` images of a set."""
    return IMAGE_SECONDS * images.scale**2 * count


def evaluate(
    tower: Tower,
    tasks: Sequence[Task],
    output: Path,
    texts: dict[str, torch.Tensor] | None = None,
    progress: "Progress | None" = None,
) -> dict[str, np.ndarray]:
    """Return scores `[seeds, items, k]` of one tower by benchmark. Those in `output` are not computed again.

    Args:
        tasks: whose data exist.
        texts: text embeddings, shared among towers of one text tower.
        progress: None: a new one.
    """
    progress = Progress(_seconds(tasks)) if progress is None else progress
    folder = output / SCORES / tower.sha256[:16]
    folder.mkdir(parents=True, exist_ok=True)
    files.remove_leftovers(folder)
    found = {task.benchmark.name: _read(folder, task) for task in tasks}
    open_tasks = [task for task in tasks if found[task.benchmark.name] is None]
    progress.skip(_seconds(tasks) - _seconds(open_tasks))
    for task in tasks:
        if task not in open_tasks:
            progress.say(f"{tower.label}: {task.benchmark.name}: finished before")
    users = Counter(images.identity for task in open_tasks for images in task.images)
    announced = [images for task in open_tasks for images in task.images]

    def passed(images: Images, count: int) -> None:
        progress.update(_passing_seconds(images, count))

    store = FeatureStore(tower, announced, folder=output, texts=texts, progress=passed)
    try:
        for task in open_tasks:
            rows = []
            for seed, sets in zip(task.seeds, task.sets, strict=True):
                progress.say(f"{tower.label}: {task.benchmark.name}, seed {seed}")
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(seed)
                    scores = np.asarray(task.benchmark.items(store, sets, seed), dtype=np.float64)
                rows.append(scores.reshape(len(scores), -1))
                progress.update(task.benchmark.readout_seconds)
                users.subtract(images.identity for images in sets.values())
                for images in sets.values():
                    if users[images.identity] == 0:
                        store.release(images)
            found[task.benchmark.name] = np.stack(rows)
            _write(folder, task, found[task.benchmark.name])
    finally:
        store.close()
    return found


def _file(folder: Path, task: Task) -> Path:
    return folder / f"{task.benchmark.name.replace('/', '-')}.safetensors"


def _read(folder: Path, task: Task) -> np.ndarray | None:
    file = _file(folder, task)
    if not file.is_file():
        return None
    try:
        with safe_open(file, framework="np") as content:
            same = content.metadata()["fingerprint"] == task.fingerprint()
            return content.get_tensor("scores") if same else None
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file}: is no whole file of scores ({error}); remove it") from error


def _write(folder: Path, task: Task, scores: np.ndarray) -> None:
    metadata = {"fingerprint": task.fingerprint(), "benchmark": task.benchmark.name}
    files.write_tensors(_file(folder, task), {"scores": torch.from_numpy(scores)}, metadata)


# ---------------------------------------------------------------- results


def _results(
    name: str,
    about: list[dict],
    benchmarks: Sequence[Benchmark],
    scores: dict[str, dict[str, np.ndarray]],
    context: Context,
    seeds: int,
    left_out: dict[str, str],
) -> dict[str, Any]:
    base, *others = [entry["label"] for entry in about]
    tables = {}
    for other in others or [None]:
        parts = {
            benchmark.name: statistics.compare(
                benchmark.name,
                scores[base][benchmark.name],
                scores[other][benchmark.name] if other else None,
                benchmark.figure,
                item_set=benchmark.item_set,
            )
            for benchmark in benchmarks
        }
        tables[other] = compared(benchmarks, parts)
    found = {
        "schema": SCHEMA,
        "model": name,
        "towers": about,
        "split": context.split,
        "seeds": seeds,
        "rule": statistics.RULE,
        "left_out": left_out,
    }
    for key in ("families", "mean", "benchmarks"):
        several = {other: table[key] for other, table in tables.items()}
        found[key] = several if len(others) > 1 else next(iter(several.values()))
    return found


def compared(benchmarks: Sequence[Benchmark], parts: dict[str, statistics.Comparison]) -> dict[str, Any]:
    """Return `families`, `mean` (over families out of domain) and `benchmarks` of results.json.

    Args:
        parts: one comparison per benchmark, by name.
    """
    families, in_domain, metrics = {}, {}, {}
    for family in FAMILIES:
        own = [benchmark for benchmark in benchmarks if benchmark.family == family]
        outside = [benchmark for benchmark in own if not benchmark.in_domain]
        counted = outside or own  # one that is in-domain altogether is shown, and marked
        if counted:
            families[family] = statistics.mean([parts[benchmark.name] for benchmark in counted])
            in_domain[family] = not outside
            names = list(dict.fromkeys(benchmark.metric for benchmark in counted))
            metrics[family] = names[0] if len(names) == 1 else f"mean of {', '.join(names)}"
    tested = {name: part.p_value() for name, part in families.items() if not in_domain[name]}
    adjusted = statistics.holm({name: p for name, p in tested.items() if p is not None})
    rows = [
        _row(name, metrics[name], part, adjusted.get(name)) | {"in_domain": in_domain[name]}
        for name, part in families.items()
    ]
    outside = [part for name, part in families.items() if not in_domain[name]]
    mean = None
    if outside:
        whole = statistics.mean(outside)
        mean = _row("mean", f"mean over {len(outside)} families out of domain", whole, whole.p_value())
    details = [
        _row(benchmark.name, benchmark.metric, parts[benchmark.name], None)
        | {"family": benchmark.family, "in_domain": benchmark.in_domain}
        | {"baselines": {name: _rounded(100 * value) for name, value in benchmark.baselines().items()}}
        for benchmark in benchmarks
    ]
    for row in details:
        del row["verdict"], row["p_adjusted"]  # verdicts are on families
    return {"families": rows, "mean": mean, "benchmarks": details}


def _row(name: str, metric: str, part: statistics.Comparison, adjusted: float | None) -> dict[str, Any]:
    low, high = part.interval()
    return {
        "name": name,
        "metric": metric,
        "base": _rounded(part.base),
        "tuned": _rounded(part.tuned),
        "difference": _rounded(part.difference),
        "low": _rounded(low),
        "high": _rounded(high),
        "verdict": statistics.verdict(part.difference, adjusted),
        "n": part.n,
        "p": _rounded(part.p_value()),
        "p_adjusted": _rounded(adjusted),
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


# ---------------------------------------------------------------- progress


class Progress(tqdm):
    """A line that shows progress, rewritten in place on a terminal; otherwise one line per benchmark and seed.

    Args:
        total: the total cost, in seconds of the machine that costs were measured on.
    """

    monitor_interval = 0  # no thread

    def __init__(self, total: float) -> None:
        terminal = sys.stderr.isatty()
        line = "[{percentage:3.0f} %] {desc} ({elapsed} gone, {remaining} left)"
        file = sys.stderr if terminal else io.StringIO()
        super().__init__(total=total, file=file, smoothing=0, bar_format=line, leave=False)
        self.terminal = terminal

    def skip(self, cost: float) -> None:
        """Count a cost as done without doing it."""
        self.n, self.initial = self.n + cost, self.initial + cost

    def say(self, what: str) -> None:
        """Show what is being done."""
        self.set_description_str(what)
        if not self.terminal:
            logger.info("%s", self)
