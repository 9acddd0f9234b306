"""The common parts of benchmarks on feature maps: the choice of images, their size, classes as words, and two readouts.

One readout compares features with the embeddings of a class's names. The other is a probe that is trained on features.
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
"""Number of images of a set that are tested. They are spread over it."""

TRAIN, HELD_OF = 2500, 5
"""Number of images of the train split that a probe sees. Of every HELD_OF images, the last one is for choosing the
penalty."""

SCALE = 2.0
"""Maps are of images at twice the tower's native side, as in the demo suite."""

TEMPLATES = (
    "a photo of a {}.",
    "a photo of the {}.",
    "a close-up photo of a {}.",
    "a cropped photo of a {}.",
)
"""Four of CLIP's 80 templates, because there are thousands of names, and parts of images are shown."""

L2 = (1e-2, 1e-3, 1e-4)
"""The strengths of a probe's penalty that are tried."""


class Part(Protocol):
    """Annotated images: those of the test, or those that a probe trains on or is chosen by."""

    sources: Sequence[sources.Source]
    files: Sequence[Path]
    """The files with the annotations."""

    def part(self, numbers: Sequence[int]) -> "Part":
        """Return some of its images."""
        ...


@dataclass(frozen=True)
class DataSet:
    """Where annotated images come from.

    Args:
        needs, trains_on: what the test and the probe's training need below `--data`, as in `RealBenchmark.needs`.
        in_domain, item_set: as in `Benchmark`.
    """

    needs: Mapping[str, str]
    trains_on: Mapping[str, str]
    item_set: str
    in_domain: bool = False


class OnMaps(sources.RealBenchmark):
    """Tells the classes of cells or regions by their features. `declare` registers one by names and one by a probe.

    Attributes:
        data_set: its name.
        annotations: what its annotations are called.
        names: the words for each class.
        classes: the number of classes that a probe tells apart.
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
        """Return no more than `TEST` images to be tested, or `TRAIN` to train on.

        Raises:
            DataError: a file is missing or broken.
        """
        raise NotImplementedError

    def examples(self, tower: FeatureStore, images: Images, part: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return features `[M, C]` and classes `[M]` of a part that a probe sees."""
        raise NotImplementedError

    def images(self, seed: int) -> Mapping[str, Images]:
        """Return the images of each part, and an empty set that stands for its annotations.

        If the annotations change, old results are not used. The same files of one part are one set, whatever the
        benchmark: ADE20K's validation images pass a tower once for regions and for segmentation.
        """
        found = {}
        for name, part in {"test": self.test, **self.parts}.items():
            what = f"{self.data_set} {name}"
            found[name] = sources.images(part.sources, what, fit="squash", scale=SCALE, dense=True)
            stand_in = sources.images((), f"{what} {self.annotations}", annotations=part.files)
            found[f"{name} {self.annotations}"] = stand_in
        return found

    def readout(self, tower: FeatureStore, images: Mapping[str, Images]) -> Readout:
        """Return what tells classes by features."""
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
        metrics: what their names call the metric, first that by names.
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
    """Return a class's names as words. `signboard, sign` and `Cabinet/shelf` have two names, `water_bottle` has two
    words."""
    parts = (" ".join(part.replace("_", " ").split()).lower() for part in re.split("[,/]", name))
    return tuple(part for part in parts if part)


def classifier(tower: FeatureStore, names: Sequence[Sequence[str]]) -> torch.Tensor:
    """Return zero-shot classifiers `[classes, D]` of unit length: means over a class's names and over templates."""
    each = tower.class_embeddings([word for several in names for word in several], TEMPLATES)
    place = torch.tensor([i for i, several in enumerate(names) for _ in several])
    return F.normalize(torch.zeros(len(names), each.shape[1]).index_add_(0, place, each), dim=-1)
