"""`tools/sweep.py`: many short runs that differ in a few config keys, compared on the same figures.

Folders below --output:

    heads/ID/               a stage 1, shared by all runs whose settings of stage 1 are equal
    untuned/ID/             the figures before stage lora
    runs/NAME-seedN-ID/     a run: its stage lora, its figures
    demo_world/             the scenes, where the sweep has them made
    results.json, table.md, sweep.png     rewritten after every job

ID is a hash of everything that decides a result (config, weight files, annotations). Existing results are kept.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from matplotlib.figure import Figure

from visft.applications.sweep_job import Job
from visft.checkpoint import files, load
from visft.checkpoint.run_folder import head_file
from visft.data import register_own_data
from visft.data.datasets import demo_world
from visft.engine import checks, run_lock, settings
from visft.errors import ConfigError, TrainingError, VisftError, unknown
from visft.evaluation import demo_zero_shot
from visft.model_zoo import get_config_file
from visft.modeling.backbone import open_clip_models
from visft.utils import markdown

logger = logging.getLogger(__name__)

_OWN_KEYS = ("OUTPUT_DIR", "SEED", "MODEL.WEIGHTS")  # set by the sweep itself

_TASK_KEYS = ("MODEL.VISFT.HEADS", "MODEL.VISFT.LOSS_WEIGHTS", "VISFT.TASK_MIXING", "VISFT.TASK_RATIOS")
"""A run's keys of tasks act in its stage lora alone: stage 1 trains all heads, and all heads are measured."""

_LORA_KEYS = (
    "MODEL.LORA.",
    "MODEL.VISFT.TUNE",
    "MODEL.VISFT.FREEZE_HEADS",
    "MODEL.VISFT.OBJECTIVES",
    "MODEL.VISFT.ANCHOR.",
    "MODEL.VISFT.CONTRASTIVE.",
    "MODEL.VISFT.SELF_DISTILLATION.",
    "VISFT.SOLVER.LORA.",
)

_MEASURES = {
    "detection": "detection/bbox/AP50",
    "segmentation": "segmentation/segm/AP50",
    "captioning": "captioning/CIDEr",
}
"""Each head's figure that is reported by default."""


@dataclass
class Scenes:
    """Numbers of scenes to make, by split."""

    train: int
    val: int


@dataclass
class Sweep:
    """The entries of a sweep's YAML file, which configs/sweeps/tasks.yaml explains."""

    config: str
    demo_world: Scenes | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    runs: dict[str, dict[str, Any] | None] = field(default_factory=dict)
    grid: dict[str, list[Any]] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [1])
    interpolate: list[float] = field(default_factory=lambda: [1.0])
    measure: list[str] = field(default_factory=list)

    @property
    def variants(self) -> dict[str, dict[str, Any]]:
        """Config keys by name: the product of `runs` and the axes of `grid`."""
        axes = [[(name, keys or {}) for name, keys in self.runs.items()]] if self.runs else []
        short = Counter(key.rpartition(".")[2] for key in self.grid)
        for key, values in self.grid.items():
            last = key.rpartition(".")[2]
            label = (last if short[last] == 1 else key).lower().replace("_", " ")
            shown = ["+".join(map(str, value)) if isinstance(value, list) else value for value in values]
            axes.append([(f"{label} {text}", {key: v}) for text, v in zip(shown, values, strict=True)])
        return {
            ", ".join(name for name, _ in parts): {key: v for _, keys in parts for key, v in keys.items()}
            for parts in itertools.product(*axes)
            if parts
        }


@dataclass(frozen=True)
class Run:
    """One training of stage lora with its measurement (`job`), and the jobs that it needs."""

    name: str
    seed: int
    overrides: Mapping[str, Any]
    heads: list[Job]
    untuned: Job
    job: Job


