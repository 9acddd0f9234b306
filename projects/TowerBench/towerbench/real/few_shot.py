"""Linear probe and nearest neighbours on few labelled images: ImageNet's 16 a class, VTAB's 1000 a task."""

import functools
from collections.abc import Mapping
from pathlib import Path
from weakref import WeakKeyDictionary

import numpy as np
import torch

from towerbench.errors import DataError
from towerbench.features import FeatureStore, Images
from towerbench.readout import LogisticRegression, chosen_on_validation
from towerbench.real import sources, zero_shot
from towerbench.real.classification import (
    IMAGENET_VARIANTS,
    OBJECTNET,
    VTAB,
    LabelledSet,
    imagenet_folders,
    webdataset,
    webdataset_paths,
)
from towerbench.registry import Context, variant

SHOTS, HELD = 16, 4
"""Images of each class of ImageNet to train on, and to choose by."""

VTAB_TRAIN, VTAB_HELD = 800, 200
"""Of a task of VTAB (arXiv:1910.04867, section 2.2: VTAB-1k)."""

NEIGHBOURS = (1, 5, 10, 20)
TEMPERATURE = 0.07
"""A neighbour's vote is exp(cosine / TEMPERATURE) (arXiv:1805.01978, section 3.4)."""

Rows = tuple[torch.Tensor, torch.Tensor]
"""Features `[M, D]` of unit length, and labels `[M]`."""


class _FewShot(sources.RealBenchmark):
    """Items are images of the test set. Each seed draws other images to train on."""

    family = "few-shot"
    version = 2
    max_seeds = None
    method = ""
    tested: type[zero_shot.ZeroShot]
    """Has the same test set, whose images pass a tower once for both."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.test = self.tested(context)

    def drawn(self, seed: int) -> tuple[LabelledSet, LabelledSet]:
        """What is trained on, and chosen by."""
        raise NotImplementedError

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
        groups, labels = self.test.set.imagenet, torch.tensor(self.test.set.labels)
        rows = (
            (tower.embeddings(images["train"]), torch.tensor(train.labels)),
            (tower.embeddings(images["held"]), torch.tensor(held.labels)),
        )
        scores = self.scores(tower, images, *rows, len(train.names))
        if groups is not None:  # the classes of the test set are some of those trained, or several together
            scores = torch.stack([scores[:, list(group)].amax(1) for group in groups], 1)
        return (scores.argmax(1) == labels).numpy()

    def scores(
        self, tower: FeatureStore, images: Mapping[str, Images], train: Rows, held: Rows, classes: int
    ) -> torch.Tensor:
        """Scores of the trained classes `[N, classes]` for the N images that are tested."""
        features = tower.embeddings(images["test"])
        if self.method == "kNN":
            found = [
                (neighbours(*train, classes, held[0], k).argmax(1) == held[1]).float().mean()
                for k in NEIGHBOURS
            ]
            return neighbours(*train, classes, features, NEIGHBOURS[int(torch.stack(found).argmax())])
        # ImageNet and its relatives share it: it depends on the tower and the images it is trained on alone.
        known = _probes.setdefault(tower, {})
        key = images["train"].identity, images["held"].identity
        if key not in known:
            known[key] = chosen_on_validation(train, held, classes)
        return known[key].logits(features)


_probes: WeakKeyDictionary[FeatureStore, dict[tuple, LogisticRegression]] = WeakKeyDictionary()


def neighbours(
    train: torch.Tensor, labels: torch.Tensor, classes: int, features: torch.Tensor, k: int
) -> torch.Tensor:
    """Votes `[N, classes]` of the k nearest.

    Args:
        train: `[M, D]` of unit length. labels: `[M]`. features: `[N, D]` of unit length.
    """
    votes = []
    for chunk in features.split(1024):
        nearest, where = (chunk @ train.T).topk(min(k, len(train)), dim=1)
        weights = ((nearest - 1) / TEMPERATURE).exp()
        votes.append(torch.zeros(len(chunk), classes).scatter_add_(1, labels[where], weights))
    return torch.cat(votes)


class _FromImageNet(_FewShot):
    """Trained on ImageNet's own images, whichever relative is tested."""

    def drawn(self, seed: int) -> tuple[LabelledSet, LabelledSet]:
        return _of_imagenet(self.path("imagenet/train"), seed)


@functools.cache
def _of_imagenet(folder: Path, seed: int) -> tuple[LabelledSet, LabelledSet]:
    """Images of each class to train on, and to choose by; the folders are listed once a process and seed."""
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


class _FromVtab(_FewShot):
    """Trained on images of the task's own train split."""

    def drawn(self, seed: int) -> tuple[LabelledSet, LabelledSet]:
        _, train = self.needs
        return _of_vtab(self.path(train), seed)


@functools.cache
def _of_vtab(folder: Path, seed: int) -> tuple[LabelledSet, LabelledSet]:
    """Images of a train split to train on, and to choose by."""
    whole = _read(folder)
    order = np.random.default_rng(seed).permutation(len(whole.labels))[: VTAB_TRAIN + VTAB_HELD]
    cut = len(order) * VTAB_TRAIN // (VTAB_TRAIN + VTAB_HELD)
    if not cut:
        raise DataError(f"{folder}: this train split holds {len(order)} images; more are needed")
    return whole.part(order[:cut]), whole.part(order[cut:])


@functools.lru_cache(maxsize=1)
def _read(folder: Path) -> LabelledSet:
    """A split, for one seed after the other."""
    return webdataset(folder.parent, folder.name)


def _declare(name: str, base: type[_FewShot], needs: Mapping[str, str]) -> None:
    tested = zero_shot.BY_NAME[name]
    for method, words in (("linear probe", "a linear probe"), ("kNN", "nearest neighbours")):
        variant(
            base,
            f"{method} {name}",
            f"{method} on {name}.",
            method=method,
            metric=f"accuracy of {words}",
            needs=needs,
            item_set=tested.item_set,
            tested=tested,
        )


_TRAIN = {"imagenet/train": "ImageNet's training images, in 1000 folders"}
for _name, (_paths, _what, _) in IMAGENET_VARIANTS.items():
    _declare(_name, _FromImageNet, {_paths: _what} | _TRAIN)
_declare("objectnet", _FromImageNet, {OBJECTNET: "ObjectNet, as its archive unpacks"} | _TRAIN)
for _name in VTAB:
    _declare(
        f"vtab/{_name}",
        _FromVtab,
        {
            webdataset_paths(_name, "test"): "of clip-benchmark's webdataset, to be tested",
            webdataset_paths(_name, "train"): "of clip-benchmark's webdataset, to train on",
        },
    )
