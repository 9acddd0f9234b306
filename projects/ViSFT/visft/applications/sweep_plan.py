"""A sweep's YAML file read into runs: each a config, and an identity that says whether it has been done before."""

import hashlib
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from visft.checkpoint import files, load
from visft.data import register_own_data
from visft.engine import checks, settings
from visft.errors import ConfigError, VisftError
from visft.evaluation import demo_zero_shot
from visft.model_zoo import get_config_file
from visft.modeling.backbone import open_clip_models

_FIELDS = ("config", "demo_world", "settings", "runs", "grid", "seeds", "interpolate", "measure")
_DEMO_WORLD = ("train", "val")
_OWN_KEYS = ("OUTPUT_DIR", "SEED", "MODEL.WEIGHTS")
"""Keys that the sweep sets itself."""

_TASK_KEYS = (
    "MODEL.VISFT.HEADS",
    "MODEL.VISFT.LOSS_WEIGHTS",
    "VISFT.TASK_MIXING",
    "VISFT.TASK_RATIOS",
)
"""What a run says of tasks, and of the heads it starts from, acts in its stage lora: all heads are trained in stage 1,
and measured."""

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

MEASURES = {
    "detection": "detection/bbox/AP50",
    "segmentation": "segmentation/segm/AP50",
    "captioning": "captioning/CIDEr",
}
"""The figure of each head that is reported when a sweep does not say which."""


@dataclass(frozen=True)
class Run:
    """One training of stage lora, and what is needed for it.

    Args:
        name: as in the table; the same for all seeds.
        seed: `SEED`.
        overrides: what sets it apart, by config key.
        identity: hash of everything that decides its result.
        opts: KEY VALUE words of its training, without OUTPUT_DIR and, with `heads`, without HEAD_FILES.
        measure_opts: the same of the model that its tower is measured with.
        heads: identity of the stage 1 that it starts from; "": it starts from files.
        untuned: identity of the measurement of the tower before.
        measured_with: hash of what decides the figures besides the weights.
    """

    name: str
    seed: int
    overrides: Mapping[str, Any]
    identity: str
    opts: tuple[str, ...]
    measure_opts: tuple[str, ...]
    heads: str
    untuned: str
    measured_with: str


@dataclass(frozen=True)
class Plan:
    """What a sweep does.

    Args:
        source: the YAML file. config: the base config's file.
        demo_world: numbers of scenes to make, by split; None: the data sets are there.
        runs: in the order of the table.
        heads: KEY VALUE words of each stage 1, by identity.
        untuned: the same of each measurement before stage lora.
        interpolate: amounts of the LoRA's update that are measured, from one run's weights.
        measure: names of the figures of the table.
    """

    source: Path
    config: str
    runs: tuple[Run, ...]
    heads: Mapping[str, tuple[str, ...]]
    untuned: Mapping[str, tuple[str, ...]]
    interpolate: tuple[float, ...]
    measure: tuple[str, ...]
    demo_world: Mapping[str, int] | None = None


@dataclass
class Sweep:
    """A sweep's YAML file, checked for form.

    Attributes:
        source, config, demo_world, interpolate: as in `Plan`.
        common: config keys of all runs.
        variants: overrides by name.
        seeds: of each variant.
        measure: figures of the table; (): `MEASURES` of the heads that there are, and zero-shot accuracy.
    """

    source: Path
    config: str
    common: dict[str, Any]
    variants: dict[str, dict[str, Any]]
    seeds: tuple[int, ...] = (1,)
    interpolate: tuple[float, ...] = (1.0,)
    measure: tuple[str, ...] = ()
    demo_world: dict[str, int] | None = field(default=None)


