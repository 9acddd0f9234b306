"""A fresh caption head on the frozen tower: scenes of things that no fine-tuning scene shows, scored by CIDEr-D."""

from collections.abc import Mapping

import numpy as np

from visft.evaluation import captions

from ..caption_readout import Recipe, said, trained
from ..features import FeatureStore, Pictures
from ..registry import Benchmark, Context, register
from . import regions, unseen

RECIPE = Recipe(grid=regions.GRID)


@register
class CaptioningScenes(Benchmark):
    """Items are scenes, scores their CIDEr-D; it can be above 1."""

    name, family, metric = "captioning scenes", "captioning", "CIDEr-D"
    quick_seeds = 1
    item_set = unseen.ITEMS

    @classmethod
    def missing(cls, context: Context) -> str | None:
        return None if captions.installed() else "needs pycocoevalcap (pip install 'visft[eval]')"

    def pictures(self, seed: int) -> Mapping[str, Pictures]:
        return unseen.readout_pictures(self.context.split)

    def items(self, tower: FeatureStore, pictures: Mapping[str, Pictures], seed: int) -> np.ndarray:
        cells = regions.standardised_cells(tower, pictures)
        texts = {
            part: [scene.captions for scene in unseen.scenes(part)]
            for part in ("train", "validation", self.context.split)
        }
        sides = ((cells[part], texts[part]) for part in ("train", "validation"))
        candidates = dict(enumerate(said(trained(*sides, RECIPE, seed), cells["test"])))
        scores = captions.cider_by_picture(dict(enumerate(texts[self.context.split])), candidates)
        return np.array([scores[i] for i in candidates])
