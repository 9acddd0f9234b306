"""Grounded object identification: what is the thing in this box, or under this mask? Of things never fine-tuned on."""

from collections.abc import Mapping

import numpy as np
import torch

from ..features import FeatureStore, Pictures
from ..readout import chosen_on_validation
from ..registry import Benchmark, register
from . import emoji, regions, unseen

AT = (1, 5)
L2 = (1e-2, 1e-3, 1e-4)


class _Objects(Benchmark):
    """Items are scenes; columns are how many of its objects were named right at once and within five guesses, by mask
    and by box, and how many there are."""

    family = "goi"
    max_seeds = 1
    """Nothing is drawn."""
    item_set = unseen.ITEMS

    def named(self, tower: FeatureStore, pictures: Mapping[str, Pictures], kind: str) -> torch.Tensor:
        """Scores of every category for each object of the split, `[M, categories]`."""
        raise NotImplementedError

    def items(self, tower: FeatureStore, pictures: Mapping[str, Pictures], seed: int) -> np.ndarray:
        _, labels = regions.objects(self.context.split)
        columns = []
        for kind in regions.KINDS:
            scores = self.named(tower, pictures, kind)
            # What is told from nothing else counts as wrong.
            rank = (scores >= scores.gather(1, labels[:, None])).sum(1) - 1
            columns += [rank < k for k in AT]
        columns.append(torch.ones(len(labels), dtype=torch.bool))
        return regions.per_scene(torch.stack(columns, 1), self.context.split)

    def figure(self, means: np.ndarray) -> np.ndarray:
        return (means[..., :-1] / means[..., -1:]).mean(-1)


@register
class GoiZeroShot(_Objects):
    """The object's mean feature, brought into the space of texts, against the names of all categories."""

    name, metric = "goi zero-shot", "top-1 and top-5 accuracy by mask and box"

    def pictures(self, seed: int) -> Mapping[str, Pictures]:
        return {"test": unseen.pictures(self.context.split, dense=True)}

    def named(self, tower: FeatureStore, pictures: Mapping[str, Pictures], kind: str) -> torch.Tensor:
        features = regions.pooled(tower, pictures["test"], self.context.split, kind)
        names = tower.class_embeddings(unseen.categories(), emoji.TEMPLATES)
        return tower.project(features) @ names.T


@register
class GoiProbe(_Objects):
    """Logistic regression on the object's mean feature."""

    name, metric = "goi probe", "top-1 and top-5 accuracy of a linear probe by mask and box"

    def pictures(self, seed: int) -> Mapping[str, Pictures]:
        return unseen.readout_pictures(self.context.split)

    def named(self, tower: FeatureStore, pictures: Mapping[str, Pictures], kind: str) -> torch.Tensor:
        train, validation = (
            (regions.pooled(tower, pictures[part], part, kind), regions.objects(part)[1])
            for part in ("train", "validation")
        )
        model = chosen_on_validation(train, validation, len(unseen.categories()), L2)
        return model.logits(regions.pooled(tower, pictures["test"], self.context.split, kind))
