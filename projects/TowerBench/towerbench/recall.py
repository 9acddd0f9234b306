"""Images and captions found by each other: what the retrieval benchmarks of both suites share."""

from collections.abc import Sequence

import numpy as np
import torch

from towerbench.features import FeatureStore, Images

AT = (1, 5, 10)

CHUNK = 128
"""Queries that are compared with all images or captions at a time."""


def of_captioned(tower: FeatureStore, images: Images, captions: Sequence[Sequence[str]]) -> np.ndarray:
    """`hits` of images with the captions of each."""
    place: dict[str, int] = {}
    own = [[place.setdefault(text, len(place)) for text in texts] for texts in captions]
    return hits(tower.embeddings(images), tower.text(list(place)), own)


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