def read(path: str | os.PathLike) -> Sweep:
    """Read a sweep's YAML file.

    Raises:
        ConfigError: the file is missing or no YAML mapping; an entry is unknown, missing or of another form.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(
            f"--config {path}: there is no such file; give a sweep such as configs/sweeps/tasks.yaml"
        )
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}: not valid YAML{where}: {getattr(error, 'problem', error)}") from error
    content = _mapping(path, "the file", content)
    for name in content:
        if name not in _FIELDS:
            raise settings.unknown(f"{path}: entry", str(name), _FIELDS)
    if not isinstance(content.get("config"), str):
        raise ConfigError(
            f"{path}: `config` is {content.get('config')!r}; expected the base config's file or name"
        )
    sweep = Sweep(
        source=path,
        config=_config_file(path, content["config"]),
        common=_overrides(path, "settings", content.get("settings", {})),
        variants=_variants(path, content),
        measure=tuple(_list(path, "measure", content.get("measure", []), str, empty=True)),
    )
    sweep.seeds = tuple(_list(path, "seeds", content.get("seeds", [1]), int))
    if min(sweep.seeds) < 0:
        raise ConfigError(f"{path}: `seeds` has {min(sweep.seeds)}; expected numbers from 0")
    amounts = [float(a) for a in _list(path, "interpolate", content.get("interpolate", [1.0]), (int, float))]
    outside = [amount for amount in amounts if not 0 < amount <= 1]
    if outside:
        raise ConfigError(
            f"{path}: `interpolate` has {outside[0]:g}; expected numbers above 0 and at most 1 (0, the base, is "
            "measured anyway)"
        )
    sweep.interpolate = tuple(sorted(amounts))
    if "demo_world" in content:
        sweep.demo_world = _demo_world(path, content["demo_world"])
    return sweep


def plan(sweep: Sweep) -> Plan:
    """Build and check the config of every run.

    Data sets must be there: each run's are read, as are the shapes in its weight files.

    Raises:
        ConfigError, DataError, CheckpointError: the first thing that is wrong, with the run that it is wrong in.
    """
    runs: list[Run] = []
    heads: dict[str, tuple[str, ...]] = {}
    untuned: dict[str, tuple[str, ...]] = {}
    for name, overrides in sweep.variants.items():
        for seed in sweep.seeds:
            run, stage1, before = _run(sweep, name, overrides, seed)
            if any(run.identity == other.identity for other in runs):
                twin = next(other.name for other in runs if other.identity == run.identity)
                raise ConfigError(
                    f"{sweep.source}: runs `{twin}` and `{name}` have the same settings; take one out"
                )
            runs.append(run)
            untuned[run.untuned] = before
            if run.heads:
                heads[run.heads] = stage1
    base = _load(sweep, "settings", {})
    known = list(base.MODEL.VISFT.HEADS)
    measure = sweep.measure or tuple(MEASURES[head] for head in known if head in MEASURES)
    if not sweep.measure and demo_zero_shot.applies(base):
        measure += ("zero_shot/top1",)
    for figure in measure:
        if figure.split("/")[0] not in (*known, "zero_shot"):
            raise settings.unknown(f"{sweep.source}: `measure`", figure, [MEASURES.get(h, h) for h in known])
    return Plan(
        source=sweep.source,
        config=sweep.config,
        demo_world=sweep.demo_world,
        runs=tuple(runs),
        heads=heads,
        untuned=untuned,
        interpolate=sweep.interpolate,
        measure=measure,
    )


def words(values: Mapping[str, Any]) -> tuple[str, ...]:
    """Config keys and values as KEY VALUE words."""
    return tuple(word for key, value in values.items() for word in (key, str(value)))


# ---------------------------------------------------------------- one run


def _run(
    sweep: Sweep, name: str, overrides: Mapping[str, Any], seed: int
) -> tuple[Run, tuple[str, ...], tuple[str, ...]]:
    """A run, the words of its stage 1, and those of the measurement before it."""
    cfg = _load(sweep, f"run `{name}`", {**overrides, "SEED": seed})
    if "lora" not in cfg.VISFT.STAGES:
        raise ConfigError(
            f"{sweep.source}, run `{name}`: VISFT.STAGES is {tuple(cfg.VISFT.STAGES)}; a sweep is of stage lora"
        )
    base = _load(sweep, "settings", {})
    extra = [head for head in cfg.MODEL.VISFT.HEADS if head not in base.MODEL.VISFT.HEADS]
    if extra:
        raise ConfigError(
            f"{sweep.source}, run `{name}`: MODEL.VISFT.HEADS names {extra[0]}, which the base config's has not "
            f"({', '.join(base.MODEL.VISFT.HEADS)}); name all heads in `settings`, for they are all measured"
        )
    narrowed = _files_of(cfg)
    if seed == sweep.seeds[0]:
        checked = cfg.clone()
        checked.MODEL.VISFT.HEAD_FILES = narrowed
        try:
            checks.check(checked)
        except VisftError as error:
            raise type(error)(f"{sweep.source}, run `{name}`: {error}") from error

    trains_heads = "heads" in cfg.VISFT.STAGES
    of_tasks = (*_TASK_KEYS, *(() if trains_heads else ("MODEL.VISFT.HEAD_FILES",)))
    ours = {"SEED": seed, "VISFT.EXPORT": ()}
    common = {**sweep.common, **overrides, **ours}
    every_task = {**sweep.common, **{k: v for k, v in overrides.items() if k not in of_tasks}, **ours}
    quiet = {"DATASETS.TEST": (), "VISFT.DATA.TEST_JSON": "", "VISFT.DATA.TEST_IMAGES": ""}
    first = {key: value for key, value in every_task.items() if not key.startswith(_LORA_KEYS)}
    first["VISFT.STAGES"] = ("heads",)
    stage1 = _identity(sweep, {**first, **quiet}) if trains_heads else ""

    before = dict(first)
    if cfg.MODEL.CLIP_VIT.PRETRAINED and base.MODEL.VISFT.HEAD_FILES and not trains_heads:
        before["SEED"] = 0  # nothing is drawn, so one measurement serves all seeds
    measured = _identity(sweep, before)

    training = {**common, **quiet, "VISFT.STAGES": ("lora",), "MODEL.VISFT.HEAD_FILES": narrowed}
    run = Run(
        name=name,
        seed=seed,
        overrides=dict(overrides),
        identity=_identity(sweep, training, stage1),
        opts=words(training),
        measure_opts=words({**every_task, "VISFT.STAGES": ("lora",)}),
        heads=stage1,
        untuned=_hash([measured, stage1]),
        measured_with=measured,
    )
    return run, words({**first, **quiet}), words(before)


def _load(sweep: Sweep, what: str, overrides: Mapping[str, Any]) -> CfgNode:
    try:
        return settings.load_config(sweep.config, words({**sweep.common, **overrides}))
    except ConfigError as error:
        message = str(error).removeprefix("command line: ")
        raise ConfigError(f"{sweep.source}, {what}: {message}") from error


def _files_of(cfg: CfgNode) -> tuple[str, ...]:
    """Those of HEAD_FILES that hold a head of the config's: a file of none is an error when it is loaded."""
    kept = []
    for file in cfg.MODEL.VISFT.HEAD_FILES:
        load.check_file(file, key="MODEL.VISFT.HEAD_FILES", heads_only=True)
        path = load.resolve(file, stages=("heads",))[-1]
        if set(load.split_heads(files.read_shapes(path), path)) & set(cfg.MODEL.VISFT.HEADS):
            kept.append(file)
    return tuple(kept)


