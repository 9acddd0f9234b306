"""`tools/predict.py`: draws the predictions of a run's heads on the user's own images."""

import argparse
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.utils.logger import setup_logger
from torch import nn

from visft.checkpoint.run_folder import START, newest_checkpoint
from visft.classes.open_names import read_names
from visft.data import build_test_mapper, read_rgb
from visft.engine import checks, settings, stages
from visft.engine.evaluate import named_classes
from visft.engine.from_run import adopt, run_config, seed_of
from visft.engine.run_vocabulary import with_vocabulary
from visft.errors import ConfigError, DataError
from visft.utils import mixed_precision
from visft.utils.output_names import names_beside
from visft.visualization.drawing import save_image
from visft.visualization.predictions import (
    THRESHOLD,
    WORDS,
    beside,
    captions_in,
    draw,
    save_word_maps,
)

logger = logging.getLogger(__name__)

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff")


def find_images(paths: Iterable[str]) -> list[Path]:
    """Image files in order, including those directly in a given folder.

    Raises:
        DataError: a path does not exist, or there is no image.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            found += sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
        elif path.is_file():
            found.append(path)
        else:
            raise DataError(f"--input {path}: there is no such file or folder")
    if not found:
        raise DataError(f"--input {' '.join(map(str, paths))}: no images there ({', '.join(SUFFIXES)})")
    return found


@torch.no_grad()
def predict_files(
    model: nn.Module,
    mapper,
    files: Sequence[Path],
    folder: Path,
    *,
    heads: Sequence[str],
    metadata,
    threshold: float = THRESHOLD,
) -> list[Path]:
    """Draw each head's predictions on the user's own images; returns the files written.

    They are `folder/<name>.png` and, with a caption head, `folder/<name>_words.png` (where it looked at each word).
    They never replace an image of `files`.

    Args:
        mapper: the evaluation's, from a record to the model's input.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model.eval()
    written = []
    names = names_beside(files, folder, (".png", f"{WORDS}.png"))
    for file, name in zip(files, names, strict=True):
        record = {"file_name": str(file), "image_id": 0}
        image = mapper.read(record)
        output = model([mapper(record)])[0]
        panels = draw(image, output, heads, metadata, threshold=threshold)
        path = folder / f"{name}.png"
        captions = captions_in(output, heads)
        save_image(beside(panels, list(captions.items())), path)
        written.append(path)
        written += save_word_maps(image, captions, path)
        said = [f"{len(output[head])} from {head}" for head, _ in panels if head in output]
        said += [f'{head} "{caption}"' for head, caption in captions.items()]
        logger.info("%s: %s", path, ", ".join(said))
    return written


def run(args: argparse.Namespace) -> list[Path]:
    """Check, build the model, draw; returns the files written.

    Raises:
        ConfigError, DataError, CheckpointError: something is wrong; raised before anything is written.
    """
    cfg = _config(args)
    weights = cfg.MODEL.WEIGHTS
    if args.names is not None:
        names = tuple(name.strip() for name in args.names.split(","))
        read_names("--names", names)
        cfg.MODEL.VISFT.OPEN_VOCABULARY.NAMES = names
    checks.check(cfg, train=False, test=False)
    if cfg.MODEL.META_ARCHITECTURE != "ViSFT":
        raise ConfigError(
            f"MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE}; predict.py draws ViSFT's heads"
        )
    if not cfg.MODEL.VISFT.HEADS:
        raise ConfigError("MODEL.VISFT.HEADS is empty; predict.py draws what heads find, so name some")
    if not weights and not cfg.MODEL.VISFT.HEAD_FILES:
        raise ConfigError(
            f"no trained heads: {cfg.OUTPUT_DIR} holds no run and MODEL.VISFT.HEAD_FILES is empty; give --weights"
        )
    files = find_images(args.input)
    for file in files:
        read_rgb(file, max_pixels=cfg.VISFT.DATA.MAX_PIXELS)
    cfg.freeze()
    setup_logger(name="visft")
    cfg = with_vocabulary(cfg)
    model = stages.initial_model(cfg, seed_of(weights, cfg.SEED))
    with mixed_precision.evaluating(cfg):
        return predict_files(
            model,
            build_test_mapper(cfg),
            files,
            Path(args.output),
            heads=cfg.MODEL.VISFT.HEADS,
            metadata=named_classes(model),
            threshold=THRESHOLD if args.threshold is None else args.threshold,
        )


def _config(args: argparse.Namespace) -> CfgNode:
    """The config file's, or the run's own."""
    if not args.config_file:
        if not args.weights:
            raise ConfigError("give a run by --weights, or --config-file")
        return run_config(args.weights, args.opts)
    cfg = settings.load_config(args.config_file, args.opts)
    weights = args.weights or cfg.MODEL.WEIGHTS
    if not weights and any(newest_checkpoint(Path(cfg.OUTPUT_DIR) / part) for part in (START, "heads")):
        weights = cfg.OUTPUT_DIR
    cfg.MODEL.WEIGHTS = str(weights)
    adopt(cfg)
    return cfg
