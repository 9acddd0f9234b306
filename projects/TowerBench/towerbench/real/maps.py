"""What the benchmarks on maps of features share: which images, how large, and classes as words."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from towerbench.features import FeatureStore, Images
from towerbench.real import sources

TEST = 2000
"""Images of a set that are tested, spread over it."""

TRAIN, HELD_OF = 2500, 5
"""Images of its train split that a probe sees; of every HELD_OF the last one is to choose the penalty by."""

SCALE = 2.0
"""Maps are of images at twice the tower's native side, as in the demo suite."""

TEMPLATES = (
    "a photo of a {}.",
    "a photo of the {}.",
    "a close-up photo of a {}.",
    "a cropped photo of a {}.",
)
"""Four of CLIP's 80: thousands of names are told apart, and parts of images are seen."""

L2 = (1e-2, 1e-3, 1e-4)
"""Strengths of a probe's penalty that are tried."""


def images(shown: Sequence[sources.Source], data_set: str, part: str) -> Images:
    """A part of a data set, for maps. The same files of one part are one set, whatever annotations go with them:
    ADE20K's validation images pass a tower once for regions and for segmentation."""
    return sources.images(shown, f"{data_set} {part}", fit="squash", scale=SCALE, dense=True)


def train_and_held(count: int) -> tuple[list[int], list[int]]:
    """So many images parted, by number: to train on, and to choose the penalty by (see `HELD_OF`)."""
    held = list(range(HELD_OF - 1, count, HELD_OF))
    return [number for number in range(count) if (number + 1) % HELD_OF], held


def annotated(files: Iterable[Path], name: str) -> Images:
    """A set of no images that stands for files of annotations: where they change, old results are not taken up."""
    return sources.images((), name, annotations=files)


def words(name: str) -> tuple[str, ...]:
    """A class's names as words: `signboard, sign` and `Cabinet/shelf` have two each, `water_bottle` has two words."""
    parts = (" ".join(part.replace("_", " ").split()).lower() for part in re.split("[,/]", name))
    return tuple(part for part in parts if part)


def classifier(tower: FeatureStore, names: Sequence[Sequence[str]]) -> torch.Tensor:
    """Zero-shot classifiers `[classes, D]`: the mean over a class's names and over templates, of unit length."""
    each = tower.class_embeddings([word for several in names for word in several], TEMPLATES)
    place = torch.tensor([i for i, several in enumerate(names) for _ in several])
    return F.normalize(torch.zeros(len(names), each.shape[1]).index_add_(0, place, each), dim=-1)
