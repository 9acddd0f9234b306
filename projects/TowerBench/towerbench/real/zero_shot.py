"""Zero-shot classification: ImageNet and its relatives with CLIP's 80 templates, VTAB with clip-benchmark's."""

import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch

from towerbench.features import FeatureStore, Images
from towerbench.real import sources
from towerbench.real.classification import (
    IMAGENET_VARIANTS,
    OBJECTNET,
    VTAB,
    LabelledSet,
    imagenet_like,
    objectnet,
    webdataset,
    webdataset_paths,
)
from towerbench.registry import variant


class ZeroShot(sources.RealBenchmark):
    """Items are images. The score is whether the nearest of the classes' names is right."""

    family, metric = "zero-shot", "top-1 accuracy"

    load: Callable[[Path], LabelledSet]
    """From what `needs` names to the set."""

    @functools.cached_property
    def set(self) -> LabelledSet:
        """The set, which is read once."""
        [paths] = self.needs
        return self.load(self.path(paths))

    def images(self, seed: int) -> Mapping[str, Images]:
        return {"test": images_of(self.set, self.name.removeprefix("zero-shot "))}

    def items(self, tower: FeatureStore, images: Mapping[str, Images], seed: int) -> np.ndarray:
        classes = self.set.classifier(tower)
        found = (tower.embeddings(images["test"]) @ classes.T).argmax(1)
        return (found == torch.tensor(self.set.labels)).numpy()


def images_of(labelled: LabelledSet, name: str) -> Images:
    """Return a set's images in the form of CLIP's evaluation: the shorter side is the tower's, and the middle is cut
    out."""
    if not labelled.border:
        return sources.images(labelled.sources, name)
    name = f"{name} without {labelled.border} pixels of border"
    return sources.images(
        labelled.sources, name, change=lambda image, _: without_border(image, labelled.border)
    )


def without_border(image: np.ndarray, border: int) -> Iterator[np.ndarray]:
    """Yield `[H, W, 3]` without `border` pixels at every side."""
    yield image[border : image.shape[0] - border, border : image.shape[1] - border]


BY_NAME: dict[str, type[ZeroShot]] = {}
"""The benchmarks of this file by their sets. Other benchmarks use these sets too."""


def _declare(name: str, paths: str, what: str, load: Callable[[Path], LabelledSet]) -> None:
    own = {"needs": {paths: what}, "load": staticmethod(load), "item_set": name}
    BY_NAME[name] = variant(ZeroShot, f"zero-shot {name}", f"{name}, all its images.", **own)


for _name, (_paths, _what, _classes) in IMAGENET_VARIANTS.items():
    _declare(_name, _paths, _what, functools.partial(imagenet_like, classes=_classes))
_declare("objectnet", OBJECTNET, "ObjectNet, as its archive unpacks: images and mappings", objectnet)
for _name in VTAB:
    _paths, _what = webdataset_paths(_name, "test"), "of clip-benchmark's webdataset, to be tested"
    _declare(f"vtab/{_name}", _paths, _what, webdataset)
