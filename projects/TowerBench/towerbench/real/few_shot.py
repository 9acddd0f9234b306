"""Linear probe and nearest neighbours on few labelled images: 16 per class of ImageNet, 1000 per task of VTAB."""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch

from towerbench.errors import DataError
from towerbench.features import FeatureStore, Images
from towerbench.readout import Readout, chosen_on_validation
from towerbench.real import sources, zero_shot
from towerbench.real.classification import LabelledSet, imagenet_folders, webdataset, webdataset_paths
from towerbench.registry import Context, variant

SHOTS, HELD = 16, 4
"""Images of each class of ImageNet to train on, and to choose by."""

VTAB_TRAIN, VTAB_HELD = 800, 200
"""Images of a task of VTAB (arXiv:1910.04867, section 2.2: VTAB-1k)."""

NEIGHBOURS = (1, 5, 10, 20)
TEMPERATURE = 0.07
"""The vote of a neighbour is exp(cosine / TEMPERATURE) (arXiv:1805.01978, section 3.4)."""

Rows = tuple[torch.Tensor, torch.Tensor]
"""Features `[M, D]` of unit length, and labels `[M]`."""


class FewShot(sources.RealBenchmark):
    """Items are images of the test set. Each seed samples other images to train on."""

    family = "few-shot"
    version = 2
    max_seeds = None
    method = ""
    tested: type[zero_shot.ZeroShot]
    """This benchmark has the same test set. Its images pass a tower once for both."""
    draw: Callable[[Path, int], tuple[LabelledSet, LabelledSet]]
    """From the folder that `needs` names last, and a seed, to the images to train on and to choose by."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.test = self.tested(context)

    def drawn(self, seed: int) -> tuple[LabelledSet, LabelledSet]:
        """Return the images to train on, and to choose by."""
        *_, train = self.needs
        return self.draw(self.path(train), seed)

    def images(self, seed: int) -> Mapping[str, Images]:
        train, held = self.drawn(seed)
        label = self.name.removeprefix(f"{self.method} ")
        source = "imagenet" if self.test.set.imagenet else label
        return {
            "train": zero_shot.images_of(train, f"{source} to train on"),
            "held": zero_shot.images_of(held, f"{source} to choose by"),
            **self.test.images(seed),
        }

    def items(self, tower: FeatureStore, images: Mapping[str, Images], seed: int) -> np.ndarray:
        train, held = self.drawn(seed)
        rows = [
            (tower.embeddings(images[name]), torch.tensor(found.labels))
            for name, found in (("train", train), ("held", held))
        ]
        # ImageNet and its relatives share this key.
        key = "few-shot", self.method, images["train"].identity, images["held"].identity
        readout = tower.once(key, lambda: METHODS[self.method](*rows, len(train.names)))
        scores = readout(tower.embeddings(images["test"]))
        groups = self.test.set.imagenet
        if (
            groups is not None
        ):  # the classes of the test set are some of the trained classes, or several together
            scores = torch.stack([scores[:, list(group)].amax(1) for group in groups], 1)
        return (scores.argmax(1) == torch.tensor(self.test.set.labels)).numpy()


def linear_probe(train: Rows, held: Rows, classes: int) -> Readout:
    """A logistic regression."""
    return chosen_on_validation(train, held, classes).logits


def nearest(train: Rows, held: Rows, classes: int) -> Readout:
    """Vote with the number of neighbours that does best on the held images (the smallest of equally good ones)."""
    found = [
        (neighbours(*train, classes, held[0], k).argmax(1) == held[1]).float().mean() for k in NEIGHBOURS
    ]
    best = NEIGHBOURS[int(torch.stack(found).argmax())]
    return lambda features: neighbours(*train, classes, features, best)


METHODS = {"linear probe": linear_probe, "kNN": nearest}


def neighbours(
    train: torch.Tensor, labels: torch.Tensor, classes: int, features: torch.Tensor, k: int
) -> torch.Tensor:
    """Return the votes `[N, classes]` of the k nearest neighbours.

    Args:
        train: `[M, D]` of unit length.
        labels: `[M]`.
        features: `[N, D]` of unit length.
    """
    votes = []
    for chunk in features.split(1024):
        nearest, where = (chunk @ train.T).topk(min(k, len(train)), dim=1)
        weights = ((nearest - 1) / TEMPERATURE).exp()
        votes.append(torch.zeros(len(chunk), classes).scatter_add_(1, labels[where], weights))
    return torch.cat(votes)


@functools.cache
def _of_imagenet(folder: Path, seed: int) -> tuple[LabelledSet, LabelledSet]:
    """Return images of each of ImageNet's classes, whichever relative is tested."""
    parts: tuple[list, list] = ([], [])
    for index, of_class in sorted(imagenet_folders(folder).items()):
        files = sources.listed(of_class)
        if len(files) < 2:
            raise DataError(
                f"{of_class}: holds {len(files)} images; at least 2 are needed to train and to choose"
            )
        order = np.random.default_rng([seed, index]).permutation(len(files))[: SHOTS + HELD]
        shots = min(SHOTS, len(order) - 1)
        for rows, numbers in zip(parts, (order[:shots], order[shots:]), strict=True):
            rows += [(sources.Source(files[i]), index) for i in numbers]
    return tuple(LabelledSet(*zip(*rows, strict=True), range(1000), ()) for rows in parts)


@functools.cache
def _of_vtab(folder: Path, seed: int) -> tuple[LabelledSet, LabelledSet]:
    """Return images of the task's own train split."""
    whole = _read(folder)
    order = np.random.default_rng(seed).permutation(len(whole.labels))[: VTAB_TRAIN + VTAB_HELD]
    cut = len(order) * VTAB_TRAIN // (VTAB_TRAIN + VTAB_HELD)
    if not cut:
        raise DataError(f"{folder}: this train split holds {len(order)} images; more are needed")
    return whole.part(order[:cut]), whole.part(order[cut:])


@functools.lru_cache(maxsize=1)
def _read(folder: Path) -> LabelledSet:
    """Return a split, which one seed after the other uses."""
    return webdataset(folder)


for _name, _tested in zero_shot.BY_NAME.items():
    _train, _draw = {"imagenet/train": "ImageNet's training images, in 1000 folders"}, _of_imagenet
    if _name.startswith("vtab/"):
        _paths = webdataset_paths(_name.removeprefix("vtab/"), "train")
        _train, _draw = {_paths: "of clip-benchmark's webdataset, to train on"}, _of_vtab
    for _method, _words in (("linear probe", "a linear probe"), ("kNN", "nearest neighbours")):
        variant(
            FewShot,
            f"{_method} {_name}",
            f"{_method} on {_name}.",
            method=_method,
            metric=f"accuracy of {_words}",
            needs={**_tested.needs, **_train},
            item_set=_tested.item_set,
            tested=_tested,
            draw=staticmethod(_draw),
        )
