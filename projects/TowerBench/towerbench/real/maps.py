"""What the benchmarks on maps of features share: which images, how large, classes as words, and two ways to tell them.

A class is told by its names, whose embeddings features are compared with, or by a probe that is trained on features.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from towerbench.errors import DataError
from towerbench.features import FeatureStore, Images
from towerbench.readout import Readout, chosen_on_validation
from towerbench.real import sources
from towerbench.registry import Context, variant

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


class Part(Protocol):
    """Annotated images: those of the test, or those that a probe trains on or is chosen by."""

    sources: Sequence[sources.Source]
    files: Sequence[Path]
    """That hold the annotations."""

    def part(self, numbers: Sequence[int]) -> "Part":
        """Some of its images."""
        ...


@dataclass(frozen=True)
class DataSet:
    """Where annotated images come from.

    Args:
        needs, trains_on: what the test and the probe's training need below `--data`, as `RealBenchmark.needs`.
        in_domain, item_set: as of `Benchmark`.
    """

    needs: Mapping[str, str]
    trains_on: Mapping[str, str]
    item_set: str
    in_domain: bool = False


class OnMaps(sources.RealBenchmark):
    """Classes of cells or regions are told from their features. `declare` registers one by names and one by a probe.

    Attributes:
        data_set: its name. annotations: what its annotations are called.
        names: the words for each class. classes: how many a probe tells apart.
    """

    data_set: str
    annotations: str
    probe = False
    names: Sequence[tuple[str, ...]]
    classes: int

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.test = self.read(train=False)
        self.parts: dict[str, Any] = {}
        if self.probe:
            whole = self.read(train=True)
            numbers = range(1, len(whole.sources) + 1)
            if len(numbers) < HELD_OF:
                raise DataError(
                    f"{whole.files[0]}: {len(numbers)} images are to train on; at least {HELD_OF} are needed, of which "
                    "one is to choose by"
                )
            self.parts["train"] = whole.part([n - 1 for n in numbers if n % HELD_OF])
            self.parts["validation"] = whole.part([n - 1 for n in numbers if n % HELD_OF == 0])

    def read(self, *, train: bool) -> Part:
        """At most `TEST` images to be tested, or `TRAIN` to train on.

        Raises:
            DataError: a file is missing or broken.
        """
        raise NotImplementedError

    def examples(self, tower: FeatureStore, images: Images, part: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Features `[M, C]` and classes `[M]` of a part that a probe sees."""
        raise NotImplementedError

    def images(self, seed: int) -> Mapping[str, Images]:
        """Of each part its images, and a set of none that stands for its annotations: where these change, old results
        are not taken up. The same files of one part are one set, whatever is told of them: ADE20K's validation images
        pass a tower once for regions and for segmentation."""
        found = {}
        for name, part in {"test": self.test, **self.parts}.items():
            what = f"{self.data_set} {name}"
            found[name] = sources.images(part.sources, what, fit="squash", scale=SCALE, dense=True)
            stand_in = sources.images((), f"{what} {self.annotations}", annotations=part.files)
            found[f"{name} {self.annotations}"] = stand_in
        return found

    def readout(self, tower: FeatureStore, images: Mapping[str, Images]) -> Readout:
        """What tells classes from features."""
        if self.probe:
            rows = [self.examples(tower, images[part], part) for part in self.parts]
            return chosen_on_validation(*rows, self.classes, L2).logits
        names = classifier(tower, self.names)
        return lambda features: tower.project(features) @ names.T


def declare(
    task: type[OnMaps], about: str, found: DataSet, metrics: Mapping[str, str], **attributes: object
) -> None:
    """Register a benchmark by names and one by a probe.

    Args:
        about: data set and kind, the end of the benchmarks' names.
        metrics: by what their names call it, first that by names.
    """
    for probe, (kind, metric) in enumerate(metrics.items()):
        variant(
            task,
            f"{task.family} {kind} {about}",
            f"{about}.",
            probe=bool(probe),
            version=1 + probe,
            metric=metric,
            needs={**found.needs, **(found.trains_on if probe else {})},
            in_domain=found.in_domain,
            item_set=found.item_set,
            **attributes,
        )


def words(name: str) -> tuple[str, ...]:
    """A class's names as words: `signboard, sign` and `Cabinet/shelf` have two each, `water_bottle` has two words."""
    parts = (" ".join(part.replace("_", " ").split()).lower() for part in re.split("[,/]", name))
    return tuple(part for part in parts if part)


def classifier(tower: FeatureStore, names: Sequence[Sequence[str]]) -> torch.Tensor:
    """Zero-shot classifiers `[classes, D]`: the mean over a class's names and over templates, of unit length."""
    each = tower.class_embeddings([word for several in names for word in several], TEMPLATES)
    place = torch.tensor([i for i, several in enumerate(names) for _ in several])
    return F.normalize(torch.zeros(len(names), each.shape[1]).index_add_(0, place, each), dim=-1)
