"""Grounded object identification: what is the thing in this box, or under this mask? Of things never fine-tuned on."""

from collections.abc import Mapping

import numpy as np
import torch

from towerbench.demo import emoji, regions, unseen
from towerbench.features import FeatureStore, Images
from towerbench.readout import chosen_on_validation
from towerbench.region_pooling import within
from towerbench.registry import Benchmark, register

L2 = (1e-2, 1e-3, 1e-4)


class _Objects(Benchmark):
    """Items are scenes; columns are how many of its objects were named right at once and within five guesses, by mask
    and by box, and how many there are."""

    family = "goi"
    max_seeds = 1
    """Nothing is drawn."""
    item_set = unseen.ITEMS

    def named(self, tower: FeatureStore, images: Mapping[str, Images], kind: str) -> torch.Tensor:
        """Scores of every category for each object of the split, `[M, categories]`."""
        raise NotImplementedError

    def items(self, tower: FeatureStore, images: Mapping[str, Images], seed: int) -> np.ndarray:
        _, labels = regions.objects(self.context.split)
        columns = [within(self.named(tower, images, kind), labels) for kind in regions.KINDS]
        columns.append(torch.ones(len(labels), 1, dtype=torch.bool))
        return regions.per_scene(torch.cat(columns, 1), self.context.split)

    def figure(self, means: np.ndarray) -> np.ndarray:
        return (means[..., :-1] / means[..., -1:]).mean(-1)


@register
class GoiZeroShot(_Objects):
    """The object's mean feature, brought into the space of texts, against the names of all categories."""

    name, metric = "goi zero-shot", "top-1 and top-5 accuracy by mask and box"

    def images(self, seed: int) -> Mapping[str, Images]:
        return {"test": unseen.images(self.context.split, dense=True)}

    def named(self, tower: FeatureStore, images: Mapping[str, Images], kind: str) -> torch.Tensor:
        features = regions.pooled(tower, images["test"], self.context.split, kind)
        names = tower.class_embeddings(unseen.categories(), emoji.TEMPLATES)
        return tower.project(features) @ names.T


@register
class GoiProbe(_Objects):
    """Logistic regression on the object's mean feature."""

    name, metric = "goi probe", "top-1 and top-5 accuracy of a linear probe by mask and box"
    readout_seconds = 9
    version = 2

    def images(self, seed: int) -> Mapping[str, Images]:
        return unseen.readout_images(self.context.split)

    def named(self, tower: FeatureStore, images: Mapping[str, Images], kind: str) -> torch.Tensor:
        train, validation = (
            (regions.pooled(tower, images[part], part, kind), regions.objects(part)[1])
            for part in ("train", "validation")
        )
        model = chosen_on_validation(train, validation, len(unseen.categories()), L2)
        return model.logits(regions.pooled(tower, images["test"], self.context.split, kind))
