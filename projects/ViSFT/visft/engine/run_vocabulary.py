"""The vocabulary of a run's caption heads: the file that the config names, the run's own, or a new one."""

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.utils import comm

from visft.checkpoint.run_folder import PARTS, head_file, run_files
from visft.data.caption_vocabulary import build_vocabulary
from visft.data.datasets.captions import check_captions
from visft.errors import CheckpointError, ConfigError, DataError
from visft.evaluation.caption_metrics import check_metrics
from visft.modeling.heads.captioning.vocabulary import (
    Vocabulary,
    carries_vocabulary,
    configured_vocabulary,
)

logger = logging.getLogger(__name__)

FILE = "vocabulary.json"
"""Kept in OUTPUT_DIR, beside the folders of checkpoints."""


def caption_heads(cfg: CfgNode) -> list[str]:
    """Return the heads in MODEL.VISFT.HEADS that have a vocabulary."""
    return [name for name in cfg.MODEL.VISFT.HEADS if "VOCABULARY" in cfg.MODEL.VISFT.get(name.upper(), {})]


def check(cfg: CfgNode, *, train: bool) -> None:
    """Check vocabularies and, for training, captions, before anything is built.

    Raises:
        ConfigError: there is no vocabulary and none will be built, or the weights were trained with another one.
        DataError: a vocabulary or caption file is broken, or no training image has a caption.
    """
    names = caption_heads(cfg)
    if not names:
        return
    check_metrics(cfg.VISFT.CAPTION_METRICS)
    if train and not sum(check_captions(data_set) for data_set in cfg.DATASETS.TRAIN):
        raise DataError(
            f"the head `{names[0]}` learns captions, and no image of DATASETS.TRAIN ({', '.join(cfg.DATASETS.TRAIN)})"
            " has any: put COCO's captions_*.json beside its instances_*.json, set VISFT.DATA.TRAIN_CAPTIONS or "
            "TRAIN_SHARDS for your own data, or take the head out of MODEL.VISFT.HEADS"
        )
    for name in names:
        node, key = cfg.MODEL.VISFT[name.upper()], f"MODEL.VISFT.{name.upper()}"
        path = node.VOCABULARY or _kept(cfg)
        if path:
            vocabulary = configured_vocabulary(cfg, name) if node.VOCABULARY else Vocabulary.read(path)
            _check_weights(cfg, key, str(path), vocabulary)
        elif train:
            build_vocabulary(cfg.DATASETS.TRAIN, node.MIN_WORD_COUNT)
        else:
            raise ConfigError(
                f"{key}.VOCABULARY is empty, and there is no {FILE} in {cfg.OUTPUT_DIR} or beside MODEL.WEIGHTS: name "
                "the file that the head was trained with"
            )


def _check_weights(cfg: CfgNode, key: str, path: str, vocabulary: Vocabulary) -> None:
    """Refuse weights that were trained with another vocabulary. One of the same size would load and give nonsense."""
    for file in _weight_files(cfg):
        if carries_vocabulary(file) and Vocabulary.read(file) != vocabulary:
            raise ConfigError(
                f"{key}.VOCABULARY: {path} has other words than those that {file} was trained with; leave the key "
                "empty to use that file's own"
            )


def with_vocabulary(cfg: CfgNode, folder: str | os.PathLike | None = None) -> CfgNode:
    """Return the config with a file in the VOCABULARY of every caption head. It is frozen if `cfg` is.

    If the key is empty, the vocabulary is that of MODEL.WEIGHTS, of HEAD_FILES (in the file or beside it), or of the
    run in OUTPUT_DIR, in this order. Otherwise it is built from the captions of DATASETS.TRAIN.

    Args:
        folder: OUTPUT_DIR of a training run, which stores its vocabulary there.

    Raises:
        ConfigError: the run in `folder` was started with another vocabulary.
    """
    names = caption_heads(cfg)
    if not names:
        return cfg
    frozen, cfg = cfg.is_frozen(), cfg.clone()
    cfg.defrost()
    found = _kept(cfg)
    for name in names:
        node = cfg.MODEL.VISFT[name.upper()]
        if not node.VOCABULARY and found:
            node.VOCABULARY = str(found)
            logger.info("head `%s`: using the vocabulary of %s", name, found)
        if folder is not None:
            if comm.is_main_process():
                _keep(cfg, name, Path(folder) / FILE)
            comm.synchronize()
            node.VOCABULARY = str(Path(folder) / FILE)
    if frozen:
        cfg.freeze()
    return cfg


def words_of(cfg: CfgNode) -> list[str]:
    """Return the vocabulary of a run's caption heads for its checkpoints, or [] without such a head."""
    names = caption_heads(cfg)
    return list(configured_vocabulary(cfg, names[0]).words) if names else []


def _keep(cfg: CfgNode, name: str, path: Path) -> None:
    node = cfg.MODEL.VISFT[name.upper()]
    if node.VOCABULARY:
        vocabulary = configured_vocabulary(cfg, name)
    else:
        vocabulary = build_vocabulary(cfg.DATASETS.TRAIN, node.MIN_WORD_COUNT)
    if not path.is_file():
        vocabulary.write(path)
    elif Vocabulary.read(path) != vocabulary:
        raise ConfigError(
            f"MODEL.VISFT.{name.upper()}.VOCABULARY is {node.VOCABULARY}, but the run was started with other words "
            f"({path}); leave the key empty to use them"
        )


def _kept(cfg: CfgNode) -> Path | None:
    """Return the file with the vocabulary of the weights that the config names, or of the run in OUTPUT_DIR."""
    for file in _weight_files(cfg):
        if carries_vocabulary(file):
            return file
        folders = [file.parent, *([file.parent.parent] if file.parent.name in PARTS else [])]
        for folder in folders:
            if (folder / FILE).is_file():
                return folder / FILE
    own = Path(cfg.OUTPUT_DIR) / FILE
    return own if own.is_file() else None


def _weight_files(cfg: CfgNode) -> Iterator[Path]:
    """Yield the existing files of MODEL.WEIGHTS and HEAD_FILES. Another check reports missing files.

    HEAD_FILES are left out if REINIT_CLASSES lets a caption head ignore their vocabulary.
    """
    reinit = any(cfg.MODEL.VISFT[name.upper()].REINIT_CLASSES for name in caption_heads(cfg))
    if cfg.MODEL.WEIGHTS:
        with contextlib.suppress(CheckpointError):
            yield from run_files(cfg.MODEL.WEIGHTS)
    for given in () if reinit else cfg.MODEL.VISFT.HEAD_FILES:
        with contextlib.suppress(CheckpointError):
            yield head_file(given)
