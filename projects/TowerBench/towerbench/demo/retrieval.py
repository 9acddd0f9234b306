"""Scenes and captions of things that no fine-tuning scene shows, found by each other."""

from collections.abc import Mapping

import numpy as np
import torch

from towerbench.demo import unseen
from towerbench.features import FeatureStore, Images
from towerbench.registry import Benchmark, register

AT = (1, 5, 10)


@register
class RetrievalScenes(Benchmark):
    """recall@1/5/10 both ways. Items are scenes; each seed takes another of a scene's captions."""

    name, family, metric = "retrieval scenes", "retrieval", "mean of recall@1, 5, 10, both ways"
    max_seeds = 3
    item_set = unseen.ITEMS

    def images(self, seed: int) -> Mapping[str, Images]:
        return {"scenes": unseen.images(self.context.split)}

    def items(self, tower: FeatureStore, images: Mapping[str, Images], seed: int) -> np.ndarray:
        captions = [scene.captions[seed] for scene in unseen.scenes(self.context.split)]
        return recalls(tower.embeddings(images["scenes"]) @ tower.text(captions).T)


def recalls(similarity: torch.Tensor) -> np.ndarray:
    """`[N, N]` (images, captions; pairs on the diagonal) -> `[N, 6]`: found among the first 1, 5, 10, both ways.

    A caption that several scenes share is as near to each: it does not count against its own.
    """
    own = similarity.diagonal()
    columns = []
    for better in ((similarity > own[:, None]).sum(1), (similarity > own[None]).sum(0)):
        columns += [better < k for k in AT]
    return torch.stack(columns, 1).numpy()
