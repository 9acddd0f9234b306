"""A new caption head on the frozen tower, trained on COCO's captions and scored by CIDEr-D on nocaps' images."""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from towerbench import caption_readout, captions
from towerbench.dense_maps import grid_cells
from towerbench.errors import DataError
from towerbench.features import FeatureStore, Images
from towerbench.real import captioned, sources
from towerbench.real.captioned import CaptionedSet
from towerbench.registry import Context, variant
from towerbench.standardise import standardised

RECIPE = caption_readout.Recipe(dim=192, epochs=10, batch=64, rate=1e-3, min_count=5)

IMAGES = 9000
"""Number of images of train2017 that the readout sees. They are spread over the set and always the same."""

HELD = 9
"""One of this number of images is in the validation split."""

COCO_CAPTIONS, COCO_IMAGES = "coco/annotations/captions_train2017.json", "coco/train2017"
NOCAPS = "nocaps/nocaps_val_4500_captions.json|nocaps/annotations/nocaps_val_4500_captions.json"
NOCAPS_IMAGES = "nocaps/images|nocaps/val"


class NoCaps(sources.RealBenchmark):
    """Items are images of one domain. Scores are their CIDEr-D among this domain's captions, which can be above 1."""

    family, metric = "captioning", "CIDEr-D"
    version = 2
    domain = ""
    needs = {
        NOCAPS: "nocaps' validation captions",
        NOCAPS_IMAGES: "their 4,500 images, of Open Images",
        COCO_CAPTIONS: "of COCO's annotations_trainval2017.zip, for the readout",
        COCO_IMAGES: "COCO's images train2017, for the readout",
    }

    @classmethod
    def missing(cls, context: Context) -> str | None:
        return captions.missing() or super().missing(context)

    @functools.cached_property
    def set(self) -> CaptionedSet:
        """The images of the domain."""
        where = self.path(NOCAPS), self.path(NOCAPS_IMAGES)
        return captioned.coco_format(f"nocaps {self.domain}", *where, self.domain)

    @functools.cached_property
    def readout(self) -> dict[str, CaptionedSet]:
        """The images of COCO to train on, and to choose by."""
        file = self.path(COCO_CAPTIONS)
        return _readout_sets(file, self.path(COCO_IMAGES), file.stat().st_mtime_ns)

    def images(self, seed: int) -> Mapping[str, Images]:
        sets = {**self.readout, "test": self.set}
        # Images are shown whole, because captions also describe what is at their borders.
        return {part: each.images(fit="squash", dense=True) for part, each in sets.items()}

    def items(self, tower: FeatureStore, images: Mapping[str, Images], seed: int) -> np.ndarray:
        told = dict(enumerate(self.told(tower, images, seed)))
        scores = captions.cider_by_image(dict(enumerate(self.set.captions)), told)
        return np.array([scores[i] for i in told])

    def told(self, tower: FeatureStore, images: Mapping[str, Images], seed: int) -> list[str]:
        """What the readout says of each image. The domains share it."""
        key = "captioning", images["train"].identity, images["held"].identity, RECIPE, seed
        texts = {part: each.captions for part, each in self.readout.items()}
        return tower.once(key, lambda: trained(tower, images, texts, seed))(images["test"])


@functools.lru_cache(maxsize=1)
def _readout_sets(file: Path, folder: Path, _mtime_ns: int) -> dict[str, CaptionedSet]:
    whole = captioned.coco_format("coco train2017", file, folder)
    numbers = sources.spread(len(whole.files), IMAGES)
    if len(numbers) < 2:
        raise DataError(
            f"{file}: has captions of {len(numbers)} image; at least 2 are needed to train and to choose"
        )
    train, held = sources.train_and_held(numbers, HELD)
    return {
        "train": whole.part("coco to caption", train),
        "held": whole.part("coco to choose captions by", held),
    }


def trained(
    tower: FeatureStore, images: Mapping[str, Images], texts: Mapping[str, Sequence[Sequence[str]]], seed: int
) -> Callable[[Images], list[str]]:
    """Train a decoder on one tower's features. Return a function from images to the captions that it gives them.

    Args:
        images: `train` and `held`.
        texts: the captions of each of these images.
    """
    seen = standardised(lambda of: grid_cells(tower, of, RECIPE.grid), images["train"], channels=2)
    sides = (
        # Features are kept in half precision, because there are thousands of images.
        (torch.cat([part.half() for part in seen(images[name])]), texts[name])
        for name in ("train", "held")
    )
    captioner = caption_readout.trained(*sides, RECIPE, seed)
    return lambda of: [text for part in seen(of) for text in captioner.said(part)]


# The in-domain images show only COCO's classes, which fine-tuning on COCO learned (arXiv:1812.08658, section 3).
for _domain in ("in-domain", "near-domain", "out-domain"):
    variant(
        NoCaps,
        f"captioning nocaps-{_domain.removesuffix('-domain')}",
        f"nocaps' validation images that are {_domain}.",
        domain=_domain,
        in_domain=_domain == "in-domain",
    )
