"""Images and captions found by each other: Flickr30k, DCI, Urban-1k, and, in fine-tuning's domain, COCO."""

import functools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from towerbench.demo.retrieval import AT
from towerbench.features import FeatureStore, Images
from towerbench.real import captioned, sources
from towerbench.real.captioned import CaptionedSet
from towerbench.registry import variant

CHUNK = 128
"""Queries that are compared with all images or captions at a time."""


class Retrieval(sources.RealBenchmark):
    """recall@1/5/10 both ways. Items are images with all their captions, of which an image may have any number."""

    family, metric = "retrieval", "mean of recall@1, 5, 10, both ways"

    def load(self) -> CaptionedSet:
        """The set."""
        raise NotImplementedError

    @functools.cached_property
    def set(self) -> CaptionedSet:
        """The set, read once."""
        return self.load()

    def images(self, seed: int) -> Mapping[str, Images]:
        return {"test": self.set.images()}

    def items(self, tower: FeatureStore, images: Mapping[str, Images], seed: int) -> np.ndarray:
        place: dict[str, int] = {}
        own = [[place.setdefault(text, len(place)) for text in texts] for texts in self.set.captions]
        return hits(tower.embeddings(images["test"]), tower.text(list(place)), own)

    def figure(self, means: np.ndarray) -> np.ndarray:
        # An image counts as a query once, each of its captions once: the latter's recall is a ratio of sums.
        ways = len(AT)
        of_captions = means[..., :ways] / means[..., ways : ways + 1]
        return np.concatenate((of_captions, means[..., ways + 1 :]), -1).mean(-1)


def hits(images: torch.Tensor, lines: torch.Tensor, own: Sequence[Sequence[int]]) -> np.ndarray:
    """Scores `[N, 7]`: of how many of an image's captions it is among the first 1, 5, 10 images; how many captions
    it has; whether one of them is among the first 1, 5, 10 captions.

    What is exactly as near as the right one stands behind it. So a caption that another image has too, word by word,
    does not count against an image's own.

    Args:
        images: `[N, D]` of unit length.
        lines: `[U, D]` of unit length, of different texts.
        own: by image the lines that are its captions.
    """
    owner = torch.tensor([i for i, several in enumerate(own) for _ in several])
    line = torch.tensor([u for several in own for u in several])
    before = []
    for captions in torch.arange(len(line)).split(CHUNK):
        similar = lines[line[captions]] @ images.T
        before.append((similar > similar.gather(1, owner[captions, None])).sum(1))
    of_captions = torch.zeros(len(own), len(AT) + 1, dtype=torch.float64)
    found = torch.stack([torch.cat(before) < k for k in AT] + [torch.ones_like(line, dtype=torch.bool)], 1)
    of_captions.index_add_(0, owner, found.double())
    times = line.bincount(minlength=len(lines)).double()
    before = []
    for numbers in torch.arange(len(own)).split(CHUNK):
        similar = images[numbers] @ lines.T
        best = torch.stack([row[own[i]].max() for i, row in zip(numbers.tolist(), similar, strict=True)])
        before.append((similar > best[:, None]).double() @ times)
    of_images = torch.stack([torch.cat(before) < k for k in AT], 1)
    return torch.cat((of_captions, of_images.double()), 1).numpy()


def _declare(
    name: str,
    needs: Mapping[str, str],
    load: Callable[..., CaptionedSet],
    about: str,
    in_domain: bool = False,
) -> None:
    """Register a set; `load` gets the path of each of `needs`, in their order."""
    variant(
        Retrieval,
        f"retrieval {name}",
        about,
        needs=needs,
        load=lambda self: load(*map(self.path, needs)),
        in_domain=in_domain,
    )


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