def run(config: str | os.PathLike, output: str | os.PathLike) -> dict[str, Any]:
    """Do what is not done yet, and write the results after each job; returns the content of results.json.

    Raises:
        ConfigError, DataError, CheckpointError: something is wrong with the sweep; raised before the first run.
        TrainingError: another sweep is running in `output`; or runs have failed, while the others are done.
    """
    sweep, folder = read(config), Path(output).resolve()
    with run_lock.locked(folder, "--output"):
        if sweep.demo_world:
            root = folder / "demo_world"
            demo_world.make(root, num_train=sweep.demo_world.train, num_val=sweep.demo_world.val)
            demo_world.register(root)
            os.environ["VISFT_DEMO_DATA"] = str(root)  # for the jobs' processes
        with _named(config):
            runs = plan(sweep, folder)
        jobs = {job.folder: job for run in runs for job in (*run.heads, run.untuned, run.job)}
        left = [job for job in jobs.values() if not job.done]
        logger.info("%d of %d jobs were done before", len(jobs) - len(left), len(jobs))
        errors: dict[str, str] = {}
        for number, job in enumerate(left, 1):
            where = f"[{number}/{len(left)}] {os.path.relpath(job.folder, folder)}"
            logger.info("%s ...", where)
            if error := "its stage 1 failed" if job.after in errors else job.run():
                errors[job.folder] = error
                logger.error("%s: failed: %s", where, error)
            else:
                logger.info("%s: %.0f s in all", where, job.seconds)
            write(_results(config, sweep, runs, errors, folder), folder)
        results = _results(config, sweep, runs, errors, folder)
        write(results, folder)
    logger.info("%s\n%s", table(results), folder / "results.json")
    if failed := [run for run in results["runs"] if run["status"] == "failed"]:
        first = "`{name}` with seed {seed} ({error})".format(**failed[0])
        raise TrainingError(
            f"{len(failed)} of {len(runs)} runs failed, first {first}; the same command tries them again"
        )
    return results


def read(path: str | os.PathLike) -> Sweep:
    """Read a sweep's YAML file.

    Raises:
        ConfigError: the file is missing or no YAML mapping; an entry is unknown, missing or of another form.
    """
    sweep = settings.read_form(path, Sweep, "--config", like="configs/sweeps/tasks.yaml")
    beside = Path(path).parent / sweep.config
    with _named(path):
        sweep.config = str(beside if beside.is_file() else get_config_file(sweep.config))
    if not sweep.variants or not sweep.seeds:
        raise ConfigError(f"{path}: names no runs; give `runs`, `grid` or both, and at least one of `seeds`")
    for key in itertools.chain(sweep.settings, *sweep.variants.values()):
        if key in _OWN_KEYS:
            raise ConfigError(f"{path}: {key} is set by the sweep (`seeds` lists the seeds); take it out")
    sweep.interpolate = sorted(set(sweep.interpolate))
    if not sweep.interpolate or not all(0 < amount <= 1 for amount in sweep.interpolate):
        raise ConfigError(
            f"{path}: `interpolate` is {sweep.interpolate}; expected numbers above 0, at most 1"
        )
    return sweep


def plan(sweep: Sweep, folder: Path) -> list[Run]:
    """The runs, in the order of the table; their configs are checked, and `sweep.measure` is filled in.

    Raises:
        ConfigError, DataError, CheckpointError: the first thing that is wrong, with the run that it is wrong in.
    """
    base = settings.load_config(sweep.config, settings.words(sweep.settings))
    heads = list(base.MODEL.VISFT.HEADS)
    if not sweep.measure:
        sweep.measure = [_MEASURES[head] for head in heads if head in _MEASURES]
        sweep.measure += ["zero_shot/top1"] if demo_zero_shot.applies(base) else []
    for figure in sweep.measure:
        if figure.split("/")[0] not in (*heads, "zero_shot"):
            raise unknown("`measure`", figure, [_MEASURES.get(head, head) for head in heads])
    _content.cache_clear()
    runs: dict[str, Run] = {}
    for name, seed in itertools.product(sweep.variants, sweep.seeds):
        with _named(f"run `{name}`"):
            run = _run(sweep, folder, bool(base.MODEL.VISFT.HEAD_FILES), name, seed)
            twin = runs.setdefault(run.job.folder.rpartition("-")[2], run)
            if twin is not run:
                raise ConfigError(f"its settings are those of run `{twin.name}`; take one out")
    return list(runs.values())


@contextlib.contextmanager
def _named(where: str | os.PathLike) -> Iterator[None]:
    """Within it, errors say where they occurred."""
    try:
        yield
    except VisftError as error:
        raise type(error)(f"{where}: {str(error).removeprefix('command line: ')}") from error


