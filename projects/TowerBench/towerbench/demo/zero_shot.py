"""Zero-shot classification of emoji that no fine-tuning scene contains, among the names of all of them."""

from collections.abc import Mapping

import numpy as np
import torch

from towerbench.demo import emoji
from towerbench.features import FeatureStore, Images
from towerbench.registry import Benchmark, Context, register


@register
class ZeroShotEmoji(Benchmark):
    """One view of each of the base vendor's drawings. Each seed has other views."""

    name, family, metric = "zero-shot emoji", "zero-shot", "top-1 accuracy"

    def indices(self) -> list[int]:
        """Return the indices into `catalogue()` of the emoji that are shown."""
        return emoji.of_split(self.context.split)

    def images(self, seed: int) -> Mapping[str, Images]:
        return {"views": emoji.views(self.indices(), 1, seed)}

    def items(self, tower: FeatureStore, images: Mapping[str, Images], seed: int) -> np.ndarray:
        return hits(tower, tower.embeddings(images["views"]), self.indices())


@register
class ZeroShotVendor(ZeroShotEmoji):
    """Zero-shot classification of another vendor's drawings."""

    name, metric = "zero-shot vendor", "top-1 accuracy, another vendor"

    @classmethod
    def missing(cls, context: Context) -> str | None:
        return None if context.images else "needs --pictures"

    def indices(self) -> list[int]:
        return [i for i in super().indices() if i in emoji.drawn_by(self.context.images)]

    def images(self, seed: int) -> Mapping[str, Images]:
        return {"views": emoji.views(self.indices(), 1, seed, folder=self.context.images)}


def hits(tower: FeatureStore, embeddings: torch.Tensor, indices: list[int]) -> np.ndarray:
    """Whether each embedding `[N, D]` is nearest to its emoji's name among the names of all unseen emoji: `[N]`."""
    classes = tower.class_embeddings(emoji.names(emoji.unseen()), emoji.TEMPLATES)
    place = {index: i for i, index in enumerate(emoji.unseen())}
    labels = torch.tensor([place[i] for i in indices])
    return ((embeddings @ classes.T).argmax(1) == labels).numpy()
