"""A new caption head on the frozen tower, scored by CIDEr-D on scenes of things that no fine-tuning scene contains."""

from collections.abc import Mapping

import numpy as np

from towerbench import captions
from towerbench.caption_readout import Recipe, trained
from towerbench.demo import regions, unseen
from towerbench.features import FeatureStore, Images
from towerbench.registry import Benchmark, Context, register

RECIPE = Recipe(grid=regions.GRID)
STARTS = 3
"""Number of heads that are trained. Scores are their mean, because the start alone moves CIDEr-D by some 7 points."""


@register
class CaptioningScenes(Benchmark):
    """Items are scenes. The score of a scene is its CIDEr-D, which can be above 1.

    The heads learn the last caption of a scene, which names the things and the background, and are scored against all
    captions. If they learned all kinds, the score would show which kind a head happens to prefer.
    """

    name, family, metric = "captioning scenes", "captioning", "CIDEr-D"
    quick_seeds = 1
    readout_seconds = 51
    version = 3
    item_set = unseen.ITEMS

    @classmethod
    def missing(cls, context: Context) -> str | None:
        return captions.missing()

    def images(self, seed: int) -> Mapping[str, Images]:
        return unseen.readout_images(self.context.split)

    def items(self, tower: FeatureStore, images: Mapping[str, Images], seed: int) -> np.ndarray:
        cells = regions.standardised_cells(tower, images)
        parts = unseen.parts(self.context.split).items()
        texts = {name: [scene.captions for scene in unseen.scenes(part)] for name, part in parts}
        sides = [(cells[name], [each[-1:] for each in texts[name]]) for name in ("train", "validation")]
        references = dict(enumerate(texts["test"]))
        found = []
        for start in range(STARTS):
            captioner = trained(*sides, RECIPE, STARTS * seed + start)
            scores = captions.cider_by_image(references, dict(enumerate(captioner.said(cells["test"]))))
            found.append([scores[i] for i in references])
        return np.mean(found, axis=0)
