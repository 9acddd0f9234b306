"""Grounded object identification: what is the thing in this box, or under this mask? No fine-tuning scene contains
these things."""

from collections.abc import Mapping

import numpy as np
import torch

from towerbench.demo import emoji, regions, unseen
from towerbench.features import FeatureStore, Images
from towerbench.readout import Readout, chosen_on_validation
from towerbench.region_pooling import within
from towerbench.registry import Benchmark, register

L2 = (1e-2, 1e-3, 1e-4)


class _Objects(Benchmark):
    """Items are scenes. Columns are the numbers of objects named correctly at the first guess and within five guesses,
    by mask and by box, and the number of objects."""

    family = "goi"
    max_seeds = 1
    """Nothing is random."""
    item_set = unseen.ITEMS

    def readout(self, tower: FeatureStore, images: Mapping[str, Images], kind: str) -> Readout:
        """Return what tells categories from the mean features of objects. `kind` is what is given of an object."""
        raise NotImplementedError

    def items(self, tower: FeatureStore, images: Mapping[str, Images], seed: int) -> np.ndarray:
        split = self.context.split
        _, labels = regions.objects(split)
        columns = []
        for kind in regions.KINDS:
            readout = self.readout(tower, images, kind)
            columns.append(within(readout(regions.pooled(tower, images["test"], split, kind)), labels))
        columns.append(torch.ones(len(labels), 1, dtype=torch.bool))
        return regions.per_scene(torch.cat(columns, 1), split)

    def figure(self, means: np.ndarray) -> np.ndarray:
        return (means[..., :-1] / means[..., -1:]).mean(-1)


@register
class GoiZeroShot(_Objects):
    """The object's mean feature is projected into the space of texts and compared with the names of all categories."""

    name, metric = "goi zero-shot", "top-1 and top-5 accuracy by mask and box"

    def images(self, seed: int) -> Mapping[str, Images]:
        return {"test": unseen.images(self.context.split, dense=True)}

    def readout(self, tower: FeatureStore, images: Mapping[str, Images], kind: str) -> Readout:
        names = tower.class_embeddings(unseen.categories(), emoji.TEMPLATES)
        return lambda features: tower.project(features) @ names.T


@register
class GoiProbe(_Objects):
    """A logistic regression on the object's mean feature."""

    name, metric = "goi probe", "top-1 and top-5 accuracy of a linear probe by mask and box"
    readout_seconds = 9
    version = 2

    def images(self, seed: int) -> Mapping[str, Images]:
        return unseen.readout_images(self.context.split)

    def readout(self, tower: FeatureStore, images: Mapping[str, Images], kind: str) -> Readout:
        train, validation = (
            (regions.pooled(tower, images[part], part, kind), regions.objects(part)[1])
            for part in ("train", "validation")
        )
        return chosen_on_validation(train, validation, len(unseen.categories()), L2).logits
