"""A run as a model. Its config, classes and seed come from its checkpoints, so its data need not exist."""

import contextlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.config.defaults import _C as DETECTRON2_DEFAULTS
from detectron2.data import DatasetCatalog
from torch import nn

from visft.checkpoint import files
from visft.checkpoint.copying import some
from visft.checkpoint.record import RunRecord, read_record
from visft.checkpoint.run_folder import describe, run_files
from visft.classes.dataset_classes import RUN_PREFIX, Classes, filled_metadata
from visft.config import add_visft_config
from visft.data import register_own_data
from visft.engine import settings
from visft.errors import CheckpointError, ConfigError, VisftError

OUTPUT_DIR = "output/evaluation"
"""Output folder for evaluating a run without a config file, because the run's own folder may be read-only."""

_TRAIN_DATA = ("TRAIN_JSON", "TRAIN_IMAGES", "TRAIN_CAPTIONS", "TRAIN_SHARDS")
_TEST_DATA = ("TEST_JSON", "TEST_IMAGES", "TEST_CAPTIONS")
_TOWER = ("MODEL.CLIP_VIT", ("CLASS_TOKEN", "PATCH_SIZE", "WINDOW_SIZE", "GLOBAL_BLOCKS"))
_LORA = ("MODEL.LORA", ("RANK", "ALPHA", "TARGETS", "LAST_BLOCKS"))
_HEAD = ("HEAD", "LABEL_SPACE", "CLASS_LOSS", "NUM_QUERIES", "NUM_ATTENTION_HEADS", "GRID", "DIM")
_HEAD_ENDS = ("_LAYERS", "_DIM")
"""Keys of a head that must match its weights. Many of them do not affect shapes."""


