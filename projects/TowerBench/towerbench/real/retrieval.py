"""Images are found by captions, and captions by images: Flickr30k, DCI, Urban-1k, and COCO, which is in-domain."""

import functools
from collections.abc import Callable, Mapping

import numpy as np

from towerbench import recall
from towerbench.features import FeatureStore, Images
from towerbench.real import captioned, sources
from towerbench.real.captioned import CaptionedSet
from towerbench.registry import variant


class Retrieval(sources.RealBenchmark):
    """recall@1/5/10 in both directions. Items are images with all their captions. An image may have any number of
    captions."""

    family, metric = "retrieval", "mean of recall@1, 5, 10, both ways"

    load: Callable[..., CaptionedSet]
    """From what `needs` names, in this order, to the set."""

    @functools.cached_property
    def set(self) -> CaptionedSet:
        """The set, which is read once."""
        return self.load(*map(self.path, self.needs))

    def images(self, seed: int) -> Mapping[str, Images]:
        return {"test": self.set.images()}

    def items(self, tower: FeatureStore, images: Mapping[str, Images], seed: int) -> np.ndarray:
        return recall.of_captioned(tower, images["test"], self.set.captions)

    def figure(self, means: np.ndarray) -> np.ndarray:
        # An image is one query, and so is each of its captions. The recall of captions is therefore a ratio of sums.
        ways = len(recall.AT)
        of_captions = means[..., :ways] / means[..., ways : ways + 1]
        return np.concatenate((of_captions, means[..., ways + 1 :]), -1).mean(-1)


def _declare(
    name: str,
    needs: Mapping[str, str],
    load: Callable[..., CaptionedSet],
    about: str,
    in_domain: bool = False,
) -> None:
    own = {"needs": needs, "load": staticmethod(load), "in_domain": in_domain}
    variant(Retrieval, f"retrieval {name}", about, **own)


_declare(
    "flickr30k",
    {
        "flickr30k/dataset_flickr30k.json|caption_datasets/dataset_flickr30k.json": (
            "of Karpathy's caption_datasets.zip"
        ),
        "flickr30k/flickr30k-images|flickr30k-images": "Flickr30k's images, as its archive unpacks",
    },
    captioned.karpathy_flickr30k,
    "Flickr30k, Karpathy's test split.",
)
_declare(
    "dci",
    {
        "densely_captioned_images/splits.json": "Densely Captioned Images, as dci.tar.gz unpacks",
        "densely_captioned_images/annotations|densely_captioned_images/complete": "of the same archive",
        "densely_captioned_images/photos": "the images of SA-1B's sa_000138.tar",
    },
    captioned.dci,
    "Densely Captioned Images, long captions, which the text tower's context cuts.",
)
_declare(
    "urban-1k",
    {"Urban1k": "Long-CLIP's Urban1k, as its archive unpacks: image and caption"},
    captioned.urban1k,
    "Urban-1k, long captions, which the text tower's context cuts.",
)
_declare(
    "coco",
    {
        "coco/annotations/captions_val2017.json": "of COCO's annotations_trainval2017.zip",
        "coco/val2017": "COCO's images val2017",
    },
    lambda file, folder: captioned.coco_format("coco val2017", file, folder),
    "COCO's val2017: images like those that fine-tuning saw.",
    in_domain=True,
)
_declare(
    "coco-karpathy",
    {
        "coco/dataset_coco.json|caption_datasets/dataset_coco.json": "of Karpathy's caption_datasets.zip",
        "coco/val2014|coco/train2017": "COCO's images: val2014, or both train2017 and val2017",
    },
    lambda file, folder: captioned.karpathy_coco(file, folder.parent),
    "COCO, Karpathy's test split: for the most part images that fine-tuning on train2017 saw.",
    in_domain=True,
)
