"""Zero-shot classification: ImageNet and its relatives with CLIP's 80 templates, VTAB with clip-benchmark's."""

import functools
from collections.abc import Callable, Iterator, Mapping

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
    """Items are images: whether the nearest of the classes' names is right."""

    family, metric = "zero-shot", "top-1 accuracy"

    def load(self) -> LabelledSet:
        """The set."""
        raise NotImplementedError

    @functools.cached_property
    def set(self) -> LabelledSet:
        """The set, read once."""
        return self.load()

    def images(self, seed: int) -> Mapping[str, Images]:
        return {"test": images_of(self.set, self.name.removeprefix("zero-shot "))}

    def items(self, tower: FeatureStore, images: Mapping[str, Images], seed: int) -> np.ndarray:
        classes = self.set.classifier(tower)
        return (
            (tower.embeddings(images["test"]) @ classes.T).argmax(1) == torch.tensor(self.set.labels)
        ).numpy()


def images_of(labelled: LabelledSet, name: str) -> Images:
    """A set's images as CLIP is evaluated: the shorter side to the tower's, the middle cut out."""
    if not labelled.border:
        return sources.images(labelled.sources, name)
    name = f"{name} without {labelled.border} pixels of border"
    return sources.images(
        labelled.sources, name, change=lambda image, _: without_border(image, labelled.border)
    )


def without_border(image: np.ndarray, border: int) -> Iterator[np.ndarray]:
    """`[H, W, 3]` less so many pixels on every side."""
    yield image[border : image.shape[0] - border, border : image.shape[1] - border]


BY_NAME: dict[str, type[ZeroShot]] = {}
"""The benchmarks of this file by their sets, which others show too."""


def _declare(name: str, needs: Mapping[str, str], load: Callable[[ZeroShot], LabelledSet]) -> None:
    about = f"{name}, all its images."
    BY_NAME[name] = variant(ZeroShot, f"zero-shot {name}", about, needs=needs, load=load, item_set=name)


for _name, (_paths, _what, _classes) in IMAGENET_VARIANTS.items():
    _declare(
        _name,
        {_paths: _what},
        lambda self, paths=_paths, classes=_classes: imagenet_like(self.path(paths), classes),
    )
_declare(
    "objectnet",
    {OBJECTNET: "ObjectNet, as its archive unpacks: images and mappings"},
    lambda self: objectnet(self.path(OBJECTNET)),
)
for _name in VTAB:
    _declare(
        f"vtab/{_name}",
        {webdataset_paths(_name, "test"): "of clip-benchmark's webdataset, to be tested"},
        lambda self, name=_name: webdataset(self.path(webdataset_paths(name, "test")).parent, "test"),
    )