def record_of(cfg: CfgNode, model: nn.Module, seed: int) -> RunRecord:
    """Return the record for a run's checkpoints. `model` is a ViSFT model before any stage."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.PIXEL_MEAN = model.pixel_mean.flatten().tolist()
    cfg.MODEL.PIXEL_STD = model.pixel_std.flatten().tolist()
    if cfg.MODEL.CLIP_VIT.PRETRAINED and _is_path(cfg.MODEL.CLIP_VIT.PRETRAINED):
        cfg.MODEL.CLIP_VIT.PRETRAINED = os.path.abspath(cfg.MODEL.CLIP_VIT.PRETRAINED)
    return RunRecord(yaml.safe_load(cfg.dump()), Classes.known(cfg).to_json(), seed)


def seed_of(weights: str | os.PathLike, otherwise: int) -> int:
    """Return the seed of a run, which recreates a tower with random weights.

    Args:
        weights: an OUTPUT_DIR, a stage's folder or a file. "" and other programs' files belong to no run.
        otherwise: the seed if there is no run; a negative one counts as 0.
    """
    if weights:
        with contextlib.suppress(CheckpointError):
            if record := read_record(weights):
                return record.seed
        state = os.path.join(weights, "run.json")
        if os.path.isfile(state):
            return files.read_json(state)["seed"]
    return max(otherwise, 0)


def run_config(weights: str, opts: Sequence[str] = (), *, test: bool = False) -> CfgNode:
    """Return the config of a run without a config file, changed by KEY VALUE pairs. MODEL.WEIGHTS is the run.

    Keys that only training reads get their defaults. If the run's device does not exist here, the config uses the CPU.

    Args:
        weights: a run's OUTPUT_DIR, a stage's folder or a file in one.
        test: whether to use the run's test set, unless the pairs name another one.

    Raises:
        CheckpointError: there is no complete checkpoint, it has no record, or its base is missing.
        ConfigError: the pairs are wrong.
    """
    record = read_record(weights)
    if record is None:
        raise CheckpointError(
            f"{weights}: does not say which config and classes it was trained with (an older visft wrote it, or it is "
            "not a checkpoint of a run); give --config-file with the config that it was trained with"
        )
    cfg = get_cfg()
    add_visft_config(cfg)
    defaults = cfg.clone()
    cfg.set_new_allowed(True)  # for nodes of heads that the user registered
    try:
        cfg.merge_from_other_cfg(CfgNode(record.config))
    except (ValueError, KeyError, AssertionError) as error:
        raise CheckpointError(
            f"{weights}: the config that it was trained with does not fit this visft ({error}); give --config-file"
        ) from error
    cfg.set_new_allowed(False)
    for key in ("SOLVER", "COMPILE", "EXPORT", "TASKS", "TASK_MIXING", "TASK_RATIOS"):
        cfg.VISFT[key] = defaults.VISFT[key]
    node = cfg.MODEL.VISFT
    node.BALANCE_GRADIENTS = False
    if node.HEADS:
        node.OBJECTIVES = ()
    if torch.device(cfg.MODEL.DEVICE).type == "cuda" and not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    given = {key for key, _ in settings.pairs(opts)}
    own_test = test and not any(key.startswith(("DATASETS.TEST", "VISFT.DATA.TEST_")) for key in given)
    if not own_test:
        cfg.DATASETS.TEST = ()
        cfg.VISFT.DATA.update(dict.fromkeys(_TEST_DATA, ""))
    if not test and tuple(node.OPEN_VOCABULARY.NAMES) == ("test",):
        node.OPEN_VOCABULARY.NAMES = ()
    cfg.OUTPUT_DIR = OUTPUT_DIR
    settings.change(cfg, opts)
    cfg.MODEL.WEIGHTS = str(weights)
    _check_base(cfg)
    adopt(cfg)
    heads = [head for head in node.HEADS if node[head.upper()].HEAD != "RegionTextHead"]
    if heads and not node.HEAD_FILES and not _has_heads(weights):
        raise CheckpointError(
            f"{weights}: has only the weights of stage lora, without the heads ({', '.join(heads)}), and there are "
            "none beside its folder; give the run's OUTPUT_DIR"
        )
    return cfg


def adopt(cfg: CfgNode) -> None:
    """Use the classes, heads and vocabulary of the run in MODEL.WEIGHTS instead of its data and initial files.

    Does nothing if MODEL.WEIGHTS is not such a run.

    Raises:
        CheckpointError: the run's record cannot be read.
        ConfigError: the config contradicts it.
    """
    if not cfg.MODEL.WEIGHTS or cfg.MODEL.META_ARCHITECTURE != "ViSFT":
        return
    try:
        record = read_record(cfg.MODEL.WEIGHTS)
    except CheckpointError as error:
        raise CheckpointError(f"MODEL.WEIGHTS: {error}") from error
    if record is None:
        return
    check_agreement(cfg, record)
    cfg.DATASETS.TRAIN = (Classes.from_json(record.classes).register(),)
    cfg.VISFT.DATA.update(dict.fromkeys(_TRAIN_DATA, ""))
    if _has_heads(cfg.MODEL.WEIGHTS):
        cfg.MODEL.VISFT.HEAD_FILES = ()
    for name in cfg.MODEL.VISFT.HEADS:
        key = f"MODEL.VISFT.{name.upper()}.VOCABULARY"
        if _value(cfg, key) == _value(record.config, key) is not None:
            cfg.MODEL.VISFT[name.upper()].VOCABULARY = ""  # the checkpoint has the vocabulary


def register_classes(cfg: CfgNode) -> None:
    """In a process with empty catalogs, register the classes that `adopt` put into the config."""
    if cfg.DATASETS.TRAIN and cfg.DATASETS.TRAIN[0].startswith(RUN_PREFIX):
        Classes.from_json(read_record(cfg.MODEL.WEIGHTS).classes).register()


def check_agreement(cfg: CfgNode, record: RunRecord) -> None:
    """Refuse a config that does not match the training of a run's weights.

    Raises:
        ConfigError: names the keys and both values.
    """
    found = [*_other_classes(cfg, record), *differences(cfg, record)]
    if found:
        raise ConfigError(
            f"the config disagrees with the run {cfg.MODEL.WEIGHTS}: {some(found, '; ')}. Leave "
            "--config-file out (a run has its own config), or set these keys to the run's values"
        )


def differences(cfg: CfgNode, record: RunRecord) -> list[str]:
    """List the keys that must match a run's weights but differ between a config and the run."""
    keys = [f"{node}.{key}" for node, names in (_TOWER, _LORA) for key in names]
    if tuple(cfg.VISFT.STAGES) == ("heads",) or cfg.MODEL.VISFT.TUNE == "full":
        keys = [key for key in keys if not key.startswith("MODEL.LORA")]  # the run has no LoRA
    for head in cfg.MODEL.VISFT.HEADS:
        node = cfg.MODEL.VISFT.get(head.upper(), {})
        names = [key for key in node if key in _HEAD or key.endswith(_HEAD_ENDS)]
        keys += [f"MODEL.VISFT.{head.upper()}.{key}" for key in names]
    found = []
    for key in keys:
        ours, theirs = _value(cfg, key), _value(record.config, key)
        if theirs is not None and ours != theirs:
            found.append(f"{key} is {ours!r}, in the run {theirs!r}")
    stock = DETECTRON2_DEFAULTS.MODEL
    given = [*cfg.MODEL.PIXEL_MEAN, *cfg.MODEL.PIXEL_STD]
    if given != [*stock.PIXEL_MEAN, *stock.PIXEL_STD]:
        theirs = [*record.config["MODEL"]["PIXEL_MEAN"], *record.config["MODEL"]["PIXEL_STD"]]
        if any(abs(a - b) > 1e-3 for a, b in zip(given, theirs, strict=True)):
            found.append(f"MODEL.PIXEL_MEAN and PIXEL_STD are {given}, in the run {theirs}")
    return found