def _run(sweep: Sweep, folder: Path, from_files: bool, name: str, seed: int) -> Run:
    overrides = sweep.variants[name]
    cfg = settings.load_config(sweep.config, settings.words({**sweep.settings, **overrides, "SEED": seed}))
    if "lora" not in cfg.VISFT.STAGES:
        raise ConfigError(f"VISFT.STAGES is {tuple(cfg.VISFT.STAGES)}; a sweep is of stage lora")
    cfg.MODEL.VISFT.HEAD_FILES = narrowed = _files_of(cfg)
    if seed == sweep.seeds[0]:
        checks.check(cfg)

    trains_heads = "heads" in cfg.VISFT.STAGES
    of_tasks = _TASK_KEYS if trains_heads else (*_TASK_KEYS, "MODEL.VISFT.HEAD_FILES")
    ours = {"SEED": seed, "VISFT.EXPORT": ()}
    quiet = {"DATASETS.TEST": (), "VISFT.DATA.TEST_JSON": "", "VISFT.DATA.TEST_IMAGES": ""}
    every_task = {**sweep.settings, **{k: v for k, v in overrides.items() if k not in of_tasks}, **ours}
    tuned = {**every_task, "VISFT.STAGES": ("lora",)}
    training = {**every_task, **overrides, **ours, **quiet, "VISFT.STAGES": ("lora",)}
    training["MODEL.VISFT.HEAD_FILES"] = narrowed
    before = {key: value for key, value in every_task.items() if not key.startswith(_LORA_KEYS)}
    before["VISFT.STAGES"] = ("heads",)
    first = {**before, **quiet}
    if cfg.MODEL.CLIP_VIT.PRETRAINED and from_files and not trains_heads:
        before["SEED"] = 0  # nothing is random, so one measurement serves all seeds

    stage1 = _identity(sweep, first) if trains_heads else ""
    key, identity = _identity(sweep, before), _identity(sweep, training, stage1)
    there = list((folder / "runs").glob(f"*-{identity}"))
    plain = re.sub(r"[^a-z0-9.+]+", "-", name.lower()).strip("-")[:60]
    place = str(there[0] if there else folder / "runs" / f"{plain}-seed{seed}-{identity}")
    heads, after = [], ""
    if trains_heads:
        after = str(folder / "heads" / stage1)
        heads.append(Job(after, sweep.config, train=first))
        for keys in (before, training, tuned):
            keys["MODEL.VISFT.HEAD_FILES"] = (after,)
    tuned["MODEL.WEIGHTS"] = place
    job = functools.partial(Job, config=sweep.config, key=key, after=after)
    untuned = job(str(folder / "untuned" / _hash([key, stage1])), measure=before, amounts=[0.0])
    run = job(place, train=training, measure=tuned, amounts=sweep.interpolate)
    return Run(name, seed, overrides, heads, untuned, run)


def _files_of(cfg: CfgNode) -> tuple[str, ...]:
    """The HEAD_FILES with a head of the config. Loading another file would be an error."""
    kept = []
    for file in cfg.MODEL.VISFT.HEAD_FILES:
        path = load.check_file(file, key="MODEL.VISFT.HEAD_FILES", heads_only=True)[-1]
        if set(load.split_heads(files.read_shapes(path), path)) & set(cfg.MODEL.VISFT.HEADS):
            kept.append(file)
    return tuple(kept)


def _identity(sweep: Sweep, overrides: Mapping[str, Any], *more: str) -> str:
    """Hash of a config and of the content of the files that it names."""
    cfg = settings.load_config(sweep.config, settings.words(overrides))
    cfg.OUTPUT_DIR, cfg.DATALOADER.NUM_WORKERS = "", 0  # without effect on the result
    register_own_data(cfg)
    named = list(cfg.MODEL.VISFT.HEAD_FILES)
    vit = cfg.MODEL.CLIP_VIT
    tag = open_clip_models.open_clip().get_pretrained_cfg(vit.NAME, vit.PRETRAINED) or {}
    base = tag.get("file", vit.PRETRAINED)  # of a tag whose weights come with a package
    if os.path.isfile(base):
        named.append(base)
    for data_set in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        named.append(MetadataCatalog.get(data_set).get("json_file", ""))
    contents = [_content(str(files.local_path(file))) for file in named if file]
    return _hash([cfg.dump(), contents, *more])


@functools.cache
def _content(path: str) -> str:
    if os.path.isdir(path):
        return _hash([_content(str(head_file(path)))])
    return files.sha256(path)


