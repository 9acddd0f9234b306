"""Scenes of things that no fine-tuning scene contains are found by their captions, and captions by their scenes."""

from collections.abc import Mapping

import numpy as np

from towerbench import recall
from towerbench.demo import unseen
from towerbench.features import FeatureStore, Images
from towerbench.registry import Benchmark, register


@register
class RetrievalScenes(Benchmark):
    """recall@1/5/10 in both directions. Items are scenes. Each seed takes another caption of each scene."""

    name, family, metric = "retrieval scenes", "retrieval", "mean of recall@1, 5, 10, both ways"
    max_seeds = 3
    item_set = unseen.ITEMS

    def images(self, seed: int) -> Mapping[str, Images]:
        return {"scenes": unseen.images(self.context.split)}

    def items(self, tower: FeatureStore, images: Mapping[str, Images], seed: int) -> np.ndarray:
        captions = [[scene.captions[seed]] for scene in unseen.scenes(self.context.split)]
        of_captions, _, of_images = np.split(
            recall.of_captioned(tower, images["scenes"], captions), (3, 4), 1
        )
        return np.concatenate((of_images, of_captions), 1)