def _is_path(base: str) -> bool:
    """Whether a base is a file, or a folder. A separator distinguishes a folder from a tag with the same name."""
    return os.path.isfile(base) or (os.path.sep in base and os.path.isdir(base))


def _has_heads(weights: str) -> bool:
    names = [name for file in run_files(weights) for name in files.read_shapes(file)]
    return any(name.startswith("heads.") for name in names)


def _other_classes(cfg: CfgNode, record: RunRecord) -> list[str]:
    """Describe how the classes of a config's training data differ from those that a run learned: one text or none."""
    own = [f"VISFT.DATA.{key}" for key in _TRAIN_DATA]
    if not cfg.DATASETS.TRAIN and not any(_value(cfg, key) for key in own):
        return []
    same = all(_value(cfg, key) == _value(record.config, key) for key in (*own, "DATASETS.TRAIN"))
    theirs = Classes.from_json(record.classes)
    if same or not theirs.names or (cfg.DATASETS.TRAIN and cfg.DATASETS.TRAIN[0].startswith(RUN_PREFIX)):
        return []
    cfg = cfg.clone()
    cfg.defrost()
    if cfg.VISFT.DATA.TRAIN_JSON:
        cfg.VISFT.DATA.TRAIN_CAPTIONS = cfg.VISFT.DATA.TRAIN_SHARDS = ""  # only the classes matter here
    try:
        register_own_data(cfg)
        name = cfg.DATASETS.TRAIN[0]
        if name not in DatasetCatalog:
            return [
                f"the run learned {_classes(theirs.names)}, but DATASETS.TRAIN names {name}, which is not registered"
            ]
        filled_metadata(name, "thing_classes")
        ours = Classes.known(cfg)
    except (VisftError, OSError) as error:
        return [
            f"the run learned {_classes(theirs.names)}, but the classes of DATASETS.TRAIN cannot be read ({error})"
        ]
    heads = [cfg.MODEL.VISFT.get(head.upper(), {}) for head in cfg.MODEL.VISFT.HEADS]
    ids = any(node.get("LABEL_SPACE") == "dataset_id" for node in heads)
    if ours.names == theirs.names and (not ids or ours.dataset_ids == theirs.dataset_ids):
        return []
    return [
        f"the run learned {_classes(theirs.names)}, but DATASETS.TRAIN ({name}) has {_classes(ours.names)}"
    ]


def _check_base(cfg: CfgNode) -> None:
    """Raise an error if the base is a file that no longer exists."""
    base = cfg.MODEL.CLIP_VIT.PRETRAINED
    if os.path.sep in base and "://" not in base and not os.path.exists(base):
        sha256 = (describe(run_files(cfg.MODEL.WEIGHTS)[-1]).get("base") or {}).get("sha256") or "unknown"
        raise CheckpointError(
            f"{cfg.MODEL.WEIGHTS}: was trained on the base {base}, which does not exist (SHA-256 {sha256[:12]}...; a "
            "run does not contain its base). Name the file with `MODEL.CLIP_VIT.PRETRAINED FILE`, or in Python "
            "visft.load(run, base=FILE)"
        )


def _value(config: Mapping[str, Any], key: str) -> Any:
    """Return the value of a full key, with tuples as lists as in YAML, or None if there is no such key."""
    value = settings.value_of(config, key)
    return list(value) if isinstance(value, tuple) else value


def _classes(names: Sequence[str]) -> str:
    return f"{len(names)} classes ({some(names)})"