def _identity(sweep: Sweep, overrides: Mapping[str, Any], *more: str) -> str:
    """Hash of a config and of what is in the files that it names."""
    cfg = settings.load_config(sweep.config, words(overrides))
    cfg.OUTPUT_DIR, cfg.DATALOADER.NUM_WORKERS = "", 0  # of no effect on the result
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


def _content(path: str) -> str:
    if os.path.isdir(path):
        return _hash([_content(str(file)) for file in load.resolve(path, stages=("heads",))])
    state = os.stat(path)
    key = (path, state.st_size, state.st_mtime_ns)
    if key not in _contents:
        _contents[key] = files.sha256(path)
    return _contents[key]


_contents: dict[tuple, str] = {}


def _hash(parts: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


# ---------------------------------------------------------------- the file's form


def _config_file(path: Path, given: str) -> str:
    """A file beside the sweep, or a name of the model zoo."""
    if not given.endswith((".yaml", ".yml")):
        return get_config_file(given)
    file = path.parent / given
    if not file.is_file():
        raise ConfigError(
            f"{path}: `config` names {file}, which is not there; paths are relative to the sweep's file"
        )
    return str(file)


def _variants(path: Path, content: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Overrides by name: the product of `runs` and the axes of `grid`."""
    axes: list[list[tuple[str, dict[str, Any]]]] = []
    if "runs" in content:
        runs = _mapping(path, "`runs`", content["runs"])
        axes.append([(str(name), _overrides(path, f"runs: {name}", o)) for name, o in runs.items()])
    grid = _mapping(path, "`grid`", content.get("grid", {}))
    short = [key.rpartition(".")[2] for key in grid]
    for key, values in grid.items():
        name = key.rpartition(".")[2]
        label = (name if short.count(name) == 1 else key).lower().replace("_", " ")
        if not isinstance(values, list) or not values:
            raise ConfigError(f"{path}: grid: {key} is {values!r}; expected a list of values")
        _overrides(path, "grid", {key: None})
        axes.append([(f"{label} {_shown(value)}", {key: value}) for value in values])
    if not axes or not all(axes):
        raise ConfigError(
            f"{path}: names no runs; give `runs` (name: config keys), `grid` (key: values), or both"
        )
    variants: dict[str, dict[str, Any]] = {}
    for combination in itertools.product(*axes):
        name = ", ".join(label for label, _ in combination)
        if name in variants:
            raise ConfigError(f"{path}: there are two runs `{name}`; take one out")
        variants[name] = {key: value for _, overrides in combination for key, value in overrides.items()}
    return variants


def _shown(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, list) else str(value)


def _overrides(path: Path, where: str, content: Any) -> dict[str, Any]:
    content = _mapping(path, f"`{where}`", {} if content is None else content)
    for key in content:
        if key in _OWN_KEYS:
            raise ConfigError(
                f"{path}: {where}: {key} is set by the sweep (seeds are listed in `seeds`); take it out"
            )
    return dict(content)


def _mapping(path: Path, what: str, content: Any) -> dict[str, Any]:
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ConfigError(
            f"{path}: {what} is {type(content).__name__}; expected a mapping of names to values"
        )
    return content


def _list(path: Path, name: str, content: Any, kind: Any, empty: bool = False) -> list:
    good = isinstance(content, list) and (content or empty)
    if not good or any(isinstance(v, bool) or not isinstance(v, kind) for v in content):
        wanted = {int: "whole numbers", str: "names of figures"}.get(kind, "numbers")
        raise ConfigError(f"{path}: `{name}` is {content!r}; expected a list of {wanted}")
    if len(set(content)) != len(content):
        raise ConfigError(f"{path}: `{name}` has an entry twice: {content}")
    return content


def _demo_world(path: Path, content: Any) -> dict[str, int]:
    content = _mapping(path, "`demo_world`", content)
    for name in content:
        if name not in _DEMO_WORLD:
            raise settings.unknown(f"{path}: demo_world", name, _DEMO_WORLD)
    counts = {name: content.get(name) for name in _DEMO_WORLD}
    if not all(isinstance(count, int) and count > 0 for count in counts.values()):
        raise ConfigError(
            f"{path}: `demo_world` is {content}; expected numbers of scenes `train` and `val`, above 0"
        )
    return counts