def _hash(parts: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


def _results(config, sweep: Sweep, runs: Sequence[Run], errors, folder: Path) -> dict[str, Any]:
    labels = [f"{amount:g}" for amount in sweep.interpolate]
    rows = [
        {
            "name": run.name,
            "seed": run.seed,
            "status": "failed" if run.job.folder in errors else "waiting" if run.job.missing else "finished",
            "error": errors.get(run.job.folder),
            "overrides": run.overrides,
            "folder": os.path.relpath(run.job.folder, folder),
            "seconds": run.job.seconds,
            "untuned": run.untuned.figures.get("0"),
            "figures": {label: run.job.figures[label] for label in labels if label in run.job.figures},
        }
        for run in runs
    ]
    about = {"sweep": str(config), "config": sweep.config, "measure": sweep.measure}
    return {**about, "interpolate": sweep.interpolate, "runs": rows}


def write(results: dict[str, Any], folder: Path) -> None:
    """Write results.json, table.md and, once a run is finished, sweep.png, each atomically."""
    files.write_json(folder / "results.json", results)
    files.write_text(folder / "table.md", table(results) + "\n")
    if any(run["figures"] and run["untuned"] for run in results["runs"]):
        _draw(results, folder / "sweep.png")


def differences(results: dict[str, Any], name: str, amount: str, figure: str) -> list[float]:
    """A run's figure minus the untuned tower's, for each seed that has both."""
    runs = [run for run in results["runs"] if run["name"] == name]
    pairs = [(run["figures"].get(amount, {}).get(figure), (run["untuned"] or {}).get(figure)) for run in runs]
    return [after - before for after, before in pairs if after is not None and before is not None]


def table(results: dict[str, Any]) -> str:
    """Figures of the untuned tower, and each run's difference from them, as Markdown."""
    measure, amounts = results["measure"], [f"{amount:g}" for amount in results["interpolate"]]
    seeds = len({run["seed"] for run in results["runs"]})
    untuned = [[(run["untuned"] or {}).get(figure) for run in results["runs"]] for figure in measure]
    lines = [
        f"Points of difference from the untuned tower; mean{' ± standard deviation' if seeds > 1 else ''} over "
        f"{seeds} seed{'s' if seeds > 1 else ''}.",
        "",
        markdown.row(["run", *map(markdown.plain, measure), "seconds"]),
        f"|---|{'---:|' * (len(measure) + 1)}",
        f"| the untuned tower | {' | '.join(_mean(values, '.2f') for values in untuned)} | |",
    ]
    for name in dict.fromkeys(run["name"] for run in results["runs"]):
        runs = [run for run in results["runs"] if run["name"] == name]
        for amount in amounts:
            label = name if len(amounts) == 1 else f"{name}, interpolated {amount}"
            cells = [_cell(differences(results, name, amount, figure)) for figure in measure]
            took = _mean([run["seconds"] for run in runs], ".0f") if amount == amounts[-1] else ""
            lines.append(markdown.row([markdown.plain(label), *cells, took]))
        for run in runs:
            if run["status"] == "failed":
                failure = markdown.plain(f"{name}, seed {run['seed']} failed: {run['error']}")
                lines.append(markdown.row([failure, *[""] * (len(measure) + 1)]))
    return "\n".join(lines)


def _mean(values: Sequence[float | None], form: str) -> str:
    values = [value for value in values if value is not None]
    return f"{np.mean(values):{form}}" if values else ""


def _cell(values: Sequence[float]) -> str:
    return _mean(values, "+.2f") + (f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else "")


def _draw(results: dict[str, Any], path: Path) -> None:
    """A panel per figure with the runs' differences from the untuned tower; below it, along the interpolation."""
    names, measure = list(dict.fromkeys(run["name"] for run in results["runs"])), results["measure"]
    amounts = [f"{amount:g}" for amount in results["interpolate"]]
    heights = [1.4 + 0.35 * len(names), 3.4][: len(amounts)]
    image = Figure(figsize=(1.5 + 3.2 * len(measure), sum(heights)), layout="constrained")
    panels = image.subplots(len(heights), len(measure), squeeze=False, height_ratios=heights)
    for figure, bars, *below in zip(measure, *panels, strict=True):
        for row, name in enumerate(names):
            values = differences(results, name, amounts[-1], figure)
            mean = np.mean(values or [0])
            colour, side = ("tab:green", "left") if mean > 0 else ("tab:red", "right")
            bars.barh(row, mean, height=0.6, color=colour, alpha=0.35)
            bars.plot(values, [row] * len(values), "o", color=colour, markersize=4)
            label = f"{mean:+.1f}" if values else "not measured"
            bars.text(mean, row - 0.35, label, fontsize=7, ha=side, va="center")
            for lines in below:
                found = {float(amount): differences(results, name, amount, figure) for amount in amounts}
                means = {0.0: 0.0, **{amount: np.mean(values) for amount, values in found.items() if values}}
                lines.plot(means.keys(), means.values(), marker="o", markersize=3, label=name)
                lines.set_xlabel("interpolation (0: base, 1: tuned)", fontsize=8)
        bars.set_yticks(range(len(names)), names if figure == measure[0] else [""] * len(names), fontsize=8)
        bars.set_ylim(len(names) - 0.4, -0.6)
        bars.margins(x=0.15)
        bars.set_title(figure, fontsize=9)
    for axes in panels.flat:
        axes.grid(alpha=0.3)
    if len(heights) > 1:
        panels[1][0].legend(fontsize=7)
    image.suptitle("Difference from the untuned tower (points)", fontsize=10)
    with files.write_aside(path) as partial:
        image.savefig(partial, dpi=120, format="png")
