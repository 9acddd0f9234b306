#!/usr/bin/env python
"""Do captions of the demo's own scenes really get worse, or is the validation set too small to tell?

    captions.py RUN [RUN ...] [--scenes N] [--output DIR]

Compares the shipped caption head on the untuned tower with the same head on the tower of each run on N validation
scenes. A run is an OUTPUT_DIR, such as run.py's runs/ARM-SEED-ID. Reports CIDEr-D with a paired interval over scenes,
and the loss per word given the correct words before it, which does not depend on the search for a caption.
"""

import argparse
import dataclasses
import logging
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from detectron2.data import DatasetCatalog
from torch import nn

from towerbench import statistics
from towerbench.captions import cider_by_image
from visft.checkpoint import load
from visft.data import build_test_mapper
from visft.data.datasets import demo_world
from visft.data.datasets.captions import captions_of
from visft.engine import settings, stages
from visft.engine.run_vocabulary import with_vocabulary
from visft.model_zoo import get_config_file
from visft.utils import cli

logger = logging.getLogger("visft.captions")

HEAD, DATA = "captioning", "visft_demo_val"


@dataclasses.dataclass(frozen=True)
class Said:
    """A head's caption of each scene, and its loss per word of each scene's captions, by image id."""

    captions: dict[int, str]
    losses: dict[int, float]


def build(run: str | None) -> tuple[nn.Module, Callable[[dict], dict]]:
    """Return the shipped head on the demo tower tuned by a run (None: untuned), and its mapper."""
    words = ["MODEL.VISFT.HEADS", f"('{HEAD}',)", "MODEL.VISFT.HEAD_FILES", f"('visft://heads_demo_{HEAD}',)"]
    config = get_config_file("visft_demo")
    if run:
        config = str(Path(run) / "config.yaml")  # its LoRA
        words += ["MODEL.WEIGHTS", ""]
    cfg = with_vocabulary(settings.load_config(config, words))
    model = stages.initial_model(cfg, 0).eval()
    if run:
        load.load_tower(model.backbone, Path(run) / "lora")
    return model, build_test_mapper(cfg)


@torch.no_grad()
def said(
    model: nn.Module, mapper: Callable[[dict], dict], records: list[dict], truth: dict[int, list[str]]
) -> Said:
    """Caption scenes as in evaluation: one by one, without padding."""
    head, captions, losses = model.heads[HEAD], {}, {}
    for record in records:
        image, key = mapper(dict(record)), record["image_id"]
        inputs = model.extract([image])
        captions[key] = str(head.inference(inputs)[0])
        cells, sums, count = head.cells(inputs.features), 0.0, 0
        for caption in truth[key]:
            tokens = torch.tensor(head.vocabulary.encode(caption, head.max_length))[None]
            length = torch.tensor([tokens.shape[1] - 1])
            normalizers = torch.tensor([1.0, 1.0])  # the sum over words
            sums += float(head.caption_losses(cells, tokens, length, normalizers)["loss_words"])
            count += int(length)
        losses[key] = sums / count
    return Said(captions, losses)


def run(args: argparse.Namespace) -> list[str]:
    """Return one line for the untuned tower and one for each run."""
    demo_world.make(args.output, num_train=20, num_val=args.scenes)
    demo_world.register(Path(args.output))
    records, truth = DatasetCatalog.get(DATA), captions_of(DATA)
    built = {
        name: build(name) for name in (None, *args.runs)
    }  # build all first, so that a wrong run fails at once
    base, lines = None, []
    for name, (model, mapper) in built.items():
        found = said(model, mapper, records, truth)
        by_scene = cider_by_image(truth, found.captions)
        scores = np.array([[by_scene[key], found.losses[key]] for key in sorted(by_scene)])
        base = scores if base is None else base
        means = f"CIDEr-D {100 * scores[:, 0].mean():.1f}, loss {scores[:, 1].mean():.3f}"
        line = f"{name or 'the untuned tower'}: {means}"
        if name:
            cider, loss = (
                statistics.compare(DATA, base[None, :, [k]], scores[None, :, [k]], _mean) for k in (0, 1)
            )
            (low, high), (down, up) = cider.interval(), loss.interval()
            line += f"; CIDEr-D {cider.difference:+.1f} ({low:+.1f} to {high:+.1f})"
            line += f", loss {loss.difference / 100:+.3f} ({down / 100:+.3f} to {up / 100:+.3f})"
        logger.info("%s", line)
        lines.append(line)
    return lines


def _mean(means: np.ndarray) -> np.ndarray:
    return means[..., 0]


def main() -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="OUTPUT_DIR of a run on the demo tower")
    parser.add_argument(
        "--scenes", type=int, default=1000, help="number of validation scenes (make demo has 300)"
    )
    parser.add_argument("--output", default="output/demo_captions", help="folder of the scenes")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logger.setLevel(logging.INFO)
    return cli.guard(run, parser.parse_args(), again=cli.SAME)


if __name__ == "__main__":
    sys.exit(main())
